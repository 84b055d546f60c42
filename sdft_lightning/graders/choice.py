"""`choice`: the letter of a multiple-choice answer.

The patterns are read after markup (asterisks, back ticks, dollars, braces) is taken out; only
`BOLD_PICK` is read before. Words match in any case, letters in capitals unless said otherwise.
"""

import re
import unicodedata

from sdft_lightning.errors import UserError, shown
from sdft_lightning.graders.texts import stream_safe

_OPEN = r"[\"'(\[]{0,3}"
_CLOSE = r"[\"')\]]{0,3}"
_REASON = r"(?:because|since|as|due|which|based|given)\b"
# A and I are words too: they are letters only where the sentence cannot go on with a noun.
_STOP = rf"(?=[^\S\n]*(?:[.,;:!?)\]\"'(<\n\u2014]|[\-\u2013]\s|\Z|{_REASON}))"
_PART = r"(?![\w\-\u2010-\u2013=+#/&]|'\w)"  # C-C, C=O, C++, B/C, A's
_RIVAL = (  # "B or C", "B, C and D": more than one is named
    rf"(?!{_CLOSE}\s*(?:or|and|&|/)\s+{_OPEN}(?:option\s+)?[A-HJ-Z]\b"
    rf"|{_CLOSE},\s*{_OPEN}[A-HJ-Z]{_CLOSE}\s*(?:,|or\b|and\b|\.|\Z))"
)
_CAPITAL = rf"(?:[AI]{_PART}{_STOP}|[B-HJ-Z]{_PART}){_RIVAL}"
_SMALL = r"[a-z](?=[)\]]|\.?\s*(?:\n|\Z))"  # (b), or the last word of its line
_PICK = (
    rf"(?i:(?:option|choice|letter)\s+)?{_OPEN}"
    rf"(?P<letter>{_CAPITAL}|{_SMALL})"
)
_NO = r"(?<!wrong )(?<!incorrect )"
_ADVERB = r"(?:(?:therefore|thus|clearly|definitely|likely|indeed|simply)\s+)?"

STATEMENTS = tuple(
    re.compile(pattern)
    for pattern in (
        # the (correct) answer (to this question) is C
        rf"(?i:{_NO}\b(?:answer|option|choice)\b[^.:\n]{{0,40}}?\b(?:is|be)\b:?\s*{_ADVERB}){_PICK}",
        # Answer: C; final choice - C
        rf"(?i:{_NO}\b(?:answer|(?:correct|right|best|final)\s+(?:option|choice))"
        rf"\s*[:=\-\u2013\u2014]+\s*){_PICK}",
        # I choose C
        rf"(?i:(?<!not )(?<!n't )\b(?:choose|chose|pick|select|go with|going with)\s+){_PICK}",
        # C is correct
        rf"(?<!\bor )(?<!\bnor )(?<!\band )(?<!\bif )(?<![\w'\-]){_OPEN}(?P<letter>[A-Z]){_CLOSE}"
        r"(?i:\s+is\s+(?:the\s+)?(?:most\s+|only\s+)?(?:correct|right|best|answer)\b)",
    )
)
"""Sentences that settle on an option; the group `letter` may be a small letter."""

_LABEL_END = (
    rf"(?:[\"'.:,)\]]*[^\S\n]*$"  # alone on its line
    r"|\)[.:]?\s|[.:]\s|\s+[-\u2013\u2014]\s"  # (B) water; B. water; B - water
    rf"|,?\s+{_REASON})"
)
_NOT_A_LIST = rf"(?!(?:[.:)\]]|[^\S\n])*{_OPEN}[A-HJ-Z](?:[.):,]|[^\S\n]*$))"  # "A. B. C."

LABEL = re.compile(
    rf"^(?:[^\S\n]|[>#\-\u2022])*{_OPEN}(?P<letter>[A-Z]){_RIVAL}{_NOT_A_LIST}{_LABEL_END}",
    re.MULTILINE,
)
"""C, (C) or C. water at the start of a line, behind list or heading marks."""

MENTIONS = (
    re.compile(rf"\b(?i:option|choice)\s+{_OPEN}(?P<letter>[A-Z]){_PART}"),
    re.compile(rf"\b(?i:answer)\s+{_OPEN}(?P<letter>{_CAPITAL})"),
    re.compile(r"(?<!\S)\((?P<letter>[A-Z])\)(?![\w\-\u2010-\u2013])"),  # not f(C), (E)-stilbene
)
"""Option C, answer C, or (C) standing free: named, without saying that it is the answer."""

BOLD_PICK = re.compile(rf"\*\*{_OPEN}(?P<letter>[A-Z]){_CLOSE}(?:[.:]?\s*\*\*|[.:)]\s[^*\n]*\*\*)")
"""**C**, **(C)**, **C. water**: an option in bold type, anywhere."""

UNDECIDED = (
    re.compile(  # option A is wrong
        rf"\b(?i:option|choice|answer)\s+{_OPEN}[A-Z]\b{_CLOSE}\s+(?i:isn't|cannot|can't"
        r"|(?:is|was|would\s+be)\s+(?:\w+\s+)?(?:not|wrong|incorrect|false))\b"
    ),
    re.compile(  # A or (B); A and option B; A, B
        rf"(?<![\w\-])[A-Z]{_CLOSE}\s*(?:[,/&]|\b(?:or|nor|and)\b)\s*"
        rf"(?i:(?:option|choice)\s+)?{_OPEN}[A-HJ-Z](?!\w)"
    ),
)
"""Phrases that name a letter and do not settle on it."""


_REFERENCE = re.compile(r"\s*\(?(?P<letter>[A-Z])(?:\s*\Z|\)[.:]?(?:\s|\Z)|[.:](?:\s|\Z))")
_THOUGHT_TAG = re.compile(r"<(?P<close>/?)(?P<name>think|reasoning)>", re.IGNORECASE)
_THOUGHT_CLOSE = re.compile(r"</(?:think|reasoning)>", re.IGNORECASE)
_THOUGHT_OPEN = re.compile(r"<(?:think|reasoning)>", re.IGNORECASE)
_ANSWER_OPEN = re.compile(r"<\s*answer\s*>", re.IGNORECASE)
_ANSWER_CLOSE = re.compile(r"<\s*/\s*answer\s*>", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{")
_TEX_OR_MARKUP = re.compile(r"\\(?:text|textbf|mathbf|mathrm)\s*\{|[*`$_{}]")
_LOWERCASE_ONLY = re.compile(r"[\s(\[\"']*(?P<letter>[a-z])[\s)\]\"'.:]*", re.ASCII)


def choice(text: str, reference: object) -> float:
    """Return 1.0 if the letter that `text` settles on is the reference's, else 0.0.

    The letter is read by `chosen_letter`.

    Args:
        text: the completion.
        reference: a capital letter A-Z, alone or before its text: "B", "(B)", "B. water",
            "B) water", "B: water".

    Raises:
        UserError: the reference has another form.
    """
    return float(chosen_letter(text) == reference_letter(reference))


def reference_letter(reference: object) -> str:
    """Return the letter of the reference.

    Raises:
        UserError: the reference does not open with a capital letter that stands by itself.
    """
    match = _REFERENCE.match(reference) if isinstance(reference, str) else None
    if match is None:
        raise UserError(
            "the reference must be a capital letter A to Z, alone or with its option "
            f'("B" or "B. water"); got {shown(reference)}. Write the letter of the right option, '
            "and leave out rows that have none."
        )
    return match["letter"]


def chosen_letter(text: str) -> str | None:
    r"""Return the letter that `text` settles on, or None if it settles on none.

    1. Thoughts in <think> or <reasoning> are left out; an unclosed one runs to the end.
    2. `<answer>` counts alone if there is one, the last if there are several; without its
       closing tag it runs to the end.
    3. A clear statement counts, the last if there are several: "the correct answer is C",
       "Answer: (B)", "I choose D", "B is correct", \boxed{A}.
    4. Else a label counts that opens the text ("B", "(B)", "B. water") or stands in bold
       anywhere ("**B**"), if all labels at line starts and in bold are the same letter.
    5. Else "option B" and a free "(B)" count too, if all letters named are the same, none is
       called wrong and none is offered beside another ("A or B").

    A capital A or I before another word is taken for the English word ("A molecule ..."), and
    a letter joined to something by a hyphen, slash or sign for a part of it ("C-C bond").
    """
    text = _without_thoughts(unicodedata.normalize("NFKC", stream_safe(text)))
    text = _THOUGHT_CLOSE.split(text)[-1]  # chat templates may hold the opening tag themselves
    answers = _ANSWER_OPEN.split(text)
    if len(answers) > 1:
        return _read(_ANSWER_CLOSE.split(answers[-1])[0])
    return _read(_THOUGHT_OPEN.split(text)[0])


def _without_thoughts(text: str) -> str:
    """Put a space for each thought that is closed by a tag of its own name."""
    tags = [(tag, tag["name"].lower()) for tag in _THOUGHT_TAG.finditer(text)]
    last_close = {name: tag.start() for tag, name in tags if tag["close"]}
    kept, start, inside = [], 0, ""
    # In one pass: to search the rest of the text anew from each opening tag takes seconds where a
    # model repeats one.
    for tag, name in tags:
        if not (inside or tag["close"]) and tag.end() <= last_close.get(name, -1):
            kept.append(text[start : tag.start()])
            inside = name
        elif tag["close"] and name == inside:
            start, inside = tag.end(), ""
    return " ".join([*kept, text[start:]])


def _read(text: str) -> str | None:
    bold = {match["letter"] for match in BOLD_PICK.finditer(text)}
    text = _TEX_OR_MARKUP.sub("", _BOXED.sub("answer: ", text))
    lowercase = _LOWERCASE_ONLY.fullmatch(text)
    if lowercase is not None:
        return lowercase["letter"].upper()
    stated = [match for pattern in STATEMENTS for match in pattern.finditer(text)]
    if stated:
        return max(stated, key=lambda match: match.start("letter"))["letter"].upper()
    return _singled_out(text.lstrip(), bold)


def _singled_out(text: str, bold: set[str]) -> str | None:
    labels = list(LABEL.finditer(text))
    shown = bold | {match["letter"] for match in labels}
    opens_with_label = bool(labels) and labels[0].start() == 0
    if (bold or opens_with_label) and len(shown) == 1:
        return shown.pop()
    if any(pattern.search(text) for pattern in UNDECIDED):
        return None
    shown |= {match["letter"] for pattern in MENTIONS for match in pattern.finditer(text)}
    return shown.pop() if len(shown) == 1 else None

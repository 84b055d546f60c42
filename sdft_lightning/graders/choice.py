"""`choice`: the letter of a multiple-choice answer."""

import re
import unicodedata

from sdft_lightning.errors import UserError
from sdft_lightning.errors.foreign_text import shown
from sdft_lightning.graders.choice_patterns import BOLD_PICK, LABEL, MENTIONS, STATEMENTS, UNDECIDED
from sdft_lightning.graders.folding import stream_safe

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

"""How a completion names one option of a multiple-choice question.

The patterns are read after markup (asterisks, back ticks, dollars, braces) is taken out; only
`BOLD_PICK` is read before. Words match in any case, letters in capitals unless said otherwise.
"""

import re

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

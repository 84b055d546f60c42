"""Text against accepted texts: one spelling for both, `exact` and `contains`."""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from sdft_lightning.errors import UserError, shown

_PLAIN = str.maketrans(
    {
        "\u2018": "'",  # typographic quotes
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2010": "-",  # hyphens and the minus sign; dashes stay
        "\u2011": "-",
        "\u2212": "-",
        "\u200b": None,  # zero-width space
        "\ufeff": None,  # byte-order mark
    }
)


# Unicode's Stream-Safe Text Format (UAX 15): no more marks in a row, a joiner between them.
_MOST_MARKS, _JOINER = 30, "\u034f"


def fold_text(text: str) -> str:
    """Return `text` with case, white space and typography folded.

    Case by `str.casefold`; every run of white space (line breaks, no-break spaces) becomes one
    space and the ends are stripped; composed and decomposed accents become the same (NFC);
    curly quotes, hyphens and the minus sign become plain. NFC and not NFKC: NFKC reads 10² as
    102.
    """
    composed = unicodedata.normalize("NFC", stream_safe(text.translate(_PLAIN)))
    return " ".join(unicodedata.normalize("NFC", composed.casefold()).split())


def stream_safe(text: str) -> str:
    """Break up endless rows of combining marks, which Python sorts in quadratic time."""
    if text.isascii():
        return text
    found: list[str] = []
    marks = 0
    for character in text:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > _MOST_MARKS:
            found.append(_JOINER)
            marks = 1
        found.append(character)
    return "".join(found)


_FORM = "the reference must be a text, or a list of accepted texts"
_REMEDY = (
    'Write the answer as text, such as "48" or ["Paris", "the city of Paris"], '
    "and leave out rows that have none."
)


def accepted_texts(reference: object) -> list[str]:
    """Return the accepted texts of `reference`, as they were written.

    Args:
        reference: a str, or a list of str. Each holds more than white space and full stops.

    Raises:
        UserError: another form, an empty list or an empty text (which every completion would
            contain).
    """
    texts = [reference] if isinstance(reference, str) else reference
    if not isinstance(texts, list | tuple) or not texts:
        raise UserError(f"{_FORM}; got {shown(reference)}. {_REMEDY}")
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{_FORM}; got {shown(text)} in {shown(reference)}. {_REMEDY}")
        if not fold_text(text).strip(". "):
            raise UserError(f"{_FORM}; got the empty text {shown(text)}. {_REMEDY}")
    return list(texts)


def exact(text: str, reference: object) -> float:
    """Return 1.0 if `text` equals an accepted text, else 0.0.

    Both sides are stripped, white space and case are folded, and one full stop at the end is
    dropped. Markdown stays: "**Paris**" is not "Paris".

    Args:
        text: the completion.
        reference: a str, or a list of accepted str.

    Raises:
        ValueError: the reference has another form.
    """
    accepted = {_bare(answer) for answer in accepted_texts(reference)}
    return float(_bare(text) in accepted)


def _bare(text: str) -> str:
    return fold_text(text).removesuffix(".").rstrip()


_UNDERSCORES = re.compile("_+")
_NUMBER_JOINTS = ".,:/"  # between two digits they make one number, time, date or fraction
_UNSPACED = (  # code points of scripts that put no space at the end of a word
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x9FFF),  # Han
    (0xAC00, 0xD7AF),  # Hangul: particles stand right behind the noun
    (0xF900, 0xFAFF),  # Han, compatibility
    (0x20000, 0x3FFFF),  # Han, extensions
)


def contains(text: str, reference: object) -> float:
    """Return 1.0 if an accepted answer stands in `text`, else 0.0.

    Case and white space are folded on both sides. A match must not go on beyond its ends:

    - a word does not match inside a longer word ("art" in "party"); underscores count as
      markup at the ends of a word (_Paris_) and as part of it inside (get_user);
    - a number does not match inside a longer one: "48" is not in 480, 148, 1,480, 48.50, .48,
      3:48, 48/50 or -48, but it is in "$48.", "48 dollars", "48%", "48-hour" and "**48**";
    - an end that is a sign ("C++", "$48") asks nothing of what stands beyond it;
    - between scripts that write without spaces (Chinese, Japanese, Thai, Korean particles ...)
      and their neighbours no boundary is asked for.

    Numbers are compared as written: "1480" does not match "1,480"; list both.

    Args:
        text: the completion.
        reference: a str, or a list of accepted str.

    Raises:
        ValueError: the reference has another form.
    """
    folded = fold_text(text)
    answers = [fold_text(answer) for answer in accepted_texts(reference)]
    return float(any(_stands_in(answer, folded) for answer in answers))


def _stands_in(answer: str, text: str) -> bool:
    if not answer:
        return False
    runs = [match.span() for match in _UNDERSCORES.finditer(text)]
    for start in _places(answer, text):
        end = start + len(answer)
        before = _beyond_underscores(text, start - 1, -1, runs)
        after = _beyond_underscores(text, end, 1, runs)
        goes_on = (
            _goes_on(answer[0], before)
            or _goes_on(answer[-1], after)
            or _signed(answer, text[max(0, start - 2) : start][::-1])
        )
        if not goes_on:
            return True
    return False


def _places(answer: str, text: str) -> Iterator[int]:
    """Where `answer` begins in `text`, in time that grows with both lengths and not their product.

    `str.find` alone would look at an answer that overlaps itself ("aaaa") again at each place.
    """
    borders = _borders(answer)
    if borders[-1] == 0:  # no two places overlap
        start = text.find(answer)
        while start >= 0:
            yield start
            start = text.find(answer, start + len(answer))
        return
    matched = 0  # Knuth, Morris and Pratt
    for place, character in enumerate(text):
        while matched and (matched == len(answer) or answer[matched] != character):
            matched = borders[matched - 1]
        matched += answer[matched] == character
        if matched == len(answer):
            yield place - matched + 1


def _borders(answer: str) -> list[int]:
    """For each prefix the length of its longest end that is also its beginning."""
    found = [0] * len(answer)
    matched = 0
    for place in range(1, len(answer)):
        while matched and answer[matched] != answer[place]:
            matched = found[matched - 1]
        matched += answer[matched] == answer[place]
        found[place] = matched
    return found


def _beyond_underscores(text: str, place: int, step: int, runs: list[tuple[int, int]]) -> str:
    """The two characters from a place on in a direction, behind underscores that stand there."""
    if 0 <= place < len(text) and text[place] == "_":
        first, last = runs[bisect_right(runs, (place, len(text))) - 1]
        place = last if step > 0 else first - 1
    return text[place : place + 2] if step > 0 else text[max(0, place - 1) : place + 1][::-1]


def _goes_on(edge: str, beyond: str) -> bool:
    """Return whether the word or number that ends in `edge` goes on in `beyond`."""
    if not beyond or not _is_word(edge) or _is_unspaced(edge) or _is_unspaced(beyond[0]):
        return False
    if _is_word(beyond[0]):
        return True
    return edge.isdigit() and beyond[0] in _NUMBER_JOINTS and beyond[1:2].isdigit()


def _signed(answer: str, before: str) -> bool:
    """Return whether what stands `before` a number makes it another one: -48, .48; 3-48."""
    if answer[0].isdigit():
        decimal = before.startswith(".") and before[1:2] in ("", " ")
        negative = before.startswith("-") and before[1:2] != "-" and not _is_word(before[1:2])
        return decimal or negative
    if answer[0] in "-." and answer[1:2].isdigit():
        return _is_word(before[:1])
    return False


def _is_word(character: str) -> bool:
    return character != "" and unicodedata.category(character)[0] in "LNM"


def _is_unspaced(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _UNSPACED)


WORD = re.compile(r"[^\W_]+(?:['’.\-][^\W_]+)*")


class AnswerShape(NamedTuple):
    """How long an answer is, and how much of it is said once.

    Attributes:
        words: Number of words.
        distinct_2: Share of the pairs of neighbouring words, in any case, that are different ones:
            1 where nothing is repeated, near 0 in a loop.
    """

    words: int
    distinct_2: float


def answer_shape(text: str) -> AnswerShape:
    """Count the words of an answer and its different pairs of words; 1 where there is no pair."""
    said = [word.lower() for word in WORD.findall(text)]
    pairs = list(pairwise(said))
    return AnswerShape(len(said), len(set(pairs)) / len(pairs) if pairs else 1.0)

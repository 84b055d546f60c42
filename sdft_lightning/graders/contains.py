"""`contains`: an accepted answer stands somewhere in the completion, as a word of its own."""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator

from sdft_lightning.graders.accepted import accepted_texts
from sdft_lightning.graders.folding import fold_text

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

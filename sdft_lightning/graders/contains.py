"""`contains`: an accepted answer stands somewhere in the completion, as a word of its own."""

import unicodedata

from sdft_lightning.graders.accepted import accepted_texts
from sdft_lightning.graders.folding import fold_text

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
    start = text.find(answer)
    while start >= 0:
        before = text[:start][::-1]  # nearest character first, as in `after`
        after = text[start + len(answer) :]
        goes_on = (
            _goes_on(answer[0], before) or _goes_on(answer[-1], after) or _signed(answer, before)
        )
        if not goes_on:
            return True
        start = text.find(answer, start + 1)
    return False


def _goes_on(edge: str, beyond: str) -> bool:
    """Return whether the word or number that ends in `edge` goes on in `beyond`."""
    if not _is_word(edge):
        return False
    beyond = beyond.lstrip("_")
    if not beyond or _is_unspaced(edge) or _is_unspaced(beyond[0]):
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

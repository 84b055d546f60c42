"""One spelling for texts that differ only in case, spaces or typography."""

import unicodedata

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

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


def fold_text(text: str) -> str:
    """Return `text` with case, white space and typography folded.

    Case by `str.casefold`; every run of white space (line breaks, no-break spaces) becomes one
    space and the ends are stripped; composed and decomposed accents become the same (NFC);
    curly quotes, hyphens and the minus sign become plain. NFC and not NFKC: NFKC reads 10² as
    102.
    """
    composed = unicodedata.normalize("NFC", text.translate(_PLAIN))
    return " ".join(unicodedata.normalize("NFC", composed.casefold()).split())

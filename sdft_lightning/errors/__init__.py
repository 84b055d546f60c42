"""The error that a user can mend: bad input, a bad option, a run that cannot work."""

from __future__ import annotations

from collections.abc import Iterable

from sdft_lightning.errors.foreign_text import harmless


class UserError(ValueError):
    """Something that the user gave is wrong; the text says what, where, and the remedy.

    `sdft_lightning.cli.main` prints it without a traceback and exits with code 2. Whatever a file
    or a server has put into the text, it holds neither known secrets nor control codes.
    """

    def __init__(self, text: object = "") -> None:
        super().__init__(harmless(str(text)))


def check_choice(option: str, value: object, allowed: Iterable[object], remedy: str = "") -> None:
    """Raise unless `value` is one of `allowed`.

    Args:
        option: Name of the option as the user writes it.
        value: What was given.
        allowed: The values that the option takes.
        remedy: One more sentence for the reader.

    Raises:
        UserError: If `value` is not allowed.
    """
    choices = list(allowed)
    if value not in choices:
        listed = ", ".join(str(choice) for choice in choices)
        raise UserError(
            f"{option}: got {value!r}, allowed are {listed}. {remedy or 'Choose one of them.'}"
        )


def check_at_least(option: str, value: int, least: int) -> None:
    """Raise unless a number is large enough.

    Args:
        option: Name of the option as the user writes it.
        value: What was given.
        least: The smallest value that the option takes.

    Raises:
        UserError: If `value` is below it.
    """
    if value < least:
        raise UserError(f"{option}: got {value}, allowed are {least} and more.")

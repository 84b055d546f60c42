"""The error that a user can mend, the text of strangers made fit for it, and quiet libraries."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

MOST_SHOWN = 300  # characters of a foreign text in a message
_HIDDEN = "***"
# Values of these variables are secrets, whoever sends them.
_SECRET_VARIABLE = re.compile(r"(API_?KEY|ACCESS_KEY|TOKEN|SECRET|PASSWORD)\Z", re.IGNORECASE)
_LEAST_SECRET = 8  # characters: a shorter value of such a variable may be a word, like "true"
_LEAST_KEY = 3  # of a key that was read on purpose
_USER_IN_URL = re.compile(r"(?<=://)[^\s/?#\"'<>]+@")

_keys: set[str] = set()


def key_from(variable: str) -> str | None:
    """The key in an environment variable; from now on `mask` hides it.

    Args:
        variable: Name of the variable.

    Returns:
        The key without white space around it; None where there is none.
    """
    key = os.environ.get(variable, "").strip()
    if len(key) >= _LEAST_KEY:
        _keys.add(key)
    return key or None


def mask(text: str) -> str:
    """A text with `***` for each known secret, and for user and password in a URL.

    Known are the keys that `key_from` has read, and the values of environment variables whose names
    end as those of secrets do (`..._API_KEY`, `..._TOKEN`). They are found as they are, and as JSON
    and URLs write them.
    """
    for secret in _secrets():
        for form in {secret, json.dumps(secret)[1:-1], quote(secret, safe="")}:
            if len(form) >= _LEAST_SECRET:
                text = text.replace(form, _HIDDEN)
            elif form in text:  # as a word of its own: a key "key" is no part of "monkey"
                text = re.sub(rf"(?<![^\W_]){re.escape(form)}(?![^\W_])", _HIDDEN, text)
    return _USER_IN_URL.sub(f"{_HIDDEN}@", text) if "@" in text else text


def harmless(text: str) -> str:
    """A masked text that any terminal may show: control codes but line ends become blanks.

    Args:
        text: Of any length; it is not cut.
    """
    text = mask(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def printable(text: str, most: int | None = MOST_SHOWN) -> str:
    """A foreign text for a message: one line, masked, without control codes, and cut.

    Args:
        text: What a server, a file or a model has written.
        most: Characters that are shown; all of them with None.
    """
    line = " ".join(mask(text).split())
    if most is not None:  # before the slower part; what is cut off here is masked already
        line = line[: 10 * most]
    return _cut(" ".join(harmless(line).split()), most)


def shown(value: object, most: int = MOST_SHOWN) -> str:
    """A foreign value for a message, as Python writes it, and cut as by `printable`."""
    text = mask(repr(value))[: 10 * most]
    return _cut(harmless(text).replace("\n", " "), most)


def _cut(line: str, most: int | None) -> str:
    return line if most is None or len(line) <= most else f"{line[: most - 3]}..."


def _secrets() -> list[str]:
    """All known secrets, longest first: a short one may be the beginning of another."""
    found = set(_keys)
    for name, value in os.environ.items():
        if len(value) >= _LEAST_SECRET and _SECRET_VARIABLE.search(name):
            found.add(value.strip())
    return sorted(filter(None, found), key=len, reverse=True)


class UserError(ValueError):
    """Something that the user gave is wrong; the text says what, where, and the remedy.

    `sdft_lightning.cli.main` prints it without a traceback and exits with code 2. Whatever a file
    or a server has put into the text, it holds neither known secrets nor control codes.
    """

    def __init__(self, text: object = "") -> None:
        super().__init__(harmless(str(text)))


def extra_remedy(name: str) -> str:
    """The sentence that tells how an extra of this package is installed.

    Args:
        name: The extra, e.g. lora. The sentence ends without a full stop.
    """
    return (
        f"Install the extra {name}: pip install -e '.[{name}]' in a checkout, or the wheel with "
        f"[{name}] behind its file name"
    )


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


_WARNINGS = (
    ".*does not have many workers.*",
    ".*module\\(s\\) in eval mode at the start of training.*",  # the teacher is meant to be
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*number of training batches.*is smaller than the logging interval.*",
    ".*Total length of .* across ranks is zero.*",  # no validation split was given
    ".*The dirpath has changed from.*",  # each command has its own folder
    ".*Checkpoint directory.*exists and is not empty.*",  # the run's own, on resume
)
_NOTICES = (
    "is an Enum subclass and is now natively supported by torch.compile",
    "litlogger",
    "litmodels",
    "override existing callbacks passed to Trainer: ",
    "`weights_only` was not set",  # of saving, not of loading: the whole state is meant to be saved
)
_SPEAKERS = (
    "pytorch.utilities.rank_zero",
    "fabric.utilities.rank_zero",
    "pytorch.trainer.connectors.checkpoint_connector",
)


class _Drop(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Drop a record that contains one of the notices."""
        text = record.getMessage()
        return not any(notice in text for notice in _NOTICES)


class _CurrentStderr(logging.StreamHandler[Any]):
    """Writes to what is standard error now, which whoever captures output exchanges."""

    @property
    def stream(self) -> Any:
        """Standard error."""
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None:
        """Nothing is kept."""


def print_anything() -> None:
    """Let no character end the program that the terminal, or the file behind it, does not know.

    Models, rows and tables hold all kinds; where the output's encoding lacks one, "?" is printed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # notebooks and others have streams of their own
            stream.reconfigure(errors="replace")


def show_messages() -> None:
    """Print the package's own messages in a script whose program has set up no logging.

    As Lightning does with its own. Warnings of Lightning that mislead are dropped as well, unless
    the program has a filter for them; loggers of others, and what the program has set, stay.
    """
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern, append=True)
    _keep_forks_quiet()
    if not logging.getLogger().handlers:
        _print_messages()


def _print_messages() -> None:
    ours = logging.getLogger("sdft_lightning")
    if ours.handlers:
        return
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours.addHandler(handler)
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)
    ours.propagate = False


def quieten() -> None:
    """Drop known notices and transformers' progress bars; show the package's own messages."""
    quieten_notices()
    quieten_transformers()


def quieten_notices() -> None:
    """Drop known notices; show the package's own messages. Imports no library."""
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    for name in _SPEAKERS:
        logging.getLogger(f"lightning.{name}").addFilter(_Drop())
    # torchao (extra low-memory), which transformers imports where it is installed, tells of GPU
    # libraries that it does not find and of its own deprecated calls.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").addFilter(_Drop())
    _print_messages()
    _keep_forks_quiet()


def _keep_forks_quiet() -> None:
    """The tokenizers warn at each fork once they have used all cores; see `tokenize_rows`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def quieten_transformers() -> None:
    """Turn transformers' progress bars off. Imports it, which takes a second."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


_POLICY = (
    "revision",
    "weights_dtype",
    "attn_implementation",
    "gradient_checkpointing",
    "lora",
    "quantization",
    "sampling_dtype",
)
# Old name below `model`: new name. What follows an old name stays behind the new one.
RENAMED = {
    "model_name": "policy.name",
    **{name: f"policy.{name}" for name in _POLICY},
    "eval_max_new_tokens": "evaluation.max_new_tokens",
    "teacher_accuracy_in_fit": "evaluation.teacher_in_fit",
    "mismatch_correction.kind": "mismatch.correction",
    "mismatch_correction": "mismatch",
    "sampler_alarm": "mismatch",
    "original_model_name": "original.name",
    "original_revision": "original.revision",
}


def new_name(old: str) -> str | None:
    """The name that an option of a module has now; None for one that was never renamed.

    Args:
        old: Below `model`, e.g. `lora.r`.
    """
    for before, now in RENAMED.items():
        if old == before or old.startswith(f"{before}."):
            return now + old.removeprefix(before)
    return None


def renamed_options(names: Iterable[str]) -> str:
    """One sentence for each option that was renamed; nothing where none was.

    Args:
        names: Below `model`.
    """
    found = {name: new_name(name) for name in names}
    return " ".join(
        f"model.{name} is model.{now} now." for name, now in found.items() if now is not None
    )


def check_arguments(owner: str, unknown: Iterable[str]) -> None:
    """Refuse keyword arguments that a constructor does not have.

    Args:
        owner: Name of the class.
        unknown: Names of the arguments.

    Raises:
        UserError: Names the new one where an argument was renamed.
        TypeError: If there never was such an argument.
    """
    names = list(unknown)
    if told := renamed_options(names):
        raise UserError(f"{owner}: {told}")
    if names:
        raise TypeError(f"{owner}() got an unexpected keyword argument {names[0]!r}")

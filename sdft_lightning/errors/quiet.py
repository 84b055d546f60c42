"""Keeps known and harmless notices of the libraries off the user's screen."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from typing import Any

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

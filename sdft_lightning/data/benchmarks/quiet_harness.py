"""The harness without its progress bars and remarks."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep the harness's progress bars and remarks out of the way of the run's own."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)

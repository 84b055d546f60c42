"""The same grades for the same answers, also from the harness's graders that draw numbers."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SEED = 1234


@contextmanager
def seeded_grading() -> Iterator[None]:
    """Fix what graders draw, and put the random state back after them.

    IFEval guesses an answer's language with langdetect, which without a seed may take the same
    short text for another language the next time, and draws what an instruction leaves open.
    """
    state = random.getstate()
    random.seed(_SEED)
    langdetect = sys.modules.get("langdetect")  # loaded with the tasks that need it
    factory = getattr(langdetect, "DetectorFactory", None)
    seed = getattr(factory, "seed", None)
    if factory is not None:
        factory.seed = _SEED
    try:
        yield
    finally:
        random.setstate(state)
        if factory is not None:
            factory.seed = seed

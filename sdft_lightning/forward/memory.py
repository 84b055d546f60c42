"""Freed memory that the C library keeps, given back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back_memory() -> None:
    """Return freed memory to the system where the C library can (glibc); else do nothing.

    What a rollout has freed lies in pieces between what lives on, and what comes next does not fit
    into them. A call takes some hundredths of a second.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)

"""Freed memory goes back to the system where the C library can do it."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from sdft_lightning.rollout.student import give_back_memory

CPU = torch.device("cpu")
HAS_TRIM = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


def resident() -> int:
    """Pages of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])


@pytest.mark.skipif(not HAS_TRIM, reason="the C library has no malloc_trim")
def test_pieces_between_what_lives_on_are_given_back() -> None:
    give_back_memory(CPU)
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size = 100_000  # from the heap, not by mmap
    pieces = [libc.malloc(size) for _ in range(400)]
    for piece in pieces:
        ctypes.memset(piece, 1, size)
    for piece in pieces[:-1]:
        libc.free(piece)  # below one that lives on, so that the heap cannot shrink
    before = resident()
    give_back_memory(CPU)
    assert resident() < before - 5000  # of 9700 pages
    libc.free(pieces[-1])


def test_other_systems_and_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", None)
    give_back_memory(CPU)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())  # musl
    give_back_memory(CPU)


def test_a_gpu_gets_its_cached_blocks_back_and_is_left_alone_by_rollouts_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    emptied: list[None] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(None))
    give_back_memory(CPU)
    assert not emptied
    give_back_memory(torch.device("cuda", 0))
    assert len(emptied) == 1

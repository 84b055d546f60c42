"""Peak memory of the bounded-memory loss, each measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Inputs are filled in place, so that no temporary raises the peak before the measurement. The
# peak is read from /proc, reset just before the loss: libraries may have peaked while loading.
SCRIPT = """
import sys
import torch
from sdft_lightning.losses.bounded import bounded_divergence
from sdft_lightning.losses.divergence import Divergence
from sdft_lightning.types import OutputHead

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

tokens, vocabulary, size = map(int, sys.argv[1:])
torch.manual_seed(0)
weight = torch.empty(vocabulary, size).normal_(std=0.02).requires_grad_()
teacher_weight = torch.empty(vocabulary, size).normal_(std=0.02)
hidden = torch.empty(tokens, size).normal_().requires_grad_()
teacher_hidden = torch.empty(tokens, size).normal_()
token_ids = torch.randint(0, vocabulary, (tokens,))
token_weights = torch.full((tokens,), 1 / tokens)
gradients = 4 * (weight.numel() + hidden.numel())
try:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
except OSError:  # then the peak is that of the whole process, which is no less
    pass
before = status("VmRSS")
loss, _ = bounded_divergence(
    teacher_hidden, OutputHead(teacher_weight, None, 1.0, None),
    hidden, OutputHead(weight, None, 1.0, None),
    token_ids, token_weights, Divergence(),
)
loss.backward()
assert loss.isfinite() and weight.grad.abs().sum() > 0
print(status("VmHWM") - before - gradients)
"""


# glibc keeps freed blocks of a few MB for later, in amounts that vary from run to run; with this
# limit it gives them back, and the peak is that of the tensors alone.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


def extra_bytes(
    tokens: int, vocabulary: int, size: int, timeout: int, environment: dict[str, str]
) -> int:
    """Peak beyond inputs, weights and one set of gradients."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the peak is read from /proc, which is there on Linux only")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tokens), str(vocabulary), str(size)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_peak_memory_does_not_grow_with_the_number_of_tokens() -> None:
    few, many = (extra_bytes(tokens, 16_000, 64, 120, EXACT) for tokens in (1024, 4096))
    # All logits of one role would take 66 MB and 262 MB; one chunk takes 33 MB.
    assert many < few + 2e6
    assert many < 250e6


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_peak_memory_at_the_vocabulary_of_qwen_is_below_one_gigabyte() -> None:
    threads = {"OMP_NUM_THREADS": "2"}
    assert extra_bytes(4096, 151_936, 896, 1200, threads) < 1.0e9

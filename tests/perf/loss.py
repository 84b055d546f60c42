"""Time one loss, forward and backward: `python tests/perf/loss.py plain|bounded N V D`."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sdft_lightning.losses.bounded import bounded_divergence
from sdft_lightning.losses.divergence import Divergence, forward_kl
from sdft_lightning.types import OutputHead

REPEATS = 2  # once only where N is so large that memory is what is asked for
MANY_TOKENS = 4096


def status_gigabytes(name: str) -> float:
    """A line of /proc/self/status, in GB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e9


def plain(
    teacher: Tensor, teacher_weight: Tensor, student: Tensor, weight: Tensor, ids: Tensor
) -> Tensor:
    """All N · V logits at once, and what our loss logs from the same pass."""
    with torch.no_grad():
        teacher_logits = teacher @ teacher_weight.T  # (N, V)
    student_logits = student @ weight.T  # (N, V)
    loss = forward_kl(teacher_logits, student_logits).mean()
    with torch.no_grad():
        for logits in (teacher_logits, student_logits):
            log_probs = logits.log_softmax(dim=-1)  # (N, V)
            -(log_probs.exp() * log_probs).sum(dim=-1)  # (N,) entropy
            log_probs.gather(-1, ids.unsqueeze(-1))  # (N, 1)
        (teacher_logits.argmax(dim=-1) == student_logits.argmax(dim=-1)).float()
    return loss


def bounded(
    teacher: Tensor, teacher_weight: Tensor, student: Tensor, weight: Tensor, ids: Tensor
) -> Tensor:
    """Ours."""
    loss, _ = bounded_divergence(
        teacher,
        OutputHead(teacher_weight, None, 1.0, None),
        student,
        OutputHead(weight, None, 1.0, None),
        ids,
        torch.full(ids.shape, 1 / ids.numel()),
        Divergence(),
    )
    return loss


def main(kind: str, tokens: int, vocabulary: int, size: int) -> None:
    """Print the median seconds, and the peak beyond inputs, weights and gradients."""
    torch.manual_seed(0)
    weight = torch.empty(vocabulary, size).normal_(std=0.02).requires_grad_()
    teacher_weight = torch.empty(vocabulary, size).normal_(std=0.02)
    student = torch.empty(tokens, size).normal_().requires_grad_()
    teacher = torch.empty(tokens, size).normal_()
    ids = torch.randint(0, vocabulary, (tokens,))
    with suppress(OSError):  # then the peak is that of the whole process, which is no less
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status_gigabytes("VmRSS")
    seconds, values = [], []
    for _ in range(1 if tokens >= MANY_TOKENS else REPEATS):
        weight.grad = student.grad = None
        start = time.perf_counter()
        loss: Any = {"plain": plain, "bounded": bounded}[kind](
            teacher, teacher_weight, student, weight, ids
        )
        loss.backward()
        seconds.append(time.perf_counter() - start)
        values.append(float(loss.detach()))
    gradients = 4 * (weight.numel() + student.numel()) / 1e9
    extra = status_gigabytes("VmHWM") - before - gradients
    figures = {"seconds": median(seconds), "extra_gigabytes": extra, "loss": values[-1]}
    print("RESULT " + json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], *(int(number) for number in sys.argv[2:]))

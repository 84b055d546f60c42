"""The loss in the chunks of a GPU, computed on the CPU, is the loss in the CPU's chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.losses import bounded
from sdft_lightning.losses.bounded import bounded_cross_entropy, bounded_divergence
from sdft_lightning.losses.divergence import Divergence
from sdft_lightning.rollout import mismatch
from sdft_lightning.rollout.mismatch import trained_log_probs
from sdft_lightning.rollout.sampling import Sampling
from sdft_lightning.types import OutputHead

# A vocabulary that the two devices cut differently in every way, and two chunks' worth of tokens.
N, D, V = 100, 8, 50_000
LOSSES = {
    "forward_kl": Divergence(),  # its gradient is written down
    "reverse_kl": Divergence("reverse_kl"),  # autograd's
    "cross_entropy": None,
}


def parts(
    dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, OutputHead, Tensor, OutputHead, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    heads = [OutputHead(random(V, D).requires_grad_(), None, 1.0, None) for _ in range(2)]
    ids = torch.randint(0, V, (N,), generator=generator)
    weights = torch.rand(N, generator=generator)
    hidden = [random(N, D) for _ in range(2)]
    ids, weights = ids.to(device), weights.to(device)
    return hidden[0], heads[0], hidden[1].requires_grad_(), heads[1], ids, weights


def computed(name: str, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """The loss, its gradients and the statistics."""
    taught, teacher, hidden, head, ids, weights = parts(dtype, device)
    divergence = LOSSES[name]
    if divergence is None:
        loss, tokens = bounded_cross_entropy(hidden, head, ids, weights)
    else:
        loss, tokens = bounded_divergence(
            taught, teacher, hidden, head, ids, weights, divergence, 0.9
        )
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, head.weight]), *tokens]


def as_on_a_gpu(sizes: dict[str, int], device: str) -> int:
    return sizes["cuda"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(LOSSES))
def test_the_chunks_of_a_gpu_give_the_same(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, bfloat16_products: None
) -> None:
    calls: list[int] = []
    chunk = bounded._chunk

    def counted(*args: Any) -> Any:
        calls.append(args[2].stop - args[2].start)
        return chunk(*args)

    monkeypatch.setattr(bounded, "_chunk", counted)
    expected = computed(name, dtype)
    on_cpu, calls[:] = list(calls), []
    monkeypatch.setattr(bounded, "by_device", as_on_a_gpu)
    found = computed(name, dtype)
    assert calls == [N]  # whole
    assert len(on_cpu) == (2 if name == "reverse_kl" else 1)  # walked over in pieces otherwise
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, plain in zip(found, expected, strict=True):
        limit = tolerance * float(plain.abs().max())
        torch.testing.assert_close(ours, plain, rtol=0, atol=limit)


def test_log_probs_of_sampled_tokens_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, hidden, head, ids, _ = parts(torch.float32)
    given = (hidden, head, ids, Sampling(temperature=0.9), False)
    expected = trained_log_probs(*given)
    monkeypatch.setattr(mismatch, "by_device", as_on_a_gpu)
    torch.testing.assert_close(trained_log_probs(*given), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", list(LOSSES))
def test_a_gpu_gives_the_same(name: str) -> None:
    expected = computed(name, torch.float32)
    for ours, plain in zip(computed(name, torch.float32, "cuda"), expected, strict=True):
        limit = 1e-4 * float(plain.abs().max())
        torch.testing.assert_close(ours.cpu(), plain, rtol=0, atol=limit)

"""What makes the host wait for a GPU, counted: at most once for each token of a rollout."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sdft_lightning.forward.fused import (
    BufferedSteps,
    DecodingKind,
    choose_decoding_,
    decoding,
)
from sdft_lightning.rollout import Sampling, decode_mode
from sdft_lightning.rollout import generate as generate_file
from sdft_lightning.rollout.generate import generate_rollout
from sdft_lightning.rollout.sampling import row_uniforms
from sdft_lightning.types import Rollout, Tokens

# Operators whose result has a size or a value that the host needs.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
# Calls that copy between host and device, which on a CPU reach no operator.
COPYING = ("cpu", "tolist", "numpy", "tensor", "as_tensor", "from_numpy")


class Waits(TorchDispatchMode):
    """Counts operators that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0].strip("_")
        if any(name.startswith(each.strip("_")) for each in WAITING):
            self.found[name] += 1
        if name in ("index", "index_put"):
            masks = [each for each in args[1] if each is not None and each.dtype == torch.bool]
            self.found["index by a mask"] += len(masks)
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Counts calls that copy between host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in COPYING:
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted(model: Any, steps: int, sampling: dict[str, Any], uniform: bool) -> tuple[int, Rollout]:
    """How often the loop makes the host wait, what the model computes left out; the rollout."""
    prompts = torch.arange(20, 60).view(8, 5)
    options = Sampling(max_new_tokens=steps, completions_per_prompt=2, **sampling)
    numbers = row_uniforms(1, 0, [str(row) for row in range(8)], 2, steps) if uniform else None
    waits, copies = Waits(), Copies()
    total, begin = 0, generate_file.prefill

    def prefill(*args: Any) -> Any:
        decoding = begin(*args)
        waits.found.clear()
        copies.found.clear()
        for name in ("step", "keep", "finish"):
            setattr(decoding, name, not_counting(getattr(decoding, name)))
        return decoding

    def not_counting(call: Any) -> Any:
        def called(*args: Any) -> Any:
            nonlocal total
            total += waits.found.total() + copies.found.total()
            result = call(*args)
            waits.found.clear()
            copies.found.clear()
            return result

        return called

    with pytest.MonkeyPatch.context() as patch, copies, waits:
        patch.setattr(generate_file, "prefill", prefill)
        stops = list(range(1, 60))
        mask = torch.ones_like(prompts).bool()
        rollout = generate_rollout(model, Tokens(prompts, mask), options, numbers, stops, 0)
    return total, rollout


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}])
def test_the_host_waits_at_most_once_a_token(
    model: Any, sampling: dict[str, Any], uniform: bool
) -> None:
    total, rollout = counted(model, 40, sampling, uniform)
    lengths: Tensor = rollout.completion_mask.sum(dim=1)
    assert int(lengths.max()) > 10
    if uniform:  # rows end at different times, and are dropped
        assert len(lengths.unique()) > 4
    assert 0 < total <= int(lengths.max())


def test_steps_on_buffers_wait_for_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_BUFFERED_ON", ("cpu",))
    monkeypatch.setattr(decoding, "_MORE_COLUMNS", 8)
    monkeypatch.setattr(decode_mode, "can_pack", lambda *args: False)
    waits, copies, steps = Waits(), Copies(), 0
    step = BufferedSteps.step

    def counted_step(self: BufferedSteps, tokens: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        with copies, waits:
            return step(self, tokens)

    monkeypatch.setattr(BufferedSteps, "step", counted_step)
    mask = torch.ones(8, 5).bool()
    prompts = Tokens(torch.arange(20, 60).view(8, 5), mask)
    numbers = row_uniforms(1, 0, [str(row) for row in range(8)], 1, 30)
    generate_rollout(model, prompts, Sampling(max_new_tokens=30), numbers, [1], 0)
    assert steps > 20
    assert waits.found.total() + copies.found.total() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", get_args(DecodingKind))
def test_a_gpu_waits_at_most_once_a_token(model: Any, kind: DecodingKind) -> None:
    model.cuda()
    choose_decoding_(model, kind)
    prompts = Tokens(torch.arange(20, 60).view(8, 5).cuda(), torch.ones(8, 5).bool().cuda())

    def waits(tokens: int) -> int:
        numbers = row_uniforms(1, 0, [str(row) for row in range(8)], 1, tokens)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                generate_rollout(model, prompts, Sampling(max_new_tokens=tokens), numbers, [-1], 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(each.message) for each in seen)

    waits(4)
    short, long = waits(20), waits(40)
    assert 0 < short
    assert long - short <= 20


def test_the_counter_sees_what_waits() -> None:
    values = torch.arange(4)
    waits, copies = Waits(), Copies()
    with copies, waits:
        int(values.sum())
        values[values > 1]
        values[values > 1] = 0
        (values > 1).nonzero()
        values.cpu()
        torch.tensor([1])
    assert waits.found.total() >= 4
    assert copies.found == {"cpu": 1, "tensor": 1}

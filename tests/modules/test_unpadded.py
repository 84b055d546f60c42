"""Training passes without padding and masks, for attention kernels that take lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from sdft_lightning.forward.forward_paths import paths_of
from sdft_lightning.forward.fused import decoding
from sdft_lightning.forward.hidden import completion_hidden_states
from sdft_lightning.forward.layout import takes_lengths
from sdft_lightning.modules import SDFTModule
from sdft_lightning.rollout import Sampling, decode_mode, generate_rollout
from sdft_lightning.rollout.sampling import row_uniforms
from sdft_lightning.teacher import EMATeacher, FrozenTeacher, LiveTeacher
from sdft_lightning.types import Rollout, Tokens

HALF, ANY, DEAF, DENSE = "varlen_half", "varlen_any", "varlen_deaf", "varlen_dense"


class Call(NamedTuple):
    """What a kernel was given: a batch of rows with a mask, or one row and lengths."""

    masked: bool
    lengths: list[int] | None
    tokens: int


CALLS: list[Call] = []


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """`(H, Q, E)` of one sequence, whose last Q tokens ask."""
    first = key.shape[1] - query.shape[1]
    seen = torch.ones(query.shape[1], key.shape[1]).tril(first).bool()
    found = scaled_dot_product_attention(
        query[None], key[None], value[None], seen, scale=scaling, enable_gqa=True
    )
    return found[0]


def unpadded(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Flash attention's contract: lengths, or a mask of padding, never one of scores."""
    if mask is not None and mask.dim() != 2:
        raise RuntimeError("a dense mask")
    ends, scaling = options.get("cu_seq_lens_q"), options.get("scaling")
    CALLS.append(Call(mask is not None, None if ends is None else ends.tolist(), query.shape[2]))
    if ends is not None:
        assert query.shape[0] == 1
        assert options["max_length_k"] == int(ends.diff().max())
        pieces = [slice(*pair) for pair in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
        both = [[each[0, :, at] for each in (query, key, value)] for at in pieces]
        parts = [attend(q, k, v, scaling) for q, k, v in both]
        return torch.cat(parts, dim=1).transpose(0, 1)[None], None
    rows = []
    for row, (q, k, v) in enumerate(zip(query, key, value, strict=True)):
        seen = torch.ones(k.shape[1]).bool() if mask is None else mask[row].bool()
        asks = seen[-q.shape[1] :]
        found = torch.zeros_like(q)
        found[:, asks] = attend(q[:, asks], k[:, seen], v[:, seen], scaling)
        rows.append(found.transpose(0, 1))
    return torch.stack(rows), None


def half_only(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
    """Casts back what rotary positions have promoted, like transformers' flash attention."""
    dtype = get_target_dtype(q, module) or q.dtype
    if dtype == torch.float32:
        raise RuntimeError("only supports fp16 and bf16")
    return unpadded(module, q.to(dtype), k.to(dtype), v.to(dtype), *args, **options)


def deaf(*args: Any, cu_seq_lens_q: Any = None, **options: Any) -> Any:
    """Reads over the end of each sequence."""
    return unpadded(*args, **options)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    CALLS.clear()
    kernels = {HALF: half_only, ANY: unpadded, DEAF: deaf, DENSE: half_only}
    for name, kernel in kernels.items():
        AttentionInterface.register(name, kernel)
        AttentionMaskInterface.register(name, sdpa_mask if name == DENSE else flash_attention_mask)
    yield
    for name in kernels:
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


PROMPTS, COMPLETIONS = [9, 2, 5, 1], [3, 7, 1, 6]


def batch() -> tuple[Tokens, Tokens]:
    """Rows of unequal lengths; the first completion ends without its last tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 260, (4, 9), generator=generator)
    answers = torch.randint(5, 260, (4, 7), generator=generator)
    columns = torch.arange(9)
    mask = columns >= 9 - torch.tensor(PROMPTS).unsqueeze(1)
    kept = torch.arange(7) < torch.tensor(COMPLETIONS).unsqueeze(1)
    return Tokens(ids, mask), Tokens(answers, kept)


def pass_of(model: Any, kernel: str) -> tuple[Tensor, Tensor]:
    """Hidden states and gradients of one pass without fused blocks."""
    model.set_attn_implementation(kernel)
    paths_of(model)
    CALLS.clear()
    prompts, completions = batch()
    model.zero_grad()
    hidden = completion_hidden_states(
        model, prompts, completions, completions.mask, pack=kernel != "sdpa", fuse=False
    )
    hidden.float().square().sum().backward()
    found = [each.grad.float().flatten() for each in model.base_model.parameters()]
    return hidden.detach().float(), torch.cat(found)


def test_states_and_gradients_are_those_of_padded_rows(model: Any) -> None:
    plain, plain_grads = pass_of(model, "sdpa")
    model.__dict__.pop("_sdft_forward_paths")
    ours, grads = pass_of(model, ANY)
    lengths = [
        prompt + completion - 1 for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    ends = [sum(lengths[:place]) for place in range(5)]
    assert CALLS == [Call(False, ends, sum(lengths))] * 2  # a call for each layer
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads, plain_grads, atol=1e-4, rtol=1e-4)


def test_recomputed_activations_are_told_the_lengths_again(model: Any) -> None:
    _, plain_grads = pass_of(model, ANY)
    model.train().gradient_checkpointing_enable()
    _, grads = pass_of(model, ANY)
    assert len(CALLS) == 4  # two layers, forward and again
    assert all(call.lengths is not None for call in CALLS)
    torch.testing.assert_close(grads, plain_grads)


def test_in_bfloat16_they_are_within_its_noise(model: Any) -> None:
    model.bfloat16()
    plain, plain_grads = pass_of(model, "sdpa")
    model.__dict__.pop("_sdft_forward_paths")
    ours, grads = pass_of(model, HALF)
    assert [call.lengths is not None for call in CALLS] == [True, True]
    for mine, theirs in ((ours, plain), (grads, plain_grads)):
        assert (mine - theirs).norm() / theirs.norm() < 0.02


@pytest.mark.parametrize("kernel", [DEAF, DENSE, "sdpa", "eager"])
def test_a_kernel_that_takes_no_lengths_gets_none(model: Any, kernel: str) -> None:
    model.bfloat16().set_attn_implementation(kernel)
    assert not takes_lengths(model)
    assert paths_of(model).ends_to_end is (kernel in ("sdpa", "eager"))


@pytest.mark.parametrize("teacher", [EMATeacher, FrozenTeacher, LiveTeacher])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_whole_step_passes_through_without_padding(
    precision: str, teacher: Any, fit_module: Callable[..., Any]
) -> None:
    before: dict[str, Tensor] = {}
    passes: list[Call] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        before["first"] = parameters[0].detach().clone()
        return torch.optim.SGD(parameters, lr=1.0)

    class Watched(SDFTModule):
        def student_hidden(self, *args: Any) -> Tensor:
            paths_of(self.teacher.network)  # else found out with the teacher's first pass
            CALLS.clear()
            return super().student_hidden(*args)

        def teacher_hidden(self, *args: Any) -> Tensor:
            found = super().teacher_hidden(*args)
            passes.extend(CALLS)  # both roles'
            return found

    module = fit_module(
        Watched,
        model={
            "policy": {"attn_implementation": HALF},
            "optimizer": optimizer,
            "teacher": teacher(),
        },
        precision=precision,
    )
    assert len(passes) == 4  # two layers, two roles
    assert all(call.lengths is not None and not call.masked for call in passes)
    assert all(len(call.lengths or []) == 3 for call in passes)  # two sequences
    assert not torch.equal(next(module.student.parameters()), before["first"])


@pytest.mark.parametrize("kernel", [ANY, HALF])
def test_rollouts_read_prompts_without_padding_and_mask(
    model: Any, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sampled(kernel: str) -> Rollout:
        model.set_attn_implementation(kernel)
        model.__dict__.pop("_sdft_forward_paths", None)
        paths_of(model)
        CALLS.clear()
        sampling = Sampling(max_new_tokens=6, completions_per_prompt=2)
        numbers = row_uniforms(0, 0, ["a", "b", "c", "d"], 2, 6)
        stops = list(range(60))
        return generate_rollout(model, batch()[0], sampling, numbers, stops, 0)

    monkeypatch.setattr(decoding, "_BUFFERED_ON", ("cpu",))
    monkeypatch.setattr(decode_mode, "can_pack", lambda *args: False)
    if kernel == HALF:
        model.bfloat16()
        expected = None
    else:
        expected = sampled("sdpa")
    found = sampled(kernel)
    ends = [sum(PROMPTS[:place]) for place in range(5)]
    assert CALLS == [Call(False, ends, sum(PROMPTS))] * 2  # a call for each layer, none for tokens
    assert found.completion_mask.sum() > 8
    if expected is not None:
        assert torch.equal(found.completion_ids, expected.completion_ids)
        torch.testing.assert_close(
            found.sampled_log_probs, expected.sampled_log_probs, atol=1e-4, rtol=1e-4
        )

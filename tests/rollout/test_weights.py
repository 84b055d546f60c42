"""The bfloat16 copy that completions are sampled from follows the student."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdft_lightning.forward.forward_paths import paths_of
from sdft_lightning.rollout import Sampling, StudentPasses, generate_rollout
from sdft_lightning.rollout import student as student_file
from sdft_lightning.types import Tokens


@torch.no_grad()
def move_(model: nn.Module, by: float = 0.5) -> None:
    for parameter in model.parameters():
        parameter.add_(by)


def equals_student(copied: Any, student: nn.Module) -> bool:
    pairs = zip(copied.parameters(), student.parameters(), strict=True)
    return all(torch.equal(mine, theirs.to(torch.bfloat16)) for mine, theirs in pairs)


def test_the_copy_is_bfloat16_in_eval_mode_and_the_student_stays_as_it_is(model: Any) -> None:
    model.train()
    copied = StudentPasses("bfloat16").at(model, 0).sampler()
    assert copied is not model
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in copied.modules())
    assert not any(p.requires_grad for p in copied.parameters())
    assert equals_student(copied, model)
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


class Created(TorchDispatchMode):
    """Counts the elements of new memory by dtype."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.elements: Counter[torch.dtype] = Counter()
        self.found = [each.untyped_storage() for each in known.parameters()]  # kept alive

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            places = {storage.data_ptr() for storage in self.found}
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in places:
                self.elements[each.dtype] += each.numel()
                self.found.append(each.untyped_storage())
        return made


def test_no_float32_copy_is_made_on_the_way_to_the_bfloat16_one(model: Any) -> None:
    weights = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() for buffer in model.buffers())
    paths_of(model)  # which computes some tokens
    with Created(model) as created:
        copied = StudentPasses("bfloat16").at(model, 0).sampler()
    assert equals_student(copied, model)
    assert created.elements[torch.bfloat16] >= weights
    assert created.elements[torch.float32] <= buffers
    assert {id(each) for each in copied.parameters()}.isdisjoint(map(id, model.parameters()))


def test_the_copy_of_a_bfloat16_part_is_a_tensor_of_its_own(model: Any) -> None:
    model.model.norm.weight.data = model.model.norm.weight.data.to(torch.bfloat16)
    copied = StudentPasses("bfloat16").at(model, 0).sampler()
    assert copied.model.norm.weight.data_ptr() != model.model.norm.weight.data_ptr()


def test_the_copy_is_refreshed_when_step_or_weights_have_changed_and_only_then(
    model: Any,
) -> None:
    weights = StudentPasses("bfloat16")
    first = weights.at(model, 0).sampler()
    with torch.no_grad():
        next(model.parameters()).data.add_(0.5)  # as optimizers that go past the counter of writes
    assert weights.at(model, 0).sampler() is first
    assert not equals_student(first, model)
    assert weights.at(model, 1).sampler() is first
    assert equals_student(first, model)
    move_(model)
    assert weights.at(model, 1).sampler() is first
    assert equals_student(first, model)


def test_a_forgotten_copy_is_made_anew(model: Any) -> None:
    weights = StudentPasses("bfloat16")
    weights.at(model, 0).sampler()
    move_(model)  # as when a checkpoint of the same step is loaded
    weights.forget()
    assert equals_student(weights.at(model, 0).sampler(), model)


def test_the_copy_is_no_part_of_the_module_that_holds_it(model: Any) -> None:
    parent = nn.Module()
    parent.student = model
    parent.weights = StudentPasses("bfloat16")
    names = list(parent.state_dict())
    copied = parent.weights.at(model, 0).sampler()
    assert all(module is not copied for module in parent.modules())
    assert list(parent.state_dict()) == names
    parent.train()
    assert not copied.training


@pytest.mark.parametrize("first_inside", [True, False])
def test_a_copy_made_in_inference_mode_can_be_refreshed_outside(
    model: Any, first_inside: bool
) -> None:
    weights = StudentPasses("bfloat16")
    for step in range(3):  # validation before, between and after training steps
        with torch.inference_mode((step % 2 == 0) == first_inside):
            copied = weights.at(model, step).sampler()
            assert equals_student(copied, model)
        move_(model)
    assert not any(p.is_inference() for p in copied.parameters())


def test_tied_weights_stay_tied_after_a_refresh(model: Any) -> None:
    weights = StudentPasses("bfloat16")
    weights.at(model, 0).sampler()
    move_(model)
    copied = weights.at(model, 1).sampler()
    assert copied.get_input_embeddings().weight is copied.get_output_embeddings().weight


def test_rotary_frequencies_are_not_rounded(model: Any) -> None:
    # In bfloat16 they are off by up to 0.2 %: more than a radian at position 1000.
    copied = StudentPasses("bfloat16").at(model, 0).sampler()
    exact = dict(model.named_buffers())
    assert exact
    for name, buffer in copied.named_buffers():
        assert torch.equal(buffer.float(), exact[name].float()), name


def test_same_takes_the_student_itself(model: Any) -> None:
    assert StudentPasses("same").at(model, 0).sampler() is model
    low = model.to(torch.bfloat16)
    assert StudentPasses("bfloat16").at(low, 0).sampler() is low


@pytest.mark.parametrize("native", [True, False])
def test_auto_takes_the_copy_where_the_hardware_has_bfloat16(
    model: Any, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student_file, "has_native_bfloat16", lambda device: native)
    assert (StudentPasses("auto").at(model, 0).sampler() is not model) == native


def test_completions_are_sampled_from_the_copy(model: Any) -> None:
    copied = StudentPasses("bfloat16").at(model, 0).sampler()
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(ids).bool()
    numbers = torch.rand(1, 4, dtype=torch.float64)
    rollout = generate_rollout(
        copied, Tokens(ids, mask), Sampling(max_new_tokens=4), numbers, [2], 2
    )
    assert rollout.completion_ids.shape[1] <= 4
    assert rollout.sampled_log_probs.dtype == torch.float32

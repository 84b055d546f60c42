"""The training step against a transcription of METHOD §1 in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import Policy
from sdft_lightning.losses.divergence import Divergence
from sdft_lightning.modules import OfflineDistillationModule, ReinvokeModule, SDFTModule
from sdft_lightning.modules.window import distinct_bigrams
from sdft_lightning.rollout import Sampling
from sdft_lightning.rollout.sampling import row_uniforms
from sdft_lightning.types import PromptBatch, Rollout, Tokens

FitModule = Callable[..., Any]


class Recorder(L.Callback):
    """Keeps batch, rollout, loss and gradients of each micro-batch."""

    def __init__(self) -> None:
        self.batches: list[PromptBatch] = []
        self.rollouts: list[Rollout] = []
        self.losses: list[float] = []
        self.steps: list[int] = []
        self.gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.gradients = {
            name: parameter.grad.double().clone()
            for name, parameter in module.student.named_parameters()
        }

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.batches.append(args[0])
        self.rollouts.append(outputs["rollout"])
        # Lightning hands the loss on divided by the length of the window.
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)


def completion_log_probs(
    model: Any, prompt_ids: Tensor, completion: Tensor, temperature: float
) -> Tensor:
    """Log-probabilities `(T, V)` of all tokens at each place of one completion; no padding."""
    ids = torch.cat([prompt_ids, completion]).unsqueeze(0)  # (1, P + T)
    logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]  # (T, V)
    return torch.log_softmax(logits / temperature, dim=-1)


def paper_divergence(name: str, teacher: Tensor, student: Tensor) -> Tensor:
    """`(T,)` of log-probabilities `(T, V)`."""
    if name == "forward_kl":
        return (teacher.exp() * (teacher - student)).sum(-1)
    return (student.exp() * (student - teacher)).sum(-1)


def paper_loss(
    student: Any, teacher: Any, recorder: Recorder, name: str, temperature: float, skip: int
) -> Tensor:
    """METHOD §1, row by row: mean over the tokens of a completion, then over completions."""
    batch, rollout = recorder.batches[0], recorder.rollouts[0]
    samples = rollout.completion_ids.shape[0] // batch.prompt_ids.shape[0]
    rows = []
    for r, (ids, mask) in enumerate(
        zip(rollout.completion_ids, rollout.completion_mask, strict=True)
    ):
        b = r // samples
        completion = ids[mask]  # (T,)
        prompt = batch.prompt_ids[b][batch.prompt_mask[b]]
        shown = batch.teacher_prompt_ids[b][batch.teacher_prompt_mask[b]]
        with torch.no_grad():
            of_teacher = completion_log_probs(teacher, shown, completion, temperature)
        of_student = completion_log_probs(student, prompt, completion, temperature)
        per_token = paper_divergence(name, of_teacher, of_student)[skip:]
        rows.append(per_token.sum() / max(1, len(per_token)))
    return torch.stack(rows).mean()


@pytest.mark.parametrize(
    ("name", "temperature", "skip", "samples"),
    [
        ("forward_kl", 1.0, 0, 1),
        ("forward_kl", 0.7, 3, 1),
        ("forward_kl", 1.0, 0, 3),
        ("reverse_kl", 1.3, 2, 2),
    ],
)
def test_loss_and_gradient_of_a_step_equal_the_papers_formula_in_float64(
    name: Any, temperature: float, skip: int, samples: int, fit_module: FitModule, model: Any
) -> None:
    recorder = Recorder()
    fit_module(
        model={
            "sampling": Sampling(8, temperature=temperature, completions_per_prompt=samples),
            "divergence": Divergence(name),
            "num_loss_tokens_to_skip": skip,
        },
        data={"batch_size": 4},
        callbacks=[recorder],
    )
    student = copy.deepcopy(model).double().train()
    loss = paper_loss(student, model.double(), recorder, name, temperature, skip)
    loss.backward()

    assert recorder.rollouts[0].completion_ids.shape[0] == 4 * samples
    assert recorder.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert loss.item() > 0.01
    expected = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    found = torch.cat(
        [recorder.gradients[name].flatten() for name, _ in student.named_parameters()]
    )
    assert torch.cosine_similarity(found, expected, dim=0) > 1 - 1e-8
    assert float(found.norm() / expected.norm()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("from_teacher", [False, True])
def test_completions_are_the_inverse_cdf_of_the_right_roles_distribution(
    from_teacher: bool, fit_module: FitModule, model: Any
) -> None:
    recorder = Recorder()
    fit_module(
        model={
            "sampling": Sampling(8, temperature=0.9, completions_per_prompt=2),
            "generate_from_teacher": from_teacher,
            "seed": 5,
        },
        callbacks=[recorder],
    )
    batch, rollout = recorder.batches[0], recorder.rollouts[0]
    numbers = row_uniforms(5, 0, [row.id for row in batch.rows], 2, 8)  # (R, T)
    prompts = batch.teacher_prompt_ids if from_teacher else batch.prompt_ids
    masks = batch.teacher_prompt_mask if from_teacher else batch.prompt_mask
    for r in range(4):
        completion = rollout.completion_ids[r][rollout.completion_mask[r]]
        prompt = prompts[r // 2][masks[r // 2]]
        with torch.no_grad():
            log_probs = completion_log_probs(model.double(), prompt, completion, 0.9)  # (T, V)
        below = log_probs.exp().cumsum(-1) <= numbers[r, : len(completion), None]  # (T, V)
        assert below.sum(-1).tolist() == completion.tolist()
    assert not torch.equal(rollout.completion_ids[0], rollout.completion_ids[1])


class OneByOne(SDFTModule):
    """Samples each micro-batch on its own."""

    def on_before_batch_transfer(self, batch: PromptBatch, dataloader_idx: int) -> PromptBatch:
        return batch._replace(window=[])


def test_accumulation_window_is_sampled_at_once_and_completes_as_one_by_one(
    fit_module: FitModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sdft_lightning.rollout.student as file_of_passes

    sizes: list[int] = []
    generate = file_of_passes.generate_rollout

    def counted(model: Any, prompts: Tokens, *args: Any, **more: Any) -> Rollout:
        sizes.append(len(prompts.ids))
        return generate(model, prompts, *args, **more)

    monkeypatch.setattr(file_of_passes, "generate_rollout", counted)
    together, apart = Recorder(), Recorder()
    options = {"accumulate_grad_batches": 3, "max_steps": 3}
    fit_module(callbacks=[together], **options)
    assert sizes == [6, 6, 6]
    sizes.clear()
    fit_module(OneByOne, callbacks=[apart], **options)
    assert sizes == [2] * 9
    assert together.steps == apart.steps == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for one, other in zip(together.rollouts, apart.rollouts, strict=True):
        assert torch.equal(one.completion_ids, other.completion_ids)
        assert torch.equal(one.completion_mask, other.completion_mask)


def test_two_micro_batches_of_two_train_as_one_batch_of_four(fit_module: FitModule) -> None:
    halves, whole = Recorder(), Recorder()
    first = fit_module(accumulate_grad_batches=2, max_steps=5, callbacks=[halves])
    second = fit_module(data={"batch_size": 4}, max_steps=5, callbacks=[whole])
    means = [(a + b) / 2 for a, b in zip(halves.losses[::2], halves.losses[1::2], strict=True)]
    assert len(means) == 5
    assert means == pytest.approx(whole.losses, abs=1e-4)
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


def test_bf16_mixed_trains_and_keeps_both_roles_in_float32(fit_module: FitModule) -> None:
    recorder = Recorder()
    module = fit_module(precision="bf16-mixed", max_steps=3, callbacks=[recorder])
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert all(math.isfinite(loss) and loss > 0 for loss in recorder.losses)


def test_completions_all_shorter_than_the_skip_give_zeros_not_nan_and_are_told_once(
    fit_module: FitModule, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nothing(self: Any, batch: Any, rollout: Rollout) -> Tensor:
        return torch.zeros_like(rollout.completion_mask)

    monkeypatch.setattr(SDFTModule, "loss_mask", nothing)
    recorder = Recorder()
    module = fit_module(max_steps=2, callbacks=[recorder])
    assert recorder.losses == [0.0, 0.0]
    assert float(module.trainer.callback_metrics["train/kl"]) == 0.0
    told = [record for record in caplog.records if "no token of a micro-batch" in record.message]
    assert len(told) == 1


def test_skip_that_leaves_no_token_of_any_completion_is_refused() -> None:
    with pytest.raises(UserError, match=r"num_loss_tokens_to_skip: got 8, .* at most 8 tokens"):
        SDFTModule(
            policy=Policy("embedded"),
            num_loss_tokens_to_skip=8,
            sampling=Sampling(max_new_tokens=8),
        )
    SDFTModule(
        policy=Policy("embedded"), num_loss_tokens_to_skip=7, sampling=Sampling(max_new_tokens=8)
    )


def test_distinct_bigrams_counts_pairs_inside_the_mask_only() -> None:
    ids = torch.tensor([[1, 2, 1, 2], [1, 2, 9, 9]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    assert distinct_bigrams(ids, mask) == pytest.approx(2 / 4)  # 12 21 12 | 12


SAMPLED_TOKEN = Divergence("reverse_kl", estimator="sampled_token")


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        (SDFTModule, {"generate_from_teacher": True}, r"model\.generate_from_teacher"),
        (OfflineDistillationModule, {}, r"OfflineDistillationModule.*model\.completions"),
        (OfflineDistillationModule, {"completions": "c.jsonl"}, "OfflineDistillationModule"),
        (SDFTModule, {"sampling": Sampling(top_p=0.9)}, r"model\.sampling\.top_p is 0\.9"),
        (SDFTModule, {"sampling": Sampling(top_k=20)}, r"model\.sampling\.top_k is 20"),
        (SDFTModule, {"sampling": Sampling(min_p=0.1)}, r"model\.sampling\.min_p is 0\.1"),
    ],
)
def test_sampled_token_is_refused_where_the_token_is_not_the_students_own_draw(
    method: Any, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=r"model\.divergence\.estimator.*" + named):
        method(divergence=SAMPLED_TOKEN, **options)
    method(divergence=Divergence("reverse_kl"), **options)


def test_sampled_token_takes_any_temperature() -> None:
    SDFTModule(divergence=SAMPLED_TOKEN, sampling=Sampling(temperature=0.7))
    ReinvokeModule(original=Policy("embedded"), divergence=SAMPLED_TOKEN)
    with pytest.raises(UserError, match=r"model\.sampling\.top_p"):
        ReinvokeModule(
            original=Policy("embedded"), divergence=SAMPLED_TOKEN, sampling=Sampling(top_p=0.9)
        )

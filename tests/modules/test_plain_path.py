"""Ten steps with everything that makes them fast, and ten written out plainly: the same losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sdft_lightning.forward import hidden, layout
from sdft_lightning.modules import SDFTModule
from sdft_lightning.rollout import Sampling, decode_mode, student
from sdft_lightning.rollout.sampling import row_uniforms
from sdft_lightning.teacher import EMATeacher, FrozenTeacher
from sdft_lightning.types import PromptBatch

STEPS, NEW_TOKENS, TEMPERATURE = 10, 12, 0.8


class PlainSDFT(SDFTModule):
    """METHOD §1 row by row: no padding, no cache, no window, all logits at once."""

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Any:
        step, losses, sampled = self.trainer.global_step, [], []
        for index, row in enumerate(batch.rows):
            prompt = batch.prompt_ids[index][batch.prompt_mask[index]]
            shown = batch.teacher_prompt_ids[index][batch.teacher_prompt_mask[index]]
            uniforms = row_uniforms(self.seed, step, [row.id], 1, NEW_TOKENS)[0]
            completion = self.sample(prompt, uniforms)  # (T,)
            student = log_probs(self.student, prompt, completion)  # (T, V)
            with torch.no_grad():
                teacher = log_probs(self.teacher.network, shown, completion)  # (T, V)
            losses.append((teacher.exp() * (teacher - student)).sum(dim=-1).mean())
            sampled.append(completion.tolist())
        return {"loss": torch.stack(losses).mean(), "sampled": sampled}

    @torch.no_grad()
    def sample(self, prompt: Tensor, uniforms: Tensor) -> Tensor:
        tokens: list[int] = []
        for number in uniforms:
            ids = torch.cat([prompt, torch.tensor(tokens, dtype=torch.long)])
            logits = self.student(input_ids=ids.unsqueeze(0)).logits[0, -1]
            probs = (logits.double() / TEMPERATURE).softmax(dim=-1)
            tokens.append(int((probs.cumsum(dim=-1) <= number).sum()))
            if tokens[-1] in self.stop_ids:
                break
        return torch.tensor(tokens)


def log_probs(model: Any, prompt: Tensor, completion: Tensor) -> Tensor:
    ids = torch.cat([prompt, completion]).unsqueeze(0)  # (1, P + T)
    logits = model(input_ids=ids).logits[0, prompt.numel() - 1 : -1]  # (T, V)
    found: Tensor = (logits / TEMPERATURE).log_softmax(dim=-1)
    return found


class Recorder(L.Callback):
    """Losses and sampled tokens of each micro-batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.sampled: list[list[int]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        module.stop_ids = list(range(7, 272, 7))  # so that rows end at different lengths

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        rollout = outputs.get("rollout")
        if rollout is None:
            self.sampled += outputs["sampled"]
        else:
            pairs = zip(rollout.completion_ids, rollout.completion_mask, strict=True)
            self.sampled += [ids[mask].tolist() for ids, mask in pairs]


@pytest.mark.parametrize("kind", ["ema", "ema_layers", "frozen_cached", "ema_kept_bfloat16"])
def test_ten_steps_equal_the_plain_path(
    fit_module: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    no_bfloat16_products: None,
    kind: str,
) -> None:
    found = []
    if kind == "ema_layers":  # transformers' own, as for models that are not fused
        for module_of_it in (hidden, student, decode_mode):
            monkeypatch.setattr(module_of_it, "decoder_of", lambda _: None)
    else:
        monkeypatch.setattr(layout, "pack_if_worth", None)  # not reached
    rate, within = 1e-3, {"abs": 1e-3}
    if kind.endswith("16"):  # or rounded prompts or weights would give other tokens
        rate, within = 1e-6, {"rel": 2e-2}  # activations are rounded
        monkeypatch.setattr(student, "_pair", lambda *_: None)
    for method in (SDFTModule, PlainSDFT):
        recorder = Recorder()
        teacher = EMATeacher(0.05) if kind.startswith("ema") else FrozenTeacher(cache_prompts=True)
        module = fit_module(
            method,
            model={
                "teacher": teacher,
                "sampling": Sampling(max_new_tokens=NEW_TOKENS, temperature=TEMPERATURE),
                "optimizer": lambda p: torch.optim.AdamW(p, lr=rate),
            },
            data={"batch_size": 3},
            callbacks=[recorder],
            max_steps=STEPS,
            max_epochs=-1,
            accumulate_grad_batches=2,
            precision="bf16-mixed" if kind.endswith("16") and method is SDFTModule else "32-true",
        )
        found.append((recorder, module))
    (ours, our_module), (plain, plain_module) = found
    assert len(ours.losses) == 2 * STEPS
    assert ours.sampled == plain.sampled
    assert len({len(tokens) for tokens in ours.sampled}) > 3, "all of one length show little"
    assert ours.losses == pytest.approx(plain.losses, **within)
    assert max(ours.losses) > 0.1, "a loss near zero would show nothing"
    pairs = zip(our_module.student.parameters(), plain_module.student.parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    start = AutoModelForCausalLM.from_pretrained(our_module.policy.name)
    ours_moved, plain_moved = (
        torch.cat([(one - at).flatten() for one, at in zip(*each, strict=True)])
        for each in (
            (our_module.student.parameters(), start.parameters()),
            (plain_module.student.parameters(), start.parameters()),
        )
    )
    assert torch.cosine_similarity(ours_moved, plain_moved, dim=0) > 0.95

"""What the plan's callbacks count, measure and write, on fits without the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from sdft_lightning.callbacks import CollapseGuard, DriftMonitor, ItemScores, TokenBudget
from sdft_lightning.callbacks.metrics_log import MetricsLog
from sdft_lightning.continual import ResumePoint, StageEnd
from sdft_lightning.data.sets import HeldOut
from sdft_lightning.errors import UserError
from sdft_lightning.models.lora import LoRA, adapter_parameters
from sdft_lightning.modules import SDFTModule, SFTModule
from sdft_lightning.modules.schedule import Schedule

FitModule = Callable[..., Any]


class Counted(TokenBudget):
    """Keeps the tokens of each micro-batch and the optimizer step after it."""

    def __init__(self, tokens: int | None = None) -> None:
        super().__init__(tokens)
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any, **options: Any) -> None:
        super().on_train_batch_end(trainer, module, *args, **options)
        self.seen.append((module.completion_tokens, trainer.global_step))


@pytest.mark.parametrize("method", [SDFTModule, SFTModule])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_fit_ends_with_the_optimizer_step_that_reaches_the_tokens(
    method: Any, accumulate: int, fit_module: FitModule
) -> None:
    counted = Counted(100)
    module = fit_module(
        method,
        {"schedule": Schedule("constant")},
        callbacks=[counted],
        max_steps=-1,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
    )
    tokens = [count for count, _ in counted.seen]
    steps = counted.seen[-1][1]
    assert counted.trained == sum(tokens) >= 100
    # Without its last step it would not have been enough; and that step is whole.
    last = [count for count, step in counted.seen if step == steps]
    before = [step for _, step in counted.seen].index(steps)
    window = tokens[before - accumulate + 1 : before + 1] if accumulate > 1 else tokens[-1:]
    assert counted.trained - sum(window) < 100
    assert len(last) == 1
    assert all(count > 0 for count in tokens)
    assert module.global_step == steps


def test_tokens_are_those_of_the_demonstrations_where_these_are_the_target(
    fit_module: FitModule, tokenizer: Any, make_rows: Callable[[int], list[dict[str, Any]]]
) -> None:
    budget = TokenBudget()
    fit_module(SFTModule, callbacks=[budget], data={"batch_size": 12}, max_steps=1)
    texts = [row["demonstration"] for row in make_rows(12)]
    stop = 1  # the stop token is trained on, too
    assert budget.trained == sum(len(tokenizer(text).input_ids) + stop for text in texts)


def test_run_resumed_at_the_end_of_its_tokens_trains_nothing() -> None:
    class Trainer:
        global_step = 7
        should_stop = False

    budget, trainer = TokenBudget(50), Trainer()
    budget.load_state_dict({"trained": 49})
    budget.on_train_start(trainer, None)  # type: ignore[arg-type]
    assert not trainer.should_stop
    budget.load_state_dict({"trained": 50})
    budget.on_train_start(trainer, None)  # type: ignore[arg-type]
    assert trainer.should_stop


def drifts(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [r["val/drift/general"] for r in records if r["stage"] == "validation"]


@pytest.mark.parametrize("named", [False, True])
def test_kl_is_from_the_named_base_and_not_from_the_model_that_the_run_starts_with(
    named: bool,
    fit_module: FitModule,
    make_model_folder: Callable[..., Path],
    train_file: Path,
    tmp_path: Path,
) -> None:
    base = make_model_folder("base", seed=5)
    monitor = DriftMonitor(["general"], str(base) if named else None)
    fit_module(
        SFTModule,
        model={"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)},
        data={"held_out": {"general": HeldOut(str(train_file), "contains")}},
        callbacks=[monitor, MetricsLog()],
        max_steps=2,
        val_check_interval=1,
        log_every_n_steps=1,
    )
    found = drifts(tmp_path)
    assert len(found) == 2
    if named:
        assert min(found) > 0.1
    else:
        assert max(map(abs, found)) < 1e-6


class Saves:
    """Stands for a trainer: what ResumePoint asks of it."""

    def __init__(self, max_steps: int, validated: set[int]) -> None:
        self.global_step = 0
        self.max_steps = max_steps
        self.should_stop = False
        self.sanity_checking = False
        self.default_root_dir = "run"
        self.state = type("State", (), {"fn": "fit"})
        self.validated = validated
        self.fit_loop = self.epoch_loop = self
        self._data_fetcher = None
        self.saved: list[tuple[int, str]] = []
        self.now = "batch"

    def _should_check_val_fx(self, fetcher: None) -> bool:
        return self.global_step in self.validated

    def save_checkpoint(self, path: Path) -> None:
        assert path == Path("run/checkpoints/last.ckpt")
        self.saved.append((self.global_step, self.now))


def test_resume_point_waits_for_the_validation_of_its_step_and_is_left_out_at_the_end() -> None:
    trainer: Any = Saves(max_steps=8, validated={4, 8})
    point = ResumePoint(2)
    point.on_train_start(trainer, None)  # type: ignore[arg-type]
    for micro_batch in range(16):
        trainer.global_step = (micro_batch + 1) // 2  # two micro-batches a step
        trainer.now = "batch"
        point.on_train_batch_end(trainer, None, None, None, micro_batch)
        if trainer.global_step in trainer.validated and micro_batch % 2:
            trainer.now = "validation"
            point.on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert trainer.saved == [(2, "batch"), (4, "validation"), (6, "batch")]


def test_stage_end_counts_the_seconds_of_the_part_before_the_interruption(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sdft_lightning.continual import stage_callbacks

    now = [100.0]
    monkeypatch.setattr(stage_callbacks.time, "monotonic", lambda: now[0])
    first, second = StageEnd(), StageEnd()
    first.on_fit_start(None, None)  # type: ignore[arg-type]
    now[0] = 130.0
    state = first.state_dict()
    now[0] = 500.0  # lost
    second.load_state_dict(state)
    second.on_fit_start(None, None)  # type: ignore[arg-type]
    now[0] = 507.0
    assert second.state_dict() == {"seconds": 37.0}


def test_stage_with_adapters_hands_on_a_whole_model_with_the_best_of_them(
    fit_module: FitModule, train_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    best = ModelCheckpoint(
        tmp_path / "best",
        monitor="val/task/task/accuracy",
        mode="max",
        save_weights_only=True,
    )
    module = fit_module(
        SFTModule,
        model={"policy": {"lora": LoRA(r=4)}, "optimizer": lambda p: torch.optim.AdamW(p, lr=0.02)},
        data={"validation": str(train_file), "grader": "contains", "name": "task"},
        max_steps=4,
        val_check_interval=2,
        enable_checkpointing=True,
        callbacks=[TokenBudget(), StageEnd(), best],
    )
    found = json.loads((tmp_path / "fit.json").read_text())
    assert found["selected_step"] == 2  # the first of equals: nothing is right yet
    exported: Any = AutoModelForCausalLM.from_pretrained(tmp_path / found["exported"])
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    for name, value in adapter_parameters(module.student).items():
        assert torch.equal(value, saved[f"student.{name}"])
    ids = torch.arange(5, 15).unsqueeze(0)
    with torch.no_grad():
        expected = module.student.eval()(input_ids=ids).logits
        torch.testing.assert_close(
            exported.eval()(input_ids=ids).logits, expected, atol=1e-4, rtol=0
        )


def test_held_out_sets_alone_are_tested_with_prompts_and_scores_of_their_own(
    run_cli: Callable[..., None],
    fit_args: list[str],
    write_rows: Callable[..., Path],
    make_rows: Callable[[int], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    path = write_rows([{**row, "reference": ["e", "a"]} for row in make_rows(6)], "other.jsonl")
    short = f"{{source: {path}, grader: contains, lengths: {{prompt: 3, too_long: error}}}}"
    own = f"{{source: {path}, grader: contains, prompts: {{style: turns, chat_template_args: "
    own += "{enable_thinking: true}}}"
    args = ["test", *[arg for arg in fit_args[1:] if "data.train" not in arg]]
    monitor = ["--trainer.callbacks+=ItemScores"]
    run_cli(
        *args,
        *monitor,
        f"--data.held_out={{plain: {{source: {path}, grader: contains}}, own: {own}}}",
    )
    lines = [
        json.loads(line)
        for line in (tmp_path / "runs/a/test-0/items.jsonl").read_text().splitlines()
    ]
    assert [line["task"] for line in lines] == ["plain"] * 6 + ["own"] * 6
    scores = [line["score"] for line in lines]
    metrics = json.loads((tmp_path / "runs/a/test-0/metrics.jsonl").read_text())
    assert metrics["test/task/plain/accuracy"] == pytest.approx(sum(scores[:6]) / 6)
    answers = [[line["completion"] for line in part] for part in (lines[:6], lines[6:])]
    assert answers[0] != answers[1]  # the second are asked with <think> opened
    with pytest.raises(SystemExit) as stop:
        run_cli(*args, f"--data.held_out={{short: {short}}}")
    assert stop.value.code == 2


def test_score_without_a_verdict_is_null(tmp_path: Path) -> None:
    class Row:
        id = "r"

    told = {"task": "t", "rows": [Row()], "scores": [float("nan")], "completions": ["x"]}
    graded = type("Graded", (), told)()
    trainer = type("T", (), {"world_size": 2, "global_rank": 1, "default_root_dir": tmp_path})()
    ItemScores().on_test_batch_end(trainer, None, {"graded": graded}, None, 0)
    line = json.loads((tmp_path / "items-rank1.jsonl").read_text())
    assert line == {"task": "t", "id": "r", "score": None, "completion": "x"}


def test_stage_that_a_guard_stopped_hands_nothing_on(fit_module: FitModule, tmp_path: Path) -> None:
    class Stops(CollapseGuard):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                self._act(trainer, "nan", "the loss is NaN")

    with pytest.raises(UserError, match=r"stopped this stage after 2 updates: the loss is NaN"):
        fit_module(max_steps=5, callbacks=[Stops(), TokenBudget(), StageEnd()])
    assert not (tmp_path / "fit.json").exists()
    assert not (tmp_path / "exported").exists()
    assert (tmp_path / "stopped.json").exists()


def test_spread_weights_are_gathered_before_they_are_handed_on(
    fit_module: FitModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdft_lightning.continual import stage_callbacks

    def whole(student: Any) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(value) for name, value in student.state_dict().items()}

    monkeypatch.setattr(stage_callbacks, "is_sharded", lambda student: True)
    monkeypatch.setattr(stage_callbacks, "whole_state_dict", whole)
    fit_module(callbacks=[TokenBudget(), StageEnd()])
    exported = json.loads((tmp_path / "fit.json").read_text())["exported"]
    weights = load_file(tmp_path / exported / "model.safetensors")
    assert all(not value.any() for value in weights.values())

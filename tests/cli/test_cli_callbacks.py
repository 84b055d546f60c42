"""What a run leaves behind with its callbacks: events, completions, exports, drift."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

RunCli = Callable[..., None]

TRAIN = "loss kl student_entropy teacher_entropy top1_agreement completion_length"
TRAIN += " truncated_fraction distinct_2 teacher_distance"
PERF = "rollout_seconds student_seconds teacher_seconds backward_seconds tokens_per_second"
SCALARS = {
    *(f"train/{name}" for name in TRAIN.split()),
    *(f"perf/{name}" for name in PERF.split()),
    *(f"val/task/greetings/accuracy{suffix}" for suffix in ("", "_low", "_high")),
}


def callback(name: str, **options: Any) -> list[str]:
    given = [f"--trainer.callbacks.{option}={value}" for option, value in options.items()]
    return [f"--trainer.callbacks+={name}", *given]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def validated(fit_args: list[str], train_file: Path) -> list[str]:
    """A fit of four steps, graded after the second and the fourth."""
    return [
        *fit_args,
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.num_sanity_val_steps=1",
        f"--data.validation={train_file}",
        "--data.grader=contains",
        "--data.columns.reference=reference",
        "--data.name=greetings",
        "--model.optimizer.lr=0.01",
    ]


@pytest.fixture
def general(write_rows: Callable[..., Path]) -> list[str]:
    """A held-out set of three questions."""
    rows = [{"ask": f"What is {i}?", "say": str(i)} for i in range(3)]
    path = write_rows(rows, "general.jsonl")
    columns = {"prompt": "ask", "reference": "say"}
    held = {"general": {"source": str(path), "grader": "contains", "columns": columns}}
    return [f"--data.held_out={json.dumps(held)}"]


def test_events_hold_scalars_texts_and_the_picture_of_per_token_divergence(
    run_cli: RunCli, validated: list[str], tmp_path: Path
) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = [*callback("CompletionLog", every_n_steps=2), *callback("KLStrip", every_n_steps=2)]
    run_cli(*validated, *logs)
    events = EventAccumulator(str(tmp_path / "runs" / "a"), {"tensors": 0, "images": 0}).Reload()
    tags = events.Tags()

    assert set(tags["scalars"]) >= SCALARS
    losses = events.Scalars("train/loss")  # Lightning counts steps from 0
    assert [event.step for event in losses] == [0, 1, 2, 3]
    assert all(0 < event.value < 10 for event in losses)
    assert [event.step for event in events.Scalars("val/task/greetings/accuracy")] == [1, 3]
    (text, *_) = events.Tensors("completions/train/greetings/text_summary")
    assert "**prompt**" in text.tensor_proto.string_val[0].decode()
    assert "completions/validation/greetings/text_summary" in tags["tensors"]
    pictures = events.Images("divergence/tokens")
    assert [picture.step for picture in pictures] == [1, 2, 4]
    picture = Image.open(io.BytesIO(pictures[0].encoded_image_string))
    assert picture.width > 600
    assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20


def test_completion_log_writes_training_and_graded_completions(
    run_cli: RunCli, validated: list[str], tmp_path: Path
) -> None:
    run_cli(
        *validated,
        "--model.evaluation.teacher_in_fit=true",
        "--model.num_loss_tokens_to_skip=2",
        *callback("CompletionLog", every_n_steps=2, rows=3),
    )
    lines = records(tmp_path / "runs" / "a" / "completions.jsonl")
    count = {
        (stage, step): sum(line["stage"] == stage and line["step"] == step for line in lines)
        for stage in ("train", "validation", "validation_teacher")
        for step in range(5)
    }
    assert {key: number for key, number in count.items() if number} == {
        ("train", 1): 2,
        ("train", 2): 2,
        ("train", 4): 2,
        ("validation", 2): 3,
        ("validation", 4): 3,
        ("validation_teacher", 2): 3,
        ("validation_teacher", 4): 3,
    }
    for line in lines:
        number = line["prompt"].strip("Q?")
        assert line["demonstration"] == f"It is {number}."
        if line["stage"] == "train":
            assert len(line["divergence"]) <= 8 - 2
            assert all(value >= 0 for value in line["divergence"])
        else:
            assert line["score"] in (0.0, 1.0)


def test_export_at_the_end_and_every_n_steps_holds_the_student_of_that_step(
    run_cli: RunCli, fit_args: list[str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    run_cli(
        *fit_args,
        "--trainer.max_steps=5",
        "--model.optimizer.lr=0.01",
        "--checkpoint.every_n_train_steps=1",
        "--checkpoint.save_top_k=-1",
        *callback("ExportModel", every_n_steps=2),
    )
    run = tmp_path / "runs" / "a"
    assert sorted(path.name for path in (run / "exported").iterdir()) == [
        "final",
        "step-2",
        "step-4",
    ]
    for name, step in (("step-2", 2), ("step-4", 4), ("final", 5)):
        exported = load_file(run / "exported" / name / "model.safetensors")
        path = run / "checkpoints" / f"step-{step}.ckpt"
        state = torch.load(path, weights_only=True)["state_dict"]
        assert exported
        for key, value in exported.items():
            assert torch.equal(state[f"student.{key}"], value)


def kl_of_answers(base: Any, student: Any, tokenizer: Any, questions: list[str]) -> float:
    """KL(base ‖ student) on the base model's greedy answers: mean over tokens, then answers."""
    means = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids  # (1, P)
        with torch.no_grad():
            whole = base.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
            )  # (1, P + T)
            of_base, of_student = (
                each(input_ids=whole).logits[0, ids.shape[1] - 1 : -1].double().log_softmax(-1)
                for each in (base, student)
            )  # (T, V)
        means.append((of_base.exp() * (of_base - of_student)).sum(-1).mean().item())
    return sum(means) / len(means)


def test_drift_is_zero_before_training_and_then_the_kl_on_the_base_models_own_answers(
    run_cli: RunCli,
    validated: list[str],
    general: list[str],
    tmp_path: Path,
    model: Any,
    tokenizer: Any,
) -> None:
    import copy

    monitor = callback("DriftMonitor", held_out='["general"]')
    run_cli("validate", *validated[1:], *general, *monitor, "--run.name=base")
    run_cli(*validated, *general, *monitor)
    run = tmp_path / "runs" / "a"
    (before,) = records(tmp_path / "runs" / "base" / "validate-0" / "metrics.jsonl")
    lines = [line for line in records(run / "metrics.jsonl") if line["stage"] == "validation"]
    drifts = [line["val/drift/general"] for line in lines]
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    student = copy.deepcopy(model)
    student.load_state_dict(
        {key[8:]: value for key, value in state.items() if key.startswith("student.")}
    )
    expected = kl_of_answers(model, student, tokenizer, [f"What is {i}?" for i in range(3)])

    assert abs(before["val/drift/general"]) < 1e-6
    assert [line["step"] for line in lines] == [2, 4]
    assert 0.001 < drifts[0] < drifts[1]
    assert drifts[1] == pytest.approx(expected, rel=1e-4)
    assert 0 <= lines[0]["val/task/general/accuracy"] <= 1


def test_drift_of_an_unknown_held_out_set_is_refused_with_those_there_are(
    run_cli: RunCli, validated: list[str], general: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(*validated, *general, *callback("DriftMonitor", held_out='["generl"]'))
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert "'generl'" in message
    assert "data.held_out, which has general" in message

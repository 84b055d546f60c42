"""FSDP2 on two processes: what one process does, its checkpoints, its export, its evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: choice.jsonl}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


def assert_same_weights(mine: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            mine[name], tensor, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_two_processes_with_fsdp2_do_what_one_does_with_the_same_global_batch(fit: Any) -> None:
    one, two = fit("one", 1), fit("two", 2, strategy="fsdp2")
    assert len(two.completions()) == 40
    assert two.completions() == one.completions()
    for name in ("train/loss", "train/teacher_distance"):
        assert len(two.logged(name)) == 10
        assert two.logged(name) == pytest.approx(one.logged(name), abs=1e-4)
    assert any(name.startswith("teacher.") for name in one.weights())
    assert_same_weights(two.weights(), one.weights(), 1e-4)


def test_a_run_with_fsdp2_goes_on_as_if_it_had_not_stopped(fit: Any) -> None:
    straight = fit("two", 2, strategy="fsdp2")
    fit("halved", 2, "--trainer.max_steps=6", strategy="fsdp2")
    halved = fit("halved", 2, "--ckpt_path=last", strategy="fsdp2")
    assert halved.completions() == straight.completions()
    assert_same_weights(halved.weights(), straight.weights(), 0.0)


def test_a_run_of_one_process_goes_on_with_fsdp2(fit: Any) -> None:
    # Under fsdp2 Lightning numbers the optimizer's state by the parameters of the whole module.
    one = fit("one", 1)
    fit("moved", 1, "--trainer.max_steps=6")
    moved = fit("moved", 2, "--ckpt_path=last", strategy="fsdp2")
    assert moved.completions() == one.completions()
    assert_same_weights(moved.weights(), one.weights(), 1e-4)


def test_export_of_a_run_with_fsdp2_loads_with_the_trained_weights(
    fit: Any, run_cli: Callable[..., None], model_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    run = fit("two", 2, strategy="fsdp2")
    path = run.folder / "checkpoints" / "last.ckpt"
    given = [f"--model.policy.name={model_folder}", f"--ckpt_path={path}", "--output_dir=out"]
    run_cli("export", "--model=SDFTModule", *given)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    trained = run.weights()
    assert {f"student.{name}" for name in exported} == {n for n in trained if n[:8] == "student."}
    for name, tensor in exported.items():
        assert torch.equal(tensor, trained[f"student.{name}"]), name


def evaluated(fit: Any, folder: Path, devices: int, optimized: bool = False) -> Any:
    """Two steps with all that is evaluated; five rows, so that the ranks get unequal shares."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()][:5]
    (folder / "five.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(CHOICE)
    questions = [
        {"question": f"Which is {w}?", "choices": [w, "no", f"a {w}"], "answer": 0}
        for w in ("red", "a long blue one", "x")
    ]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    callbacks = [
        {"class_path": "DriftMonitor", "init_args": {"held_out": ["general"]}},
        {"class_path": "ExportModel"},
    ]
    held_out = {"general": {"source": "five.jsonl", "grader": "contains"}}
    benchmarks = {"tasks": [{"name": "choice.yaml", "metric": "acc"}], "batch_size": 2}
    return fit(
        f"evaluated{devices}{'-O' if optimized else ''}",
        devices,
        "--trainer.max_steps=2",
        "--model.optimizer.lr=1e-2",
        "--model.evaluation.teacher_in_fit=true",
        "--model.evaluation.max_new_tokens=8",
        "--data.name=five",
        "--data.validation=five.jsonl",
        "--data.grader=contains",
        "--data.columns.reference=reference",
        "--data.eval_batch_size=1",
        f"--data.held_out={json.dumps(held_out)}",
        f"--data.benchmarks={json.dumps(benchmarks)}",
        f"--trainer.callbacks={json.dumps(callbacks)}",
        strategy="fsdp2",
        optimized=optimized,
    )


@pytest.mark.parametrize("optimized", [False, True], ids=["python", "python -O"])
def test_evaluation_and_export_at_the_end_are_those_of_one_process(
    fit: Any, process_folder: Path, optimized: bool
) -> None:
    from transformers import AutoModelForCausalLM

    one, two = evaluated(fit, process_folder, 1), evaluated(fit, process_folder, 2, optimized)
    assert two.optimized() == (["optimized0", "optimized1"] if optimized else [])
    names = (
        "val/drift/general",
        "val/capability/tiny_choice/acc",
        "val/task/five/accuracy",
        "val/task/five/teacher_accuracy",
    )
    for name in names:
        assert len(one.logged(name, "validation")) == 2, one.keys("validation")
        assert two.logged(name, "validation") == pytest.approx(
            one.logged(name, "validation"), abs=1e-4
        )
    assert one.logged("val/drift/general", "validation")[1] > 1e-3
    exported = AutoModelForCausalLM.from_pretrained(two.folder / "exported" / "final")
    assert type(exported).__name__ == "LlamaForCausalLM"
    trained = two.weights()
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, trained[f"student.{name}"]), name

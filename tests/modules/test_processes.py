"""The same global batch on one process and on two: completions, losses, weights, resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytestmark = pytest.mark.slow

# Three micro-batches an epoch: a window of two, and one of one that weighs as much.
WINDOWS = (
    "--trainer.accumulate_grad_batches=2",
    "--model.sampling.max_new_tokens=24",
    "--trainer.max_steps=4",
)
CONFIGS = Path(__file__).parents[2] / "configs"


def test_two_processes_do_what_one_does_with_the_same_global_batch(fit: Any) -> None:
    one, two = fit("one", 1), fit("two", 2)
    assert len(two.completions()) == 40
    assert one.completions() == two.completions()
    assert two.logged("train/loss") == pytest.approx(one.logged("train/loss"), abs=1e-4)
    assert len(two.logged("train/loss")) == 10
    first, second = one.weights(), two.weights()
    assert first.keys() == second.keys()
    assert any(name.startswith("teacher.") for name in first)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-4, rtol=1e-4)


def test_windows_of_two_processes_log_and_weigh_what_those_of_one_do(fit: Any) -> None:
    one, two = (fit(f"windows-{n}", n, *WINDOWS) for n in (1, 2))
    assert one.completions() == two.completions()
    for name in (
        *("loss", "kl", "student_entropy", "teacher_entropy", "top1_agreement"),
        *("completion_length", "truncated_fraction", "distinct_2"),
    ):
        values = one.logged(f"train/{name}")
        assert len(values) == 4
        assert two.logged(f"train/{name}") == pytest.approx(values, rel=1e-4, abs=1e-5), name
    first, second = one.weights(), two.weights()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-4, rtol=1e-4)


def test_ddp_whose_buckets_are_the_gradients_trains_as_with_copies_of_them(fit: Any) -> None:
    text = (CONFIGS / "trainer" / "ddp.yaml").read_text(encoding="utf-8")
    strategy = yaml.safe_load(text)["trainer"]["strategy"]
    assert strategy["init_args"] == {"gradient_as_bucket_view": True}
    copies = fit("windows-2", 2, *WINDOWS)
    views = fit("views", 2, *WINDOWS, strategy=json.dumps(strategy))
    assert views.completions() == copies.completions()
    first, second = copies.weights(), views.weights()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=0, rtol=0)


def test_rows_to_retain_are_shared_by_two_processes_as_one_has_them(
    fit: Any, process_folder: Any
) -> None:
    rows = "".join(json.dumps({"prompt": f"Tell me about {i}."}) + "\n" for i in range(5))
    (process_folder / "retain.jsonl").write_text(rows, encoding="utf-8")
    options = ["--data.retain=retain.jsonl", "--data.retain_max_new_tokens=5"]
    options += ["--model.initial_copy=true", "--trainer.max_steps=5"]
    # Batches of four with two, one and one: on two processes some have none.
    one, two = (fit(f"retained-{n}", n, *options) for n in (1, 2))
    assert one.completions() == two.completions()
    for name in ("loss", "kl", "retained_kl", "retained_truncated"):
        values = one.logged(f"train/{name}")
        assert len(values) == 5
        assert two.logged(f"train/{name}") == pytest.approx(values, rel=1e-4, abs=1e-5), name
    first, second = one.weights(), two.weights()
    assert any(name.startswith("initial.") for name in first)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-4, rtol=1e-4)


def test_a_run_on_two_processes_goes_on_as_if_it_had_not_stopped(fit: Any) -> None:
    straight = fit("two", 2)
    fit("halved", 2, "--trainer.max_steps=6")
    halved = fit("halved", 2, "--ckpt_path=last")
    assert straight.completions() == halved.completions()
    whole, resumed = straight.weights(), halved.weights()
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=0, rtol=0)


def test_export_of_a_run_on_two_processes_loads_with_the_trained_weights(
    fit: Any, run_cli: Any, model_folder: Any, tmp_path: Any
) -> None:
    from transformers import AutoModelForCausalLM

    run = fit("two", 2)
    path = run.folder / "checkpoints" / "last.ckpt"
    given = [f"--model.policy.name={model_folder}", f"--ckpt_path={path}", "--output_dir=out"]
    run_cli("export", "--model=SDFTModule", *given)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    trained = run.weights()
    assert {f"student.{name}" for name in exported} == {n for n in trained if n[:8] == "student."}
    for name, tensor in exported.items():
        assert torch.equal(tensor, trained[f"student.{name}"]), name

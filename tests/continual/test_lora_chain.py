"""A plan whose methods train adapters: each stage hands on a whole model to new ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

Options = dict[str, Any]
Weights = dict[str, Tensor]
_WEIGHTS = "model.safetensors"


def exported(run: Path) -> Weights:
    return load_file(run / json.loads((run / "fit.json").read_text())["exported"] / _WEIGHTS)


def with_adapters_of(run: Path, start: Weights, scale: float) -> Weights:
    """W + s · B A by hand, with the adapters of the checkpoint that the stage handed on."""
    (path,) = (run / "best").glob("step-2.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    adapters = {k.removeprefix("student."): v for k, v in state.items() if "student." in k}
    weights = dict(start)
    for name in (name for name in adapters if ".lora_A." in name):
        weight = name.replace("lora_A.default.", "")
        delta = adapters[name.replace("lora_A", "lora_B")].double() @ adapters[name].double()
        weights[weight] = (start[weight].double() + scale * delta).float()
    return weights


@pytest.mark.slow
def test_second_stage_trains_new_adapters_on_the_first_ones_merged_model(
    run_cli: Callable[..., None], plan_options: Options, model_folder: Path, tmp_path: Path
) -> None:
    plan_options |= {"seeds": [1], "select": "best", "keep_checkpoints": True}
    plan_options["model"]["init_args"]["policy"]["lora"] = {"r": 4, "alpha": 6}
    config = tmp_path / "plan.yaml"
    config.write_text(json.dumps(plan_options))
    run_cli("continual", f"--config={config}")
    folder = tmp_path / "runs" / "plan"
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [record["status"] for record in records] == ["finished"] * 5
    assert {record["selected_step"] for record in records[1:]} == {2}  # none is right: the first
    for method in ("sdft", "sft"):
        start = load_file(model_folder / _WEIGHTS)
        for stage in ("1_ferry", "2_museum"):
            run = folder / method / "seed1" / stage
            found, expected = exported(run), with_adapters_of(run, start, scale=6 / 4)
            assert found.keys() == start.keys()  # plain names: any tool loads it, none sees peft
            for name, weight in expected.items():
                torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
            moved = max(float((found[name] - start[name]).abs().max()) for name in start)
            assert moved > 1e-3
            start = found
    # The KL is from the base model of the plan, which the second stage never saw.
    drifts = {record["run"]: record["drift"]["general"] for record in records[1:]}
    assert all(value > 1e-4 for value in drifts.values())

"""What adapters add to a model, where they start, and which options are refused."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_lightning.errors import UserError
from sdft_lightning.forward.policy import Policy, load_policy
from sdft_lightning.models.lora import LoRA, adapter_parameters, add_adapter_, is_adapted
from sdft_lightning.models.lora.adapters import fingerprint

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
Make = Callable[..., Any]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS).logits
    return result


def test_only_a_and_b_of_every_linear_layer_but_the_head_are_trained(model_folder: Path) -> None:
    policy = load_policy(Policy(str(model_folder), lora=LoRA(r=4)))
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(policy.model))
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    # in + out of q, k, v, o, gate, up, down; rank 4; two layers
    sizes = 64 + 48 + 48 + 64 + 96 + 96 + 96
    assert policy.model.num_parameters(only_trainable=True) == sizes * 4 * 2
    assert all(module.training for module in policy.model.modules())


def test_training_starts_at_the_base_model(make_adapted: Make, model: Any) -> None:
    adapted = make_adapted(moved=False)
    assert torch.equal(logits(adapted), logits(model))
    assert any(float(p.detach().abs().max()) > 0 for p in adapter_parameters(adapted).values())


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapted_layer_computes_w_plus_scaled_b_a(
    make_adapted: Make, model: Any, rslora: bool
) -> None:
    adapted = make_adapted(LoRA(r=4, alpha=6, rslora=rslora))
    scale = 6 / math.sqrt(4) if rslora else 6 / 4
    adapters = adapter_parameters(adapted)
    plain = dict(model.named_parameters())
    for name in [name for name in adapters if ".lora_A." in name]:
        a, b = adapters[name].double(), adapters[name.replace("lora_A", "lora_B")].double()
        weight = plain[name.replace("lora_A.default.", "")]
        weight.data = (weight.double() + scale * b @ a).float()
    torch.testing.assert_close(logits(adapted), logits(model), rtol=1e-4, atol=1e-4)


def test_a_depends_on_the_seed_alone_and_draws_nothing_from_the_runs_random_numbers(
    make_model: Make,
) -> None:
    drawn = []
    for before, seed in ((0, 7), (99, 7), (0, 8)):
        adapted = make_model()
        torch.manual_seed(before)
        add_adapter_(adapted, LoRA(r=4), seed)
        after = torch.rand(1)
        torch.manual_seed(before)
        assert torch.equal(after, torch.rand(1))
        drawn.append(torch.cat([p.flatten() for p in adapter_parameters(adapted).values()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_gaussian_init_has_deviation_one_over_r(make_adapted: Make) -> None:
    adapted = make_adapted(LoRA(r=4, init="gaussian"), moved=False)
    adapters = adapter_parameters(adapted)
    a = torch.cat([p.flatten() for name, p in adapters.items() if ".lora_A." in name])
    assert float(a.detach().std()) == pytest.approx(1 / 4, rel=0.1)
    assert all(not p.any() for name, p in adapters.items() if ".lora_B." in name)


def test_adapters_of_a_bfloat16_model_are_float32(make_model: Make) -> None:
    model = make_model().to(torch.bfloat16)
    add_adapter_(model, LoRA(r=4), 0)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    rest = {p.dtype for name, p in model.named_parameters() if "lora_" not in name}
    assert rest == {torch.bfloat16}
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16


def test_named_targets_alone_are_adapted(make_adapted: Make) -> None:
    adapted = make_adapted(LoRA(r=4, target_modules=["q_proj", "layers.1.mlp.up_proj"]))
    layers = {name.split(".lora_")[0] for name in adapter_parameters(adapted)}
    assert layers == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }


@pytest.mark.parametrize("target", ["q_projj", "lm_head", "embed_tokens", "proj"])
def test_a_target_that_is_no_linear_layer_inside_is_refused_with_those_there_are(
    model: Any, target: str
) -> None:
    with pytest.raises(UserError, match=rf"lora.target_modules: '{target}'.*all-linear.*q_proj"):
        add_adapter_(model, LoRA(target_modules=["v_proj", target]), 0)
    assert not is_adapted(model)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"r": 0}, r"lora\.r: got 0"),
        ({"alpha": 0}, r"lora\.alpha: got 0"),
        ({"init": "pissa"}, r"lora\.init: got 'pissa', allowed are kaiming, gaussian"),
        ({"target_modules": []}, r"lora\.target_modules: got none"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        LoRA(**options)


def test_without_peft_all_else_works_and_adapters_name_their_extra(model_folder: Path) -> None:
    code = f"""
import sys
sys.modules["peft"] = None  # as if it were not installed
from sdft_lightning.forward.policy import Policy
from sdft_lightning.errors import UserError
from sdft_lightning.models.lora import LoRA
from sdft_lightning.modules import SDFTModule
module = SDFTModule(policy=Policy({str(model_folder)!r}))
module.configure_model()
assert module.teacher.distance(module.student) == 0.0
assert len(module.state_dict()) > 20
try:
    SDFTModule(policy=Policy({str(model_folder)!r}, lora=LoRA())).configure_model()
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "model.policy.lora" in done.stdout
    assert "pip install -e '.[lora]'" in done.stdout


def test_fingerprint_tells_base_models_apart_and_not_their_dtypes(make_model: Make) -> None:
    known = fingerprint(make_model())
    assert fingerprint(make_model()) == known
    assert fingerprint(make_model().to(torch.bfloat16)) == known
    assert fingerprint(make_model(seed=1)) != known
    merged = make_model()  # as the export of an earlier run: one layer differs
    with torch.no_grad():
        merged.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert fingerprint(merged) != known

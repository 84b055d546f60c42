"""The plain attention formula: only where it is faster, and the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_lightning.forward import hidden as hidden_file
from sdft_lightning.forward.hidden import completion_hidden_states, training_attention
from sdft_lightning.types import Tokens


def takes_flash() -> bool:
    return torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, True),
        ({"tokens": 2048}, False),
        ({"dtype": torch.float32}, False),
        ({"implementation": "eager"}, False),
        ({"checkpointing": True}, False),
        ({"grad": False}, False),
    ],
)
def test_plain_formula_is_taken_only_for_few_scores_in_bfloat16_with_gradients(
    model: Any, options: dict[str, Any], plain: bool
) -> None:
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable()
    model.config._attn_implementation = options.get("implementation", "sdpa")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled="dtype" not in options)
    with torch.set_grad_enabled(options.get("grad", True)), autocast:
        with training_attention(model, 2, options.get("tokens", 100)):
            assert takes_flash() is not plain
    assert takes_flash()


def gradients(model: Any, plain: bool) -> list[Tensor]:
    torch.manual_seed(0)
    prompts = torch.randint(3, 60, (3, 9))
    completions = torch.randint(3, 60, (3, 7))
    mask = torch.ones_like(prompts, dtype=torch.bool)
    mask[1, :4] = False
    kept = torch.ones_like(completions, dtype=torch.bool)
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        if not plain:
            patch.setattr(
                hidden_file, "training_attention", lambda *_: torch.autograd.set_grad_enabled(True)
            )
        states = completion_hidden_states(
            model, Tokens(prompts, mask), Tokens(completions, kept), kept, fuse=False
        )
    states.float().square().sum().backward()
    return [each.grad.clone() for each in model.base_model.parameters() if each.grad is not None]


def test_gradients_are_those_of_the_flash_kernel_up_to_bfloat16(
    model: Any, bfloat16_products: None
) -> None:
    model.requires_grad_(True)
    flash = gradients(model, plain=False)
    plain = gradients(model, plain=True)
    assert len(flash) == len(plain) > 10
    mine, theirs = (torch.cat([each.flatten() for each in found]) for found in (plain, flash))
    assert 0 < (mine - theirs).norm() / theirs.norm() < 0.01

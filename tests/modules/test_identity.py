"""Which checkpoint belongs to which model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sdft_lightning.errors import UserError
from sdft_lightning.modules import SDFTModule
from sdft_lightning.modules.checkpoints import check_same_model, model_identity


@pytest.mark.parametrize(
    "change",
    [{"intermediate_size": 48}, {"num_key_value_heads": 1}, {"head_dim": 16}],
    ids=lambda change: next(iter(change)),
)
def test_model_that_differs_in_one_size_is_another_one(
    make_model_folder: Callable[..., Any], change: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    kinds = [
        model_identity(
            AutoModelForCausalLM.from_pretrained(make_model_folder(**sizes)), "x", SDFTModule
        )
        for sizes in ({"name": "a"}, {"name": "b", **change})
    ]
    check_same_model(kinds[0], kinds[0])
    with pytest.raises(UserError, match=f"another architecture.*{next(iter(change))}"):
        check_same_model(kinds[0], kinds[1])


def test_checkpoint_from_before_a_field_was_written_down_is_still_known(model: Any) -> None:
    current = model_identity(model, "x", SDFTModule)
    older = {**current, "architecture": {**current["architecture"]}}
    del older["architecture"]["intermediate_size"]
    check_same_model(older, current)
    older["architecture"]["hidden_size"] += 1
    with pytest.raises(UserError, match="another architecture"):
        check_same_model(older, current)

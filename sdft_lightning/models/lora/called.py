"""Whether a model calls the layers that were adapted, and does not read their weights itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdft_lightning.errors import UserError
from sdft_lightning.models.eval_mode import eval_mode
from sdft_lightning.models.lora.adapters import adapted_weight, adapter_layers


@torch.no_grad()
def check_adapters_are_called(model: Any) -> None:
    """Refuse adapters on layers whose weights other modules multiply by themselves.

    Such an adapter would change nothing while it is trained, and the model once it is merged.
    Layers that three tokens do not need, such as an expert's or a picture's, need not be called.

    Args:
        model: A causal language model of transformers, with adapters or without.

    Raises:
        UserError: If there are such layers.
    """
    layers = adapter_layers(model)
    if not layers:
        return
    with eval_mode(model):  # which puts the modes back
        for training in (False, True):  # a model may read a weight in one mode only
            model.train(training)
            past = _read_past(model, layers)
            if past:
                raise UserError(_sentence(model, layers, past))


def _read_past(model: Any, layers: dict[str, Any]) -> list[str]:
    """Names of layers that are not called, but change what comes out."""
    called: set[str] = set()
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, layer in layers.items()
    ]
    try:
        plain = _states(model)
    finally:
        for handle in handles:
            handle.remove()
    kinds: dict[str, list[str]] = {}
    for name in layers:
        if name not in called and adapted_weight(layers[name]).is_floating_point():
            kinds.setdefault(name.rpartition(".")[2], []).append(name)
    found: list[str] = []
    for names in kinds.values():
        weights = [adapted_weight(layers[name]).data for name in names]
        for weight in weights:
            weight.neg_()
        changed = not torch.equal(_states(model), plain)
        for weight in weights:
            weight.neg_()  # exact
        found += names if changed else []
    return found


def _states(model: Any) -> Tensor:
    ids = torch.tensor([[0, 1, 2]], device=model.device)  # (1, 3)
    states: Tensor = model.base_model(input_ids=ids).last_hidden_state  # (1, 3, D)
    return states


def _sentence(model: Any, layers: dict[str, Any], past: list[str]) -> str:
    ends = {name.rpartition(".")[2] for name in past}
    rest = {
        name.rpartition(".")[2]
        for name, layer in layers.items()
        if isinstance(layer.get_base_layer(), nn.Linear)
    }
    around = type(model.get_submodule(past[0].rpartition(".")[0])).__name__
    return (
        f"lora.target_modules: {around} reads the weights of {', '.join(sorted(ends))} past their "
        f"adapters (e.g. {past[0]}), so the exported model would not be the trained one. Name "
        f"layers without them: [{', '.join(sorted(rest - ends))}]."
    )

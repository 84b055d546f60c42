"""Whether a model calls the layers that were adapted, and does not read their weights itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sdft_lightning.errors import UserError
from sdft_lightning.eval_mode import eval_mode
from sdft_lightning.lora.adapters import adapter_layers


@torch.no_grad()
def check_adapters_are_called(model: Any) -> None:
    """Refuse adapters on layers whose weights the module around them multiplies by itself.

    Such an adapter would change nothing while it is trained, and the model once it is merged.
    Experts that no token is sent to are not called either, but nor is what is around them.

    Args:
        model: A causal language model of transformers, with adapters or without.

    Raises:
        UserError: If there are such layers.
    """
    layers = adapter_layers(model)
    if not layers:
        return
    called: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    watched = {*layers, *(name.rpartition(".")[0] for name in layers)}
    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in watched]
    try:
        with eval_mode(model):
            model(input_ids=torch.tensor([[0, 1, 2]], device=model.device))  # (1, 3)
    finally:
        for handle in handles:
            handle.remove()
    missed = [n for n in layers if n not in called and n.rpartition(".")[0] in called]
    if missed:
        ends = sorted({name.rpartition(".")[2] for name in missed})
        rest = sorted({name.rpartition(".")[2] for name in layers} - set(ends))
        around = type(model.get_submodule(missed[0].rpartition(".")[0])).__name__
        raise UserError(
            f"lora.target_modules: {around} reads the weights of {', '.join(ends)} past their "
            f"adapters (e.g. {missed[0]}), so the exported model would not be the trained one. "
            f"Name the layers without them: [{', '.join(rest)}]."
        )

"""Checkpoints of a run with adapters hold the adapters only, not the frozen model below them."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from sdft_lightning.models.lora.adapters import adapter_parameters


def keep_adapters_only_(module: nn.Module, student: Any) -> None:
    """Let `module.state_dict()` hold no frozen weights of the student, and let such a one load.

    They are left out of the student itself and of every teacher that shares them. An adapter that
    is missing when loading is an error as ever.

    Args:
        module: A LightningModule of ours.
        student: Its adapted model.
    """
    adapters = frozenset(adapter_parameters(student))
    module.register_state_dict_post_hook(partial(_drop_frozen, adapters))
    module.register_load_state_dict_post_hook(partial(_forgive_frozen, adapters))


def _is_frozen(adapters: frozenset[str], module: nn.Module, key: str) -> bool:
    sharing = (name for name, part in module.named_children() if _shares_weights(part))
    models = ("student.", *(f"{name}.model." for name in sharing))
    return any(
        key.startswith(model) and key.removeprefix(model) not in adapters for model in models
    )


def _shares_weights(part: nn.Module) -> bool:
    return bool(getattr(part, "shares_weights", False))


def _drop_frozen(
    adapters: frozenset[str], module: nn.Module, state: dict[str, Any], prefix: str, _: object
) -> None:
    for key in list(state):
        if key.startswith(prefix) and _is_frozen(adapters, module, key.removeprefix(prefix)):
            del state[key]


def _forgive_frozen(adapters: frozenset[str], module: nn.Module, found: Any) -> None:
    found.missing_keys[:] = [
        key for key in found.missing_keys if not _is_frozen(adapters, module, key)
    ]

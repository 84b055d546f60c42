"""Checkpoints of a run with adapters hold the adapters only, not the frozen model below them."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from sdft_lightning.lora.adapters import adapter_parameters

# Where the parts of a LightningModule of ours that hold a model keep it.
_MODELS = ("student.", "teacher.model.")


def keep_adapters_only_(module: nn.Module, student: Any) -> None:
    """Let `module.state_dict()` hold of each model its adapters only, and let such a one load.

    An adapter that is missing when loading is an error as ever.

    Args:
        module: A LightningModule of ours.
        student: Its adapted model.
    """
    adapters = frozenset(adapter_parameters(student))
    module.register_state_dict_post_hook(partial(_drop_frozen, adapters))
    module.register_load_state_dict_post_hook(partial(_forgive_frozen, adapters))


def _is_frozen(adapters: frozenset[str], key: str) -> bool:
    return any(
        key.startswith(model) and key.removeprefix(model) not in adapters for model in _MODELS
    )


def _drop_frozen(
    adapters: frozenset[str], module: nn.Module, state: dict[str, Any], prefix: str, _: object
) -> None:
    for key in [key for key in state if _is_frozen(adapters, key.removeprefix(prefix))]:
        del state[key]


def _forgive_frozen(adapters: frozenset[str], module: nn.Module, found: Any) -> None:
    found.missing_keys[:] = [key for key in found.missing_keys if not _is_frozen(adapters, key)]

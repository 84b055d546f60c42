"""Which model a checkpoint belongs to."""

from __future__ import annotations

from typing import Any

from sdft_lightning.errors import UserError

_FIELDS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


def model_identity(model: Any, model_name: str, method: type) -> dict[str, Any]:
    """What tells one model from another, in plain types.

    Args:
        model: A model of transformers.
        model_name: The name that it was loaded by.
        method: Class of the LightningModule.
    """
    architecture = {name: getattr(model.config, name, None) for name in _FIELDS}
    return {"model_name": model_name, "method": method.__name__, "architecture": architecture}


def check_same_model(saved: dict[str, Any] | None, current: dict[str, Any]) -> None:
    """Compare the identity in a checkpoint with that of this run.

    Raises:
        UserError: If the checkpoint is of another model or method, or none of ours.
    """
    if saved is None:
        raise UserError(
            "ckpt_path: this checkpoint was not written by sdft_lightning. Load a model folder "
            "with --model.model_name instead."
        )
    for name in ("architecture", "method"):
        if saved[name] != current[name]:
            raise UserError(
                f"ckpt_path: the checkpoint is of another {name}: it was written for "
                f"{saved['model_name']} with {saved[name]}, this run has {current['model_name']} "
                f"with {current[name]}. Give the checkpoint of this run, or the config that wrote "
                "it."
            )

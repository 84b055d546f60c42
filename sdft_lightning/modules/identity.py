"""Which model a checkpoint belongs to."""

from __future__ import annotations

from typing import Any

from sdft_lightning.errors import UserError
from sdft_lightning.lora import adapter_identity
from sdft_lightning.tokenization import load_config, load_tokenizer

_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "head_dim",
    "tie_word_embeddings",
)


def model_identity(model: Any, model_name: str, method: type) -> dict[str, Any]:
    """What tells one model from another, in plain types.

    Args:
        model: A model of transformers.
        model_name: The name that it was loaded by.
        method: Class of the LightningModule.
    """
    adapter = adapter_identity(model)
    return {
        "model_name": model_name,
        "method": method.__name__,
        "architecture": _architecture(model.config),
        "adapter": adapter,
        # Only a checkpoint of adapters leaves the weights below them to this run.
        "base model": None if adapter is None else model.base_fingerprint,
    }


def _architecture(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name, None) for name in _FIELDS}


def check_same_kind(
    model_name: str, revision: str | None, original_name: str, original_revision: str | None
) -> None:
    """Compare two models by their configs and tokenizers, without loading their weights.

    Args:
        model_name: The student.
        revision: Its branch, tag or commit on the Hub.
        original_name: The model that it is said to come from.
        original_revision: Its branch, tag or commit on the Hub.

    Raises:
        UserError: If their architectures or their vocabularies differ, or there is no such model.
    """
    kinds = []
    for name, version in ((model_name, revision), (original_name, original_revision)):
        vocabulary = load_tokenizer(name, version).get_vocab()
        kinds.append((_architecture(load_config(name, version)), vocabulary))
    (student, words), (original, original_words) = kinds
    for what, mine, theirs in (
        ("architecture", student, original),
        ("vocabulary", words, original_words),
    ):
        if mine != theirs:
            apart = sorted(
                key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)
            )
            raise UserError(
                f"model.original_model_name: {original_name} has another {what} than {model_name} "
                f"(they differ in {', '.join(apart[:3])}), so it cannot come from it. "
                "Name the model that SFT started from."
            )


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
    for name in ("architecture", "method", "adapter", "base model"):
        # Checkpoints from before there were adapters name none, older ones fewer fields.
        mine, theirs = current[name], saved.get(name)
        if isinstance(mine, dict) and isinstance(theirs, dict) and name == "architecture":
            mine = {field: value for field, value in mine.items() if field in theirs}
        if theirs != mine:
            raise UserError(
                f"ckpt_path: the checkpoint is of another {name}: it was written for "
                f"{saved['model_name']} with {theirs}, this run has "
                f"{current['model_name']} with {mine}. Give the checkpoint of this run, "
                "or the config that wrote it."
            )

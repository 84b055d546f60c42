"""Which model a checkpoint belongs to."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sdft_lightning.errors import UserError, printable
from sdft_lightning.models.lora import adapter_identity
from sdft_lightning.models.tokenization import config_value, load_config, load_tokenizer

IDENTITY_KEY = "sdft_lightning"

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

# Where Lightning keeps how far training has come.
_PROGRESS = ("epoch_loop.batch_progress", "epoch_progress")
# What optimizers of torch keep for each weight in its own shape.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer")


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
    return {name: config_value(config, name) for name in _FIELDS}


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


def check_takes(
    checkpoint: dict[str, Any], method: str, teacher: str | None, optimizer: str | None
) -> None:
    """Compare what a checkpoint says of itself with a command, without any model.

    Args:
        checkpoint: Its content.
        method: Class of this command's LightningModule.
        teacher: Class of its teacher; None where the command uses none.
        optimizer: Class of its optimizer; None where nothing is trained.

    Raises:
        UserError: If it is none of ours, is of another method, teacher or optimizer, or holds
            weights only and is to be trained on.
    """
    saved = _identity(checkpoint)
    _check_same("method", saved, {"method": method, "model_name": "this run's model"})
    for option, mine in (("teacher", teacher), ("optimizer", optimizer)):
        theirs = saved.get(option, mine)  # checkpoints of before do not say
        if None not in (mine, theirs) and mine != theirs:
            raise UserError(
                f"model.{option}: the checkpoint was written with {theirs}, and this command has "
                f"{mine}. Give --model.{option}={theirs}, with its options as the config.yaml of "
                "the run has them."
            )
    if optimizer is not None and not {"optimizer_states", "lr_schedulers"} <= checkpoint.keys():
        raise UserError(
            "ckpt_path: the checkpoint holds weights only (checkpoint.save_weights_only), so "
            "training cannot go on from it. Give another checkpoint of the run, or export this one "
            "and train the exported folder under a new --run.name with --model.model_name."
        )
    if optimizer is not None:
        _check_progress(checkpoint)


def _check_progress(checkpoint: dict[str, Any]) -> None:
    """Refuse to train on without knowing how far training has come."""
    loop = checkpoint.get("loops", {}).get("fit_loop")
    lacks = [name for name in _PROGRESS if not isinstance(loop, dict) or name not in loop]
    if lacks:
        raise UserError(
            f"ckpt_path: training cannot go on from this checkpoint, whose loops lack fit_loop "
            f"{', '.join(lacks)}: it would begin anew with trained weights. It may be damaged; "
            "name an older one of the run's checkpoints/ folder."
        )


def check_same_weights(saved: dict[str, Tensor], current: dict[str, Tensor]) -> None:
    """Compare the weights in a checkpoint with those that this run's model has.

    Args:
        saved: The weights in the checkpoint, by name.
        current: Those of the module.

    Raises:
        UserError: If names or shapes differ; names the first.
    """
    apart = sorted(
        name
        for name in saved.keys() | current.keys()
        if name not in saved or name not in current or saved[name].shape != current[name].shape
    )
    if apart:
        name = apart[0]
        shapes = [tuple(each[name].shape) if name in each else "none" for each in (saved, current)]
        raise UserError(
            f"ckpt_path: {len(apart)} weights of the checkpoint are not those of this run's model, "
            f"e.g. {name}: {shapes[0]} in the checkpoint, {shapes[1]} in the model. Give the "
            "checkpoint of this run, or the config that wrote it."
        )


def check_same_groups(saved: list[dict[str, Any]] | None, optimizer: Any) -> None:
    """Compare the parameter groups in a checkpoint with those of this run's optimizer.

    Args:
        saved: `optimizer_states` of the checkpoint; None where there is none.
        optimizer: A new one over the parameters to train.

    Raises:
        UserError: If there are none, more or fewer, or others of other sizes.
    """
    if not saved:
        return
    try:
        theirs = [len(group["params"]) for group in saved[0]["param_groups"]]
    except (TypeError, KeyError) as error:
        raise UserError(
            "ckpt_path: what the checkpoint holds of its optimizer has no parameter groups; it may "
            "be damaged. Name an older one of the run's checkpoints/ folder."
        ) from error
    mine = [len(group["params"]) for group in optimizer.param_groups]
    if theirs != mine:
        raise UserError(
            f"model.optimizer: the checkpoint's has parameter groups of {theirs} weights, this "
            f"run's has {mine}. Give --model.optimizer as the config.yaml of the run has it."
        )


def check_same_moments(saved: list[dict[str, Any]] | None, optimizer: Any) -> None:
    """Compare the moments in a checkpoint with the weights that they are of.

    Args:
        saved: `optimizer_states` of the checkpoint, see `check_same_groups`.
        optimizer: A new one over the parameters to train.

    Raises:
        UserError: If a moment has another shape than its weight, or is none.
    """
    if not saved:
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    states = saved[0].get("state", {})
    for number, weight in enumerate(weights):
        state = states.get(number, {}) if isinstance(states, dict) else None
        if not isinstance(state, dict):
            raise _damaged(f"the state of weight {number} is {printable(repr(state), 60)}")
        for name in _MOMENTS:
            found = state.get(name)
            # Those of quantized optimizers are of a class of their own.
            if type(found) is Tensor and found.shape != weight.shape:
                raise _damaged(
                    f"{name} of weight {number} has the shape {tuple(found.shape)}, the weight "
                    f"{tuple(weight.shape)}"
                )


def _damaged(what: str) -> UserError:
    return UserError(
        f"ckpt_path: training cannot go on with the checkpoint's optimizer: {what}. It may be "
        "damaged; name an older one of the run's checkpoints/ folder."
    )


def check_same_model(saved: dict[str, Any] | None, current: dict[str, Any]) -> None:
    """Compare the identity in a checkpoint with that of this run.

    Raises:
        UserError: If the checkpoint is of another model or method, or none of ours.
    """
    for name in ("architecture", "method", "adapter", "base model"):
        _check_same(name, _identity({IDENTITY_KEY: saved}), current)


def _check_same(name: str, saved: dict[str, Any], current: dict[str, Any]) -> None:
    # Checkpoints from before there were adapters name none, older ones fewer fields.
    mine, theirs = current[name], saved.get(name)
    if isinstance(mine, dict) and isinstance(theirs, dict) and name == "architecture":
        mine = {field: value for field, value in mine.items() if field in theirs}
    if theirs != mine:
        raise UserError(
            f"ckpt_path: the checkpoint is of another {name}: it was written for "
            f"{saved.get('model_name')} with {theirs}, this run has "
            f"{current['model_name']} with {mine}. Give the checkpoint of this run, "
            "or the config that wrote it."
        )


def _identity(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    saved = checkpoint.get(IDENTITY_KEY)
    if not isinstance(saved, dict):
        raise UserError(
            "ckpt_path: this checkpoint was not written by sdft_lightning. Load a model folder "
            "with --model.model_name instead."
        )
    return saved

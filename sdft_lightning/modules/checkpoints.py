"""What a module writes into a checkpoint, and which model and method one belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from sdft_lightning.errors import UserError, printable
from sdft_lightning.files.checkpoint_io import check_finite_checkpoint
from sdft_lightning.forward.policy import Policy
from sdft_lightning.models.lora import adapter_identity
from sdft_lightning.models.tokenization import config_value, load_config, load_tokenizer
from sdft_lightning.types import task_data

if TYPE_CHECKING:
    from sdft_lightning.modules.base import PolicyModule

IDENTITY_KEY = "sdft_lightning"
CAPABILITY_KEY = "sdft_lightning_capability"

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


class Checkpoints:
    """Writes down whose a checkpoint is, and refuses those of others.

    A module calls `save` and `load` from Lightning's hooks, `check` where a checkpoint can be read
    before a model is loaded, and `check_optimizer` when the optimizer is made.

    Args:
        module: Whose checkpoints.
    """

    def __init__(self, module: PolicyModule) -> None:
        self._module = module
        self._optimizer_states: list[dict[str, Any]] | None = None

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write down which model this is, and what it could do before training.

        Raises:
            UserError: If a weight is no number: no such checkpoint is written.
        """
        module = self._module
        check_finite_checkpoint(module, checkpoint)
        checkpoint[CAPABILITY_KEY] = module.evaluator.capability.state()
        checkpoint[IDENTITY_KEY] = {
            **self._identity(),
            "teacher": self._teacher,
            "optimizer": type(module.trial_optimizer()).__name__,
            "training_rows": self._training_rows(),
        }

    def _training_rows(self) -> int | None:
        """Rows of the fit under way; None outside of one."""
        trainer: Any = self._module._trainer
        data = task_data(trainer)
        fits = trainer is not None and trainer.state.fn == "fit"
        return len(data.training_rows()) if data is not None and fits else None

    def check(self, checkpoint: dict[str, Any], trains: bool) -> None:
        """Refuse, before a model is loaded, a checkpoint that cannot be used here.

        Args:
            checkpoint: Its content.
            trains: Whether training is to go on from it.

        Raises:
            UserError: See `check_takes`.
        """
        module = self._module
        teacher = self._teacher if module.loads_teacher else None
        optimizer = type(module.trial_optimizer()).__name__ if trains else None
        check_takes(checkpoint, type(module).__name__, teacher, optimizer)

    def load(self, checkpoint: dict[str, Any], in_fit: bool) -> None:
        """Refuse the checkpoint of another model, and leave out what this command does not use.

        Args:
            checkpoint: Its content; its `state_dict` is changed.
            in_fit: Whether the command is a fit.

        Raises:
            UserError: If it is one.
        """
        module = self._module
        weights = checkpoint.get("state_dict")  # None where the strategy has read them
        trains = in_fit and weights is not None
        self.check(checkpoint, trains)
        check_same_model(checkpoint.get(IDENTITY_KEY), self._identity())
        if weights is not None:
            unused = [f"{name}." for name, each in module.teachers.items() if not each.is_loaded]
            unused += [] if module.initial is not None else ["initial."]
            checkpoint["state_dict"] = used_weights(weights, unused, module.state_dict())
        self._optimizer_states = checkpoint.get("optimizer_states") if trains else None
        module.evaluator.capability.load(checkpoint.get(CAPABILITY_KEY))

    def check_optimizer(self, optimizer: Any) -> None:
        """Compare a new optimizer with what the checkpoint that was loaded last holds of its own.

        Args:
            optimizer: Over the parameters to train.

        Raises:
            UserError: If they do not fit each other.
        """
        check_same_groups(self._optimizer_states, optimizer)
        check_same_moments(self._optimizer_states, optimizer)
        self._optimizer_states = None

    def _identity(self) -> dict[str, Any]:
        module = self._module
        return model_identity(module.student, module.policy.name, type(module))

    @property
    def _teacher(self) -> str | None:
        teachers = self._module.teachers
        return next((type(teachers[name]).__name__ for name in teachers if name != "initial"), None)


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


def _kind(policy: Policy) -> tuple[dict[str, Any], dict[str, int]]:
    """A model's architecture and vocabulary."""
    vocabulary: dict[str, int] = load_tokenizer(policy.name, policy.revision).get_vocab()
    return _architecture(load_config(policy.name, policy.revision)), vocabulary


def check_same_kind(policy: Policy, original: Policy) -> None:
    """Compare two models by their configs and tokenizers, without loading their weights.

    Args:
        policy: The student.
        original: The model that it is said to come from.

    Raises:
        UserError: If their architectures or their vocabularies differ, or there is no such model.
    """
    student, words = _kind(policy)
    try:
        start, start_words = _kind(original)
    except UserError as error:
        raise UserError(str(error).replace("model.policy.", "model.original.")) from error
    for what, mine, theirs in (
        ("architecture", student, start),
        ("vocabulary", words, start_words),
    ):
        if mine != theirs:
            apart = sorted(
                key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)
            )
            raise UserError(
                f"model.original.name: {original.name} has another {what} than {policy.name} "
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
            "and train the exported folder under a new --run.name with --model.policy.name."
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


def used_weights(
    saved: dict[str, Tensor], unused: list[str], current: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weights in a checkpoint that a command uses, compared with those of this run's model.

    Args:
        saved: The weights in the checkpoint, by name.
        unused: What names begin with that are not wanted, e.g. those of a teacher.
        current: Those of the module.

    Raises:
        UserError: If names or shapes differ; names the first.
    """
    used = {name: value for name, value in saved.items() if not name.startswith(tuple(unused))}
    apart = sorted(
        name
        for name in used.keys() | current.keys()
        if name not in used or name not in current or used[name].shape != current[name].shape
    )
    if apart:
        name = apart[0]
        shapes = [tuple(each[name].shape) if name in each else "none" for each in (used, current)]
        raise UserError(
            f"ckpt_path: {len(apart)} weights of the checkpoint are not those of this run's model, "
            f"e.g. {name}: {shapes[0]} in the checkpoint, {shapes[1]} in the model. Give the "
            "checkpoint of this run, or the config that wrote it."
        )
    return used


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
            "with --model.policy.name instead."
        )
    return saved

"""Options of the modules that have another name or place than before."""

from __future__ import annotations

from collections.abc import Iterable

from sdft_lightning.errors import UserError

_POLICY = (
    "revision",
    "weights_dtype",
    "attn_implementation",
    "gradient_checkpointing",
    "lora",
    "quantization",
    "sampling_dtype",
)
# Old name below `model`: new name. What follows an old name stays behind the new one.
RENAMED = {
    "model_name": "policy.name",
    **{name: f"policy.{name}" for name in _POLICY},
    "eval_max_new_tokens": "evaluation.max_new_tokens",
    "teacher_accuracy_in_fit": "evaluation.teacher_in_fit",
    "mismatch_correction.kind": "mismatch.correction",
    "mismatch_correction": "mismatch",
    "sampler_alarm": "mismatch",
    "original_model_name": "original.name",
    "original_revision": "original.revision",
}


def new_name(old: str) -> str | None:
    """The name that an option of a module has now; None for one that was never renamed.

    Args:
        old: Below `model`, e.g. `lora.r`.
    """
    for before, now in RENAMED.items():
        if old == before or old.startswith(f"{before}."):
            return now + old.removeprefix(before)
    return None


def renamed_options(names: Iterable[str]) -> str:
    """One sentence for each option that was renamed; nothing where none was.

    Args:
        names: Below `model`.
    """
    found = {name: new_name(name) for name in names}
    return " ".join(
        f"model.{name} is model.{now} now." for name, now in found.items() if now is not None
    )


def check_arguments(owner: str, unknown: Iterable[str]) -> None:
    """Refuse keyword arguments that a constructor does not have.

    Args:
        owner: Name of the class.
        unknown: Names of the arguments.

    Raises:
        UserError: Names the new one where an argument was renamed.
        TypeError: If there never was such an argument.
    """
    names = list(unknown)
    if told := renamed_options(names):
        raise UserError(f"{owner}: {told}")
    if names:
        raise TypeError(f"{owner}() got an unexpected keyword argument {names[0]!r}")

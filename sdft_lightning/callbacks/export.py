"""Writes the student as a `save_pretrained` folder that transformers and vLLM load."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L

from sdft_lightning.errors import UserError, check_at_least, check_choice
from sdft_lightning.files.checkpoint_io import check_export
from sdft_lightning.files.run_folder import run_folder, unused_path
from sdft_lightning.files.whole_files import whole_folder
from sdft_lightning.models.lora import is_adapted, merged_copy, save_adapter
from sdft_lightning.models.randomness import base_config
from sdft_lightning.models.sharding import is_sharded, whole_state_dict
from sdft_lightning.models.tokenization import resolve_model

ExportFormat = Literal["merged", "adapter"]


class ExportModel(L.Callback):
    """Exports the student at the end of a fit, and at every n-th step if asked.

    Args:
        at_end: Export when training ends, to <run>/exported/final.
        every_n_steps: Optimizer steps between further exports, to <run>/exported/step-<n>; none
            without it.
        format: merged is a whole model, into which adapters are added; adapter is a folder of
            peft, for runs with LoRA.
    """

    def __init__(
        self,
        at_end: bool = True,
        every_n_steps: int | None = None,
        format: ExportFormat = "merged",
    ) -> None:
        if every_n_steps is not None:
            check_at_least("ExportModel.every_n_steps", every_n_steps, 1)
        self.at_end = at_end
        self.every_n_steps = every_n_steps
        self.format: ExportFormat = format
        self._exported_at = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse before training what could not be exported after it."""
        check_format(pl_module, self.format)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing is due before the next optimizer step, also in a resumed run."""
        self._exported_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Export, if the step's turn has come."""
        step = trainer.global_step
        due = self.every_n_steps is not None and step > 0 and step % self.every_n_steps == 0
        if due and step != self._exported_at:
            self._exported_at = step
            self._export(trainer, module, f"step-{step}")

    def on_fit_end(self, trainer: L.Trainer, module: Any) -> None:
        """Export the final student."""
        if self.at_end:
            self._export(trainer, module, "final")

    def _export(self, trainer: L.Trainer, module: Any, name: str) -> None:
        # Spread weights are gathered by all processes together.
        weights = whole_state_dict(module.student) if is_sharded(module.student) else None
        if trainer.is_global_zero:
            # A resumed run may come by here again; the older export stays.
            folder = unused_path(run_folder(trainer) / "exported" / name)
            export_model(module, folder, self.format, weights)


def export_model(
    module: Any,
    folder: str | Path,
    format: ExportFormat = "merged",
    weights: dict[str, Any] | None = None,
) -> None:
    """Save the student and its tokenizer, in safetensors.

    Args:
        module: A `PolicyModule` with its model loaded.
        folder: Must not exist yet; it appears when it is complete.
        format: merged or adapter, see `ExportModel`.
        weights: The student's whole weights by name, where it is spread over processes.

    Raises:
        UserError: If the student has no such format, or a weight is no number.
    """
    check_format(module, format)
    student = module.student
    folder = Path(folder)
    check_export(student.named_parameters() if weights is None else weights.items(), folder)
    with whole_folder(folder) as unfinished:
        if format == "adapter":
            save_adapter(
                student, unfinished, resolve_model(module.policy.name), module.policy.revision
            )
        else:
            model = merged_copy(student) if is_adapted(student) else student
            with base_config(model):
                model.save_pretrained(unfinished, state_dict=weights)
        module.tokenizer.save_pretrained(unfinished)


def check_format(module: Any, format: ExportFormat) -> None:
    """Refuse a format that a module cannot be exported in.

    Raises:
        UserError: If there are no adapters, or they cannot be merged.
    """
    check_choice("format", format, get_args(ExportFormat))
    if format == "adapter" and module.policy.lora is None:
        raise UserError(
            "format: got adapter, but this run trains the whole model and has no adapters. Use "
            "merged, or train with LoRA (--model.policy.lora.r=8)."
        )
    if format == "merged" and module.policy.quantization is not None:
        raise UserError(
            "format: got merged, but adapters cannot be added to 4-bit weights. Use adapter "
            "(--format=adapter; for the callback ExportModel, format: adapter) and merge with peft "
            "into the model as it was before quantization."
        )

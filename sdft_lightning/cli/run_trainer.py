"""Lightning's Trainer with the commands that are ours, and the config that a run leaves behind."""

from __future__ import annotations

import contextlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from sdft_lightning.callbacks.export import ExportFormat, Origin, check_format, export_model
from sdft_lightning.data import DemonstrationDataModule, ModelDataModule
from sdft_lightning.errors import UserError
from sdft_lightning.files.checkpoint_io import load_whole_checkpoint
from sdft_lightning.files.run_folder import LOCK, begun_elsewhere, is_requeued, run_folder
from sdft_lightning.files.texts import json_text
from sdft_lightning.models.tokenization import load_max_length
from sdft_lightning.modules import PolicyModule
from sdft_lightning.modules.checkpoints import IDENTITY_KEY
from sdft_lightning.preflight import Limits, Report, judge, run_preflight

_EVENTS = "events.out.tfevents"
# What Lightning and this callback write before anything is measured or trained.
_OF_THE_START = ("config.yaml", "hparams.yaml", _EVENTS)


class SaveRunConfig(SaveConfigCallback):
    """Writes config.yaml once; a resumed run adds config-1.yaml and so on.

    A command that ends in an error before it has measured or trained anything takes back what it
    wrote, so that the mended command may have the same name.
    """

    begun = False  # whether anything was measured or trained
    _new_folder: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the whole config of this command.

        Raises:
            UserError: If another run of this name has begun since the folder was looked at.
        """
        folder = run_folder(trainer)
        if not trainer.is_global_zero or self.already_saved:
            return
        # The trainer knows its checkpoint only after the hooks of set-up.
        anew = stage == "fit" and not self.config.get("ckpt_path") and not is_requeued()
        if anew and (folder / "config.yaml").exists():
            raise begun_elsewhere(folder)
        self._new_folder = folder if _is_new(folder) else None
        folder.mkdir(parents=True, exist_ok=True)
        path, number = folder / "config.yaml", 0
        while path.exists():
            number += 1
            path = folder / f"config-{number}.yaml"
        self.parser.save(self.config, path, overwrite=False, multifile=self.multifile)
        self.already_saved = True

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Set-up is over."""
        self.begun = True

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Set-up is over."""
        self.begun = True

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Set-up is over."""
        self.begun = True

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Set-up is over."""
        self.begun = True

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """From here on there is something to keep."""
        self._new_folder = None

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave no folder behind that holds nothing but a start."""
        folder = self._new_folder
        if folder is None:
            return
        written = [path for path in folder.iterdir() if path.name != LOCK]
        if not all(_is_of_the_start(path) for path in written):
            return
        with contextlib.suppress(OSError):  # the error that ended the command is what counts
            for path in written:
                path.unlink()
            folder.rmdir()  # where no lock is held


def _is_new(folder: Path) -> bool:
    """Whether there is nothing but what this process's logger has opened."""
    return not folder.exists() or all(
        path.name.startswith((_EVENTS, LOCK)) for path in folder.iterdir()
    )


def _is_of_the_start(path: Path) -> bool:
    return path.name.startswith(_OF_THE_START) and path.is_file()


class RunTrainer(L.Trainer):
    """Lightning's Trainer with the commands `export` and `preflight`."""

    def export(
        self,
        model: PolicyModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        output_dir: str | None = None,
        format: ExportFormat = "merged",
    ) -> Path:
        """Write a checkpoint as a folder that transformers and vLLM load.

        Args:
            model: Set from the model options.
            datamodule: Not used.
            ckpt_path: The checkpoint, or `last` for the newest of this run.
            output_dir: Where to write; <run>/exported/<checkpoint> without it. Must not exist.
            format: merged is a whole model, into which adapters are added; adapter is a folder of
                peft, for runs with LoRA.

        Returns:
            The folder.

        Raises:
            UserError: If there is no such checkpoint or format, or the folder exists.
        """
        if ckpt_path is None:
            raise UserError(
                "ckpt_path: export needs a checkpoint. Give --ckpt_path=last or the path of one."
            )
        path = Path(ckpt_path)
        default = Path(self.default_root_dir) / "exported" / path.stem
        folder = default if output_dir is None else Path(output_dir)
        if folder.exists():
            raise UserError(
                f"output_dir: {folder} exists already and is not overwritten. Name another with "
                "--output_dir."
            )
        check_format(model, format)
        checkpoint = load_whole_checkpoint(path)
        model.loads_teacher = False
        model.checkpoints.check(checkpoint, trains=False)
        model.configure_model()
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        ours = path.parent.name == "checkpoints"  # of a run's folder, whose records are read
        run = path.resolve().parents[1] if ours else None
        rows = checkpoint[IDENTITY_KEY].get("training_rows")
        export_model(model, folder, format, origin=Origin(run, checkpoint.get("global_step"), rows))
        print(f"Exported {path} to {folder}")
        return folder

    def check(self, model: PolicyModule, datamodule: ModelDataModule, command: str) -> None:
        """Read and check all data of a command, and its options, before a file is written.

        Args:
            model: The module.
            datamodule: Its data.
            command: fit, validate, test or predict.

        Raises:
            UserError: If a file, a row or an option is wrong.
        """
        self.strategy.connect(model)  # the data module asks the trainer for its module
        datamodule.trainer = self
        datamodule.prepare_data()
        datamodule.setup(command)
        model.checks.ahead(self, command, datamodule)

    def preflight(
        self,
        model: PolicyModule,
        datamodule: DemonstrationDataModule,
        rows: int = 32,
        limits: Limits = Limits(),  # noqa: B008 - frozen
    ) -> Report:
        """Measure on a sample of training rows whether a run can work; nothing is trained.

        Prints the report and the verdict, and writes both to preflight.json. The exit code of the
        command is the verdict's: 0 (go), 1 (warn) or 2 (use SFT); 2 also for bad input.

        Args:
            model: Set from the model options; an SDFTModule itself.
            datamodule: Set from the data options.
            rows: Size of the sample.
            limits: What the verdict asks for.

        Returns:
            The report.

        Raises:
            UserError: If the module has no teacher, or one that is not shown demonstrations while
                the student samples.
        """
        if not model.has_preflight:
            raise UserError(
                "model: preflight measures a teacher with demonstrations on completions of the "
                f"student, and {type(model).__name__} has none. Give --model=SDFTModule."
            )
        with ExitStack() as meanwhile:
            if isinstance(datamodule, DemonstrationDataModule):  # benchmarks alone are refused
                meanwhile.enter_context(datamodule.for_preflight())
            self.check(model, datamodule, "fit")
            model.checks.forget()  # a fit that follows is one of more rows
            datamodule.check_training_references()
            model.configure_model()
            model.trainer = self
            model.to(self.strategy.root_device)
            max_length = load_max_length(model.policy.name, model.tokenizer, model.policy.revision)
            model.check_models()
            seed, window = datamodule.seed, self.accumulate_grad_batches
            with self.precision_plugin.forward_context():
                report = run_preflight(model, datamodule, rows, seed, max_length, window)
        verdict = judge(report, limits)
        path = Path(self.default_root_dir) / "preflight.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"verdict": verdict.name, "reasons": verdict.reasons, **report.as_dict()}
        path.write_text(json_text(found, indent=2) + "\n", encoding="utf-8")
        print(report.table())
        print(f"\nVerdict: {verdict.name}" + "".join(f"\n- {why}" for why in verdict.reasons))
        print(f"Written to {path}")
        return report

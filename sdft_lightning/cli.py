"""The command line: LightningCLI's commands, `preflight`, `export`, `continual` and `report`."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sdft_lightning.callbacks import (
    MetricsLog,
    PredictionWriter,
    ResultTable,
    RunProgressBar,
    SaveOnSignal,
    ValidateAtEnds,
    WindowCheckpoint,
)
from sdft_lightning.checkpoint_io import WholeCheckpointIO
from sdft_lightning.config_files import check_config_files
from sdft_lightning.continual import run_continual
from sdft_lightning.data import BenchmarkDataModule, DemonstrationDataModule, ModelDataModule
from sdft_lightning.data.benchmarks import Benchmarks
from sdft_lightning.data.loader import dead_worker
from sdft_lightning.endpoints import check_no_secrets
from sdft_lightning.errors import UserError
from sdft_lightning.foreign_text import harmless, printable
from sdft_lightning.modules import PolicyModule
from sdft_lightning.modules.monitors import check_monitors
from sdft_lightning.modules.whole_windows import check_whole_windows
from sdft_lightning.quiet import print_anything, quieten
from sdft_lightning.report import report_command
from sdft_lightning.run_config import SaveRunConfig
from sdft_lightning.run_folder import (
    check_run_folder,
    command_folder,
    is_deepspeed_folder,
    load_whole_checkpoint,
    named_folder,
    one_writer,
    requeued_checkpoint,
    resolve_checkpoint,
)
from sdft_lightning.run_trainer import RunTrainer
from sdft_lightning.setup_errors import setup_error
from sdft_lightning.shared_memory import clear_shared_memory
from sdft_lightning.trainer_options import check_trainer_options, check_values
from sdft_lightning.whole_files import check_can_make, no_room
from sdft_lightning.yaml_text import bound_config_files

log = logging.getLogger(__name__)

_LARGEST_SEED = 2**32 - 1
# What a shell reports of a process that the signal ended.
_TERMINATED, _INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT
_DATA_MODULES: dict[str, type[ModelDataModule]] = {
    each.__name__: each for each in (DemonstrationDataModule, BenchmarkDataModule)
}
_DESCRIPTIONS = {
    "fit": "Train: see configs/ for whole runs, e.g. --config configs/quickstart.yaml.",
    "validate": "Accuracy of student and teacher on the validation split, and on held-out sets.",
    "test": "Accuracy of student and teacher on the test split, and on held-out sets.",
    "predict": "Answer the questions of data.predict greedily, into predictions.jsonl.",
    "preflight": "Before training: is the teacher better than the student? go, warn or use SFT.",
    "export": "Write a checkpoint as a save_pretrained folder for transformers and vLLM.",
}


class SDFTCLI(LightningCLI):
    """LightningCLI with one folder a run, and the model's name given once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with contextlib.ExitStack() as self._held:
            try:
                super().__init__(*args, **kwargs)
            except Exception as error:
                found = None if self._has_begun() else setup_error(error, self._options())
                if found is None:
                    raise
                raise found from error

    def _has_begun(self) -> bool:
        """Whether anything was measured or trained."""
        callbacks: list[Any] = getattr(getattr(self, "trainer", None), "callbacks", [])
        return any(isinstance(each, SaveRunConfig) and each.begun for each in callbacks)

    def _options(self) -> dict[str, Any]:
        """The command's options, as far as they were read."""
        config = getattr(self, "config", None) or {}
        found: dict[str, Any] = config.get(config.get("subcommand")) or {}
        return found

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands and ours, with the arguments that the CLI itself sets."""
        ours = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "preflight": ours, "export": ours}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name and its checkpoints, and link what is given once."""
        parser.add_argument(
            "--run.name", type=str, default="default", help="Name of the run and of its folder."
        )
        parser.add_argument("--run.root", type=str, default="runs", help="Folder of all runs.")
        parser.add_lightning_class_args(WindowCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "step-{step}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.save_last": True,
            }
        )
        for name in ("model_name", "revision"):
            parser.link_arguments(f"model.init_args.{name}", f"data.{name}")
        has_seed = self.datamodule_class is DemonstrationDataModule
        for target in ("model.init_args.seed", *(["data.seed"] if has_seed else [])):
            parser.link_arguments("seed_everything", target, compute_fn=_seed)

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if "verbose" in self._subcommand_method_arguments[subcommand]:
            # `ResultTable` prints one table; Lightning would print one for each loader.
            parser.set_defaults({"verbose": False})
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Refuse secrets among the options, and values that no library takes."""
        super().parse_arguments(parser, args)
        check_no_secrets(self.config[self.config["subcommand"]])
        check_values(self.config[self.config["subcommand"]])
        seed = self.config[self.config["subcommand"]]["seed_everything"]
        if not isinstance(seed, bool) and not 0 <= int(seed or 0) <= _LARGEST_SEED:
            raise UserError(
                f"seed_everything: got {seed}, allowed is 0 to {_LARGEST_SEED}. Give another seed."
            )

    def before_instantiate_classes(self) -> None:
        """Refuse a folder in use and a missing checkpoint before anything is loaded."""
        command = self.config["subcommand"]
        config = self.config[command]
        check_trainer_options(config["trainer"], command)
        if config["checkpoint"]["dirpath"] is not None:
            check_can_make(Path(config["checkpoint"]["dirpath"]), "checkpoint.dirpath")
        self.run_folder = named_folder(config["run"]["root"], config["run"]["name"])
        self._keep_to_one_writer(command)
        if "ckpt_path" in config:  # preflight has none
            config["ckpt_path"] = resolve_checkpoint(config["ckpt_path"], self.run_folder)
        if command == "fit":
            config["ckpt_path"] = config["ckpt_path"] or requeued_checkpoint(self.run_folder)
            check_run_folder(self.run_folder, config["ckpt_path"])
        self.folder = command_folder(self.run_folder, command)

    def _keep_to_one_writer(self, command: str) -> None:
        if command != "export":
            check_can_make(self.run_folder)
        with contextlib.suppress(OSError):  # a folder to read from only: an export goes elsewhere
            self._held.enter_context(one_writer(self.run_folder))
        clear_shared_memory()

    def before_fit(self) -> None:
        """Check all data and the checkpoint before Lightning writes its first file."""
        self._check("fit")

    def before_validate(self) -> None:
        """As `before_fit`."""
        self._check("validate")

    def before_test(self) -> None:
        """As `before_fit`."""
        self._check("test")

    def before_predict(self) -> None:
        """As `before_fit`."""
        self._check("predict")

    def before_preflight(self) -> None:
        """As `before_fit`, without the benchmarks, which it does not measure.

        Rows that are too long do not end it: it says how many there are.
        """
        if self._has_rows:
            self.datamodule.benchmark_data.benchmarks = Benchmarks()
            self.datamodule.count_too_long = True
        self._check("fit")
        self.datamodule.check_training_references()

    @property
    def _has_rows(self) -> bool:
        """Whether there is more than benchmarks."""
        return isinstance(self.datamodule, DemonstrationDataModule)

    def _check(self, command: str) -> None:
        self.datamodule.trainer = self.trainer
        if self._has_rows:
            self.datamodule.row_needs = self.model.row_needs
        self.datamodule.prepare_data()
        self.datamodule.setup(command)
        # Rows that are too long `preflight` tells among other things.
        if self._has_rows and not self.datamodule.count_too_long:
            self.datamodule.check_model_takes(self.model.new_tokens, self.model.eval_max_new_tokens)
        if command == "fit":
            self.model.check_before_fit(self.datamodule.training_rows())
            check_whole_windows(self.trainer, self.datamodule.batches_per_epoch)
            check_monitors(self.model, self.trainer, self.datamodule)
            ends = self.trainer.max_steps != -1 or self.trainer.max_epochs not in (None, -1)
            self.model.schedule.check_end(ends)
        path = self._get(self.config, "ckpt_path")
        if command != "fit":
            self._tell_weights(path)
        # DeepSpeed's folders are read, and checked, when its strategy has started.
        if path is not None and not is_deepspeed_folder(path):
            checkpoint = load_whole_checkpoint(path)
            self.model.plan_models(self.trainer, command, self.datamodule)
            self.model.check_checkpoint(checkpoint, trains=command == "fit")
            self.model.configure_model()
            self.model.on_load_checkpoint(checkpoint)

    def _tell_weights(self, path: str | None) -> None:
        """Say whose weights are measured, which no figure shows."""
        if path is not None:
            log.info(f"weights: the checkpoint {path}")
            return
        hint = ""
        if (self.run_folder / "checkpoints").is_dir():
            hint = "; --ckpt_path=last takes the newest checkpoint of this run"
        log.info(f"weights: {self.model.model_name} as it is, without a checkpoint{hint}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that writes below the run's folder only."""
        logger = self._get(self.config_init, "trainer").get("logger")
        if logger is None or logger is True:
            kwargs["logger"] = TensorBoardLogger(str(self.folder), name="", version="")
        kwargs["default_root_dir"] = str(self.folder)
        options = self._get(self.config_init, "trainer")
        if options["max_epochs"] is None and options["max_steps"] == -1:
            kwargs["max_epochs"] = 1  # as in the paper; Lightning would take 1000
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # the user named no other
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        # What is always on would contradict the options that turn it off.
        if config.get("enable_checkpointing") is False:
            callbacks = [each for each in callbacks if not isinstance(each, Checkpoint)]
        own_bar = any(isinstance(each, ProgressBar) for each in config.get("callbacks") or [])
        if own_bar or config.get("enable_progress_bar") is False:
            ours = self.trainer_defaults["callbacks"]
            kept = [each for each in ours if not isinstance(each, ProgressBar)]
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": kept}
        return super()._instantiate_trainer(config, callbacks)

    def _parse_ckpt_path(self) -> None:
        """Checkpoints hold no options: the config of the run does."""


def _seed(value: Any) -> int:
    """The seed as a number; `true` and `false` leave the default."""
    return 42 if isinstance(value, bool) else int(value)


def main(args: ArgsType = None) -> None:
    """Run a command.

    Args:
        args: The command line as a list; that of the process without it.

    Exits with code 2 and a message where the user gave something wrong, and with 128 plus
    the signal's number after SIGTERM (143), SIGHUP (129) or Ctrl-C (130).
    """
    print_anything()
    quieten()
    given = sys.argv[1:] if args is None else args
    words = list(given) if isinstance(given, list) else []
    command = words[0] if words else None
    try:
        check_config_files(words)
        # Two commands without a model and a trainer, which LightningCLI would build.
        if command == "continual":
            run_continual(words[1:], main, run_problem)
        elif command == "report":
            report_command(words[1:])
        else:
            _run_command(args)
    except SIGTERMException as stop:
        raise SystemExit(stop.code or _TERMINATED) from stop
    except KeyboardInterrupt as stop:
        raise _interrupted() from stop
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        raise _interrupted() from stop  # Lightning makes it an exit with code 1
    except (ArgumentError, ValueError, RuntimeError, OSError) as error:
        found = _user_error(error)
        if found is None and isinstance(error, OSError):  # of files that a library opens
            found = _too_long(error) or no_room(error, error.filename or "a file of the run")
        if found is None:
            raise
        print(f"error: {harmless(str(found))}", file=sys.stderr)
        raise SystemExit(2) from error


def _interrupted() -> SystemExit:
    print("Interrupted.", file=sys.stderr)
    return SystemExit(_INTERRUPTED)


def _chosen_data_module(args: ArgsType) -> tuple[type[ModelDataModule], ArgsType]:
    """The class that `--data=<class>` names, and the other arguments.

    The parser is made for one class, so that `--help` explains its options.
    """
    words = sys.argv[1:] if args is None else args
    chosen: type[ModelDataModule] = DemonstrationDataModule
    if not isinstance(words, list):
        return chosen, args
    words, left = list(words), []
    for place in reversed([place for place, word in enumerate(words) if word == "--data"]):
        words[place : place + 2] = ["=".join(words[place : place + 2])]
    for word in words:
        option, _, value = word.partition("=")
        found = _DATA_MODULES.get(value.rpartition(".")[2]) if option == "--data" else None
        if found is None:
            left.append(word)
        else:
            chosen = found
    if len(left) == len(words):
        return chosen, args
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    return chosen, left


def _run_command(args: ArgsType) -> None:
    bound_config_files()
    data_module, args = _chosen_data_module(args)
    SDFTCLI(
        PolicyModule,
        data_module,
        subclass_mode_model=True,
        trainer_class=RunTrainer,
        trainer_defaults={
            "callbacks": [
                MetricsLog(),
                PredictionWriter(),
                ResultTable(),
                RunProgressBar(),
                SaveOnSignal(),
                ValidateAtEnds(),
            ]
        },
        save_config_callback=SaveRunConfig,
        parser_kwargs={
            "description": "Self-distillation fine-tuning: a new skill, old ones kept. Besides the "
            "commands below there are `continual` (methods x stages x seeds from one YAML) and "
            "`report` (tables, plots and a page of its results).",
            "exit_on_error": False,  # which prints a page of options before the error
            **{
                name: {"description": text, "exit_on_error": False}
                for name, text in _DESCRIPTIONS.items()
            },
        },
        seed_everything_default=42,
        auto_configure_optimizers=False,
        args=args,
    )


def run_problem(command: str, options: str) -> str:
    """What the command's own parser finds wrong with options in JSON, or nothing."""
    before, sys.argv = sys.argv, sys.argv[:1]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _run_command([command, f"--config={options}", "--print_config"])
    except SystemExit as stop:
        if stop.code in (None, 0):
            return ""
        return str(stop.__context__ or f"exit code {stop.code}")
    except (ArgumentError, ValueError) as error:
        return str(_user_error(error) or error)
    finally:
        sys.argv = before
    raise AssertionError("--print_config ends the command")


def _too_long(error: OSError) -> UserError | None:
    if error.errno != errno.ENAMETOOLONG:
        return None
    return UserError(
        f"there is no file {printable(str(error.filename), 80)}: the name is longer than a file "
        "system takes. Correct the option that names it."
    )


def _user_error(error: BaseException) -> BaseException | None:
    """The error that the user can mend, also where jsonargparse or torch has wrapped it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        if isinstance(cause, RuntimeError) and dead_worker(cause) is not None:
            return dead_worker(cause)  # raised wherever the program was when the worker died
        cause = cause.__cause__ or cause.__context__
    return error if isinstance(error, ArgumentError) else None


if __name__ == "__main__":
    main()

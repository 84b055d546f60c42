"""The commands that build a model, a data module and a trainer, through LightningCLI."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sdft_lightning.callbacks import CHECKPOINT_OPTIONS, WindowCheckpoint, default_callbacks
from sdft_lightning.cli.entry import DESCRIPTIONS, INTRODUCTION, user_error
from sdft_lightning.cli.run_trainer import RunTrainer, SaveRunConfig
from sdft_lightning.cli.setup_errors import setup_error
from sdft_lightning.data import BenchmarkDataModule, DemonstrationDataModule, ModelDataModule
from sdft_lightning.errors import UserError, quieten_transformers
from sdft_lightning.files.checkpoint_io import load_whole_checkpoint
from sdft_lightning.files.endpoints import check_no_secrets
from sdft_lightning.files.run_folder import (
    check_run_folder,
    command_folder,
    named_folder,
    one_writer,
    requeued_checkpoint,
    resolve_checkpoint,
)
from sdft_lightning.files.shared_memory import clear_shared_memory
from sdft_lightning.files.texts import bound_config_files
from sdft_lightning.files.whole_files import check_can_make
from sdft_lightning.modules import PolicyModule
from sdft_lightning.modules.run_checks import check_trainer_options, check_values
from sdft_lightning.preflight import Limits, judge

log = logging.getLogger(__name__)

_LARGEST_SEED = 2**32 - 1
# What a shell reports of a process that the signal ended.
_TERMINATED = 128 + signal.SIGTERM
_DATA_MODULES: dict[str, type[ModelDataModule]] = {
    each.__name__: each for each in (DemonstrationDataModule, BenchmarkDataModule)
}


# What a help page begins with: option, its value, what it says where the parser has no such option.
# Their order is that in which a first command is written.
_COMMON = (
    ("--config", "FILE", ""),
    ("--run.name", "NAME", ""),
    ("--model", "CLASS", "The method: SDFTModule, SFTModule, DFTModule and others."),
    ("--model.policy.name", "NAME", "The model: a folder, a name on the Hub, or embedded."),
    ("--data.train", "FILE", ""),
    ("--data.validation", "FILE", ""),
    ("--data.test", "FILE", ""),
    ("--data.predict", "FILE", ""),
    ("--data.grader", "NAME", ""),
    ("--data.batch_size", "N", ""),
    ("--trainer.accumulate_grad_batches", "N", "Batches that make one optimizer step."),
    ("--trainer.max_epochs", "N", "Passes over the data; one, unless epochs or steps are given."),
    ("--model.optimizer.init_args.lr", "RATE", "The learning rate."),
    ("--rows", "N", ""),
    ("--ckpt_path", "PATH", "A checkpoint, or last for the newest of this run."),
    ("--output_dir", "FOLDER", ""),
    ("--format", "NAME", ""),
)
_OF_TRAINING = {
    "--data.train",
    "--data.batch_size",
    "--trainer.accumulate_grad_batches",
    "--trainer.max_epochs",
    "--model.optimizer.init_args.lr",
}
_NOT_COMMON = {
    "fit": {"--data.test", "--data.predict"},
    "validate": {*_OF_TRAINING, "--data.test", "--data.predict"},
    "test": {*_OF_TRAINING, "--data.validation", "--data.predict"},
    "predict": {*_OF_TRAINING, "--data.validation", "--data.test", "--data.grader"},
    "preflight": {"--data.test", "--data.predict", "--trainer.max_epochs"},
    "export": {
        *_OF_TRAINING,
        "--data.validation",
        "--data.test",
        "--data.predict",
        "--data.grader",
    },
}


class RunParser(LightningArgumentParser):
    """Lightning's parser, whose help begins with the options that most commands are made of."""

    command: str | None = None

    def format_help(self, *args: Any) -> str:
        """The common options in a line each, then all of them with types and defaults."""
        self.prog = self.prog.replace(" [options]", "")
        for group in self._action_groups:
            names = sorted((action.dest for action in group._group_actions), key=len)
            begin = names[0] if names else ""
            together = begin and all(f"{name}.".startswith(f"{begin}.") for name in names)
            if together and group.title and not group.title.startswith("--"):
                group.title = f"--{begin}: {group.title}"
        text = super().format_help(*args)
        if self.command is None:
            return text
        _usage, _, text = text.partition("\n\n")  # a page of all options
        description, _, text = text.partition("\n\n")
        usage = f"usage: {self.prog} [--config FILE]... [--OPTION=VALUE]..."
        return f"{usage}\n\n{description}\n\n{self._common_options()}\n{text}"

    def _common_options(self) -> str:
        known = {word: action for action in self._actions for word in action.option_strings}
        lines = ["common options:"]
        for option, value, told in _COMMON:
            of_model = option.startswith("--model.")  # of the class that --model names
            if option in _NOT_COMMON[str(self.command)] or not (of_model or option in known):
                continue
            if not told:
                told = " ".join(str(known[option].help).split()).partition(". ")[0]
                told = f"{told.rstrip('.')}."
            lines += textwrap.wrap(
                told,
                width=98,
                initial_indent=f"  {f'{option} {value}':<37} ",
                subsequent_indent=" " * 40,
            )
        lines += [
            "",
            "`--config` may be repeated, later files and options win; preset:<name> is a file that",
            "this package ships. `--print_config` shows what a command comes to, and",
            f"`{self.prog} --model.help=SDFTModule` the options of a method. All options follow.",
        ]
        return "\n".join(lines) + "\n"


class SDFTCLI(LightningCLI):
    """LightningCLI with one folder a run, and the model's name given once.

    Args:
        args: `LightningCLI`'s.
        command: The only command whose options are wanted; of all of them without it.
        kwargs: `LightningCLI`'s.
    """

    trainer: RunTrainer

    def __init__(self, *args: Any, command: str | None = None, **kwargs: Any) -> None:
        self._command = command
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
            {f"checkpoint.{name}": value for name, value in CHECKPOINT_OPTIONS.items()}
        )
        for name, target in (("name", "model_name"), ("revision", "revision")):
            parser.link_arguments(f"model.init_args.policy.{name}", f"data.{target}")
        has_seed = self.datamodule_class is DemonstrationDataModule
        for target in ("model.init_args.seed", *(["data.seed"] if has_seed else [])):
            parser.link_arguments("seed_everything", target, compute_fn=_seed)

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        if self._command not in (None, subcommand):  # reading the classes' options takes seconds
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        assert isinstance(parser, RunParser)
        parser.command = subcommand
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

    def preflight(self, limits: Limits, **options: Any) -> None:
        """Measure, and exit with the verdict's code unless it is 0 (go)."""
        report = self.trainer.preflight(limits=limits, **options)
        code = judge(report, limits).exit_code
        if code:
            raise SystemExit(code)

    def _check(self, command: str) -> None:
        self.trainer.check(self.model, self.datamodule, command)
        path = self._get(self.config, "ckpt_path")
        if command != "fit":
            self._tell_weights(path)
        if path is not None:
            checkpoint = load_whole_checkpoint(path)
            self.model.plan_models(self.trainer, command, self.datamodule)
            self.model.checkpoints.check(checkpoint, trains=command == "fit")
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
        log.info(f"weights: {self.model.policy.name} as it is, without a checkpoint{hint}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that writes below the run's folder only."""
        logger = self._get(self.config_init, "trainer").get("logger")
        if logger is None or logger is True:
            kwargs["logger"] = TensorBoardLogger(str(self.folder), name="", version="")
        kwargs["default_root_dir"] = str(self.folder)
        options = self._get(self.config_init, "trainer")
        if options["max_epochs"] is None and options["max_steps"] == -1:
            kwargs["max_epochs"] = 1  # as in the paper; Lightning would take 1000
        return super().instantiate_trainer(**kwargs)

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


def run_command(args: ArgsType, command: str | None) -> None:
    """Carry out a command of LightningCLI's or of our trainer's.

    Args:
        args: The command line as a list; that of the process without it.
        command: The command that it begins with; None where a config file names it.
    """
    quieten_transformers()
    try:
        _run_cli(args, command)
    except SIGTERMException as stop:
        raise SystemExit(stop.code or _TERMINATED) from stop


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
        package, _, name = value.rpartition(".")
        ours = option == "--data" and package.partition(".")[0] in ("", "sdft_lightning")
        found = _DATA_MODULES.get(name) if ours else None
        if found is None:
            left.append(word)
        else:
            chosen = found
    if len(left) == len(words):
        return chosen, args
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    return chosen, left


def _run_cli(args: ArgsType, command: str | None) -> None:
    bound_config_files()
    data_module, args = _chosen_data_module(args)
    SDFTCLI(
        PolicyModule,
        data_module,
        subclass_mode_model=True,
        parser_class=RunParser,
        trainer_class=RunTrainer,
        trainer_defaults={"callbacks": default_callbacks(checkpoints=False)},
        save_config_callback=SaveRunConfig,
        parser_kwargs={
            "prog": "sdft",
            "description": INTRODUCTION,
            "exit_on_error": False,  # which prints a page of options before the error
            **{
                name: {"description": text, "exit_on_error": False}
                for name, text in DESCRIPTIONS.items()
            },
        },
        seed_everything_default=42,
        auto_configure_optimizers=False,
        args=args,
        command=command,
    )


def run_problem(command: str, options: str) -> str:
    """What the command's own parser finds wrong with options in JSON, or nothing."""
    before, sys.argv = sys.argv, sys.argv[:1]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _run_cli([command, f"--config={options}", "--print_config"], command)
    except SystemExit as stop:
        if stop.code in (None, 0):
            return ""
        return str(stop.__context__ or f"exit code {stop.code}")
    except (ArgumentError, ValueError) as error:
        return str(user_error(error) or error)
    finally:
        sys.argv = before
    raise AssertionError("--print_config ends the command")

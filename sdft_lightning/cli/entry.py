"""The way in: words to a command, and errors to one sentence with an exit code.

Nothing here imports torch, Lightning or transformers before the words are known to be a command
of theirs: they take some ten seconds on two cores.
"""

from __future__ import annotations

import errno
import signal
import sys
from argparse import ArgumentError, ArgumentParser
from typing import TYPE_CHECKING, NoReturn

from sdft_lightning.cli.config_files import check_config_files
from sdft_lightning.cli.option_names import check_trainer_names
from sdft_lightning.errors import UserError
from sdft_lightning.errors.foreign_text import harmless, printable
from sdft_lightning.errors.quiet import print_anything, quieten_notices
from sdft_lightning.files.whole_files import no_room

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType

INTRODUCTION = "Self-distillation fine-tuning: a new skill, old ones kept."
# Commands that build a model, a data module and a trainer.
DESCRIPTIONS = {
    "fit": "Train: see configs/ for whole runs, e.g. --config configs/quickstart.yaml.",
    "validate": "Accuracy of student and teacher on the validation split, and on held-out sets.",
    "test": "Accuracy of student and teacher on the test split, and on held-out sets.",
    "predict": "Answer the questions of data.predict greedily, into predictions.jsonl.",
    "preflight": "Before training: is the teacher better than the student? go, warn or use SFT.",
    "export": "Write a checkpoint as a save_pretrained folder for transformers and vLLM.",
}
# Commands that build none of them.
_OTHERS = {
    "continual": "Methods x stages x seeds from one YAML; started again, it goes on where it was.",
    "report": "Tables, plots, paired tests and one HTML page from results of `continual`.",
}
# Options that may stand before a command: LightningCLI reads them.
_BEFORE = ("-c", "--config", "--print_config")
_INTERRUPTED = 128 + signal.SIGINT  # what a shell reports of a process that the signal ended


def main(args: ArgsType = None) -> None:
    """Run a command.

    Args:
        args: The command line as a list; that of the process without it.

    Exits with code 2 and a message where the user gave something wrong, and with 128 plus
    the signal's number after SIGTERM (143), SIGHUP (129) or Ctrl-C (130).
    """
    print_anything()
    quieten_notices()
    given = sys.argv[1:] if args is None else args
    words = list(given) if isinstance(given, list) else None
    try:
        if words is None:
            _run_command(args, None)
        else:
            _dispatch(words, args)
    except KeyboardInterrupt as stop:
        raise _interrupted() from stop
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        raise _interrupted() from stop  # Lightning makes it an exit with code 1
    except (ArgumentError, ValueError, RuntimeError, OSError) as error:
        found = user_error(error)
        if found is None and isinstance(error, OSError):  # of files that a library opens
            found = _too_long(error) or no_room(error, error.filename or "a file of the run")
        if found is None:
            raise
        print(f"error: {harmless(str(found))}", file=sys.stderr)
        raise SystemExit(2) from error


def _dispatch(words: list[str], args: ArgsType) -> None:
    command = words[0] if words else None
    if command in ("-h", "--help"):
        print(_help(), end="")
        raise SystemExit(0)
    check_config_files(words)
    # Two commands without a model and a trainer, which LightningCLI would build.
    if command == "continual":
        from sdft_lightning.continual import run_continual

        run_continual(words[1:], main, _run_problem)
    elif command == "report":
        from sdft_lightning.continual.report import report_command

        report_command(words[1:])
    elif command in DESCRIPTIONS:
        check_trainer_names(words)
        _run_command(args, command)
    elif command is not None and command.partition("=")[0] in _BEFORE:
        _run_command(args, None)
    else:
        _refuse(command)


def _run_command(args: ArgsType, command: str | None) -> None:
    from sdft_lightning.cli.command import run_command

    run_command(args, command)


def _run_problem(command: str, options: str) -> str:
    from sdft_lightning.cli.command import run_problem

    return run_problem(command, options)


def _refuse(word: str | None) -> NoReturn:
    """No command begins with this word."""
    listed = ", ".join([*DESCRIPTIONS, *_OTHERS])
    if word is None:
        raise UserError(f"no command was given. Name one of {listed}; `sdft --help` explains them.")
    if word.startswith("-"):
        raise UserError(
            f"unrecognized arguments: {printable(word)}. A command comes first, one of {listed}; "
            "its options follow it."
        )
    raise UserError(f"there is no command {printable(word)!r}. Name one of {listed}.")


def _help() -> str:
    """What `sdft --help` prints: all commands, each in a line."""
    parser = ArgumentParser(prog="sdft", description=INTRODUCTION, allow_abbrev=False)
    parser.add_argument(
        "-c",
        "--config",
        help="file of options, in YAML, that names the command and holds its options",
    )
    parser.add_argument(
        "--print_config",
        nargs="?",
        help="print the options of that file with all defaults, and end",
    )
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", description="`sdft COMMAND --help` lists its options."
    )
    for name, text in {**DESCRIPTIONS, **_OTHERS}.items():
        commands.add_parser(name, help=text)
    return parser.format_help()


def _interrupted() -> SystemExit:
    print("Interrupted.", file=sys.stderr)
    return SystemExit(_INTERRUPTED)


def _too_long(error: OSError) -> UserError | None:
    if error.errno != errno.ENAMETOOLONG:
        return None
    return UserError(
        f"there is no file {printable(str(error.filename), 80)}: the name is longer than a file "
        "system takes. Correct the option that names it."
    )


def user_error(error: BaseException) -> BaseException | None:
    """The error that the user can mend, also where jsonargparse or torch has wrapped it.

    Args:
        error: What was raised.

    Returns:
        The cause to print; None for faults of the program.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        if isinstance(cause, RuntimeError):
            from sdft_lightning.data.loader import dead_worker

            if dead_worker(cause) is not None:
                return dead_worker(cause)  # raised wherever the program was when the worker died
        cause = cause.__cause__ or cause.__context__
    return error if isinstance(error, ArgumentError) else None

"""The way in: words to a command, and errors to one sentence with an exit code.

Nothing here imports torch, Lightning or transformers before the words are known to be a command
of theirs: they take some ten seconds on two cores.
"""

from __future__ import annotations

import ast
import errno
import signal
import sys
import warnings
from argparse import ArgumentError, ArgumentParser
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import yaml

from sdft_lightning import __version__
from sdft_lightning.data.sources import PRESET_PREFIX, preset_path
from sdft_lightning.errors import UserError, harmless, print_anything, printable, quieten_notices
from sdft_lightning.files.texts import check_yaml
from sdft_lightning.files.whole_files import no_room

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType


# The options that take files of options; a plan's only the first.
_CONFIG = ("--config", "-c")


def _preset_or_same(text: str) -> str:
    return str(preset_path(text, "config")) if text.startswith(PRESET_PREFIX) else text


def with_presets(words: Sequence[str]) -> list[str]:
    """The command line with the paths of the files that `--config preset:<name>` stands for.

    Args:
        words: The command line.

    Raises:
        UserError: If this package ships no such file.
    """
    found = list(words)
    for place, word in enumerate(words):
        name, equals, given = word.partition("=")
        if name in _CONFIG and equals:
            found[place] = f"{name}={_preset_or_same(given)}"
        elif place and words[place - 1] in _CONFIG:
            found[place] = _preset_or_same(word)
    return found


_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def check_config_files(words: Sequence[str]) -> None:
    """Refuse files of options that cannot be read, or of which a part would be lost in silence.

    Args:
        words: The command line.

    Raises:
        UserError: Names the file and the line.
    """
    for path in _config_files(words):
        try:
            text = path.read_text(encoding="utf-8")
            check_yaml(text, f"config: {path}")
            root = yaml.compose(text, yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
            raise UserError(
                f"config: {path}{line} is no YAML: {error.problem or error.context}. Options are "
                "written as name: value, indented with blanks."
            ) from error
        except (yaml.YAMLError, UnicodeError, RecursionError, OSError) as error:
            raise UserError(
                f"config: {path} cannot be read as YAML ({type(error).__name__}). Name a text file "
                "of options."
            ) from error
        if not isinstance(root, yaml.MappingNode):
            raise UserError(
                f"config: {path} holds no options. Write them as name: value, e.g. trainer: "
                "{max_steps: 100}."
            )
        _check_names(root, path, set())


def _config_files(words: Sequence[str]) -> Iterator[Path]:
    for place, word in enumerate(words):
        name, equals, given = word.partition("=")
        if name not in _CONFIG:
            continue
        text = given if equals else next(iter(words[place + 1 : place + 2]), "")
        if len(text) < 4096 and "\n" not in text and Path(text).is_file():
            yield Path(text)


def _check_names(node: yaml.Node, path: Path, seen: set[int]) -> None:
    """Refuse tags that plain YAML has not, and names that are no text or stand twice."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if node.tag not in yaml.SafeLoader.yaml_constructors:
        raise UserError(
            f"config: {path}, line {node.start_mark.line + 1}: the tag {printable(node.tag)} is "
            "none of plain YAML, and no object is made by it. Write the plain value."
        )
    if isinstance(node, yaml.SequenceNode):
        for each in node.value:
            _check_names(each, path, seen)
    elif isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            if key.tag not in _KEYS:
                raise UserError(
                    f"config: {path}, line {key.start_mark.line + 1}: a key that is no text "
                    f"({printable(str(key.value), 40)}). Options have names; put others into "
                    "quotes."
                )
            name = str(key.value)
            if name in names:
                raise UserError(
                    f"config: {path}, line {key.start_mark.line + 1}: {name} stands twice, and one "
                    "of them would be lost. Remove one."
                )
            names.add(name)
            _check_names(value, path, seen)


_PREFIX = "--trainer."


def check_trainer_names(words: Sequence[str]) -> None:
    """Refuse options of the Trainer that it does not have, before it is imported.

    Args:
        words: The command line. All else is left to the command's own parser.

    Raises:
        UserError: Names these options.
    """
    given = {word: _name(word) for word in words if word.startswith(_PREFIX)}
    if not given or "--help" in words or "-h" in words:
        return
    known = trainer_names()
    unknown = [word for word, name in given.items() if known and name not in known]
    if unknown:
        raise UserError(
            f"unrecognized arguments: {' '.join(unknown)}. The trainer has no such option; "
            "`--help` lists those that it has."
        )


def _name(word: str) -> str:
    """`callbacks` of `--trainer.callbacks+=X` and of `--trainer.callbacks.monitor=y`."""
    return word.removeprefix(_PREFIX).partition("=")[0].partition(".")[0].removesuffix("+")


def trainer_names() -> set[str]:
    """What Lightning's Trainer takes; nothing where its source is not found."""
    spec = find_spec("lightning")
    folders = list(spec.submodule_search_locations or []) if spec else []
    path = Path(*folders[:1], "pytorch", "trainer", "trainer.py")
    if not path.is_file():
        return set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "Trainer":
            for each in node.body:
                if isinstance(each, ast.FunctionDef) and each.name == "__init__":
                    arguments = [*each.args.args[1:], *each.args.kwonlyargs]
                    return {argument.arg for argument in arguments}
    return set()


INTRODUCTION = "Self-distillation fine-tuning: a new skill, old ones kept."
# Commands that build a model, a data module and a trainer.
DESCRIPTIONS = {
    "fit": "Train, e.g. --config preset:quickstart, a whole run that this package ships.",
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
    "demo": "Teach a small model that is shipped, by SDFT and by SFT, and compare what was kept.",
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
    if command == "--version":
        print(f"sdft {__version__}")
        raise SystemExit(0)
    named, words = words, with_presets(words)
    if words != named:
        args = words
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    check_config_files(words)
    # Three commands without a model and a trainer, which LightningCLI would build.
    if command == "continual":
        from sdft_lightning.continual import run_continual

        run_continual(words[1:], main, _run_problem)
    elif command == "report":
        from sdft_lightning.continual.report import report_command

        report_command(words[1:])
    elif command == "demo":
        from sdft_lightning.cli.demo import main as run_demo

        run_demo(words[1:])
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
        help="file of options, in YAML, that names the command and holds its options; "
        "preset:<name> is one that this package ships",
    )
    parser.add_argument(
        "--print_config",
        nargs="?",
        help="print the options of that file with all defaults, and end",
    )
    parser.add_argument("--version", action="store_true", help="print the version, and end")
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
            from sdft_lightning.data.benchmark_data import dead_worker

            if dead_worker(cause) is not None:
                return dead_worker(cause)  # raised wherever the program was when the worker died
        cause = cause.__cause__ or cause.__context__
    return error if isinstance(error, ArgumentError) else None

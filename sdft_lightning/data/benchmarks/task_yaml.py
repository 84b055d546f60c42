"""Task files of the harness and those that build on them: what they hold, and what they may run."""

from __future__ import annotations

import functools
import glob
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from jinja2.sandbox import SandboxedEnvironment

from sdft_lightning.data.sources import (
    EXAMPLE_PREFIX,
    PRESET_PREFIX,
    example_path,
    example_tasks,
    preset_path,
)
from sdft_lightning.errors import UserError, printable
from sdft_lightning.files.texts import check_yaml

_ROOM = "sdft_lightning.data.benchmarks.task_functions"
_INSTRUCTIONS = "sdft_lightning.data.benchmarks.instructions"
# Functions of this package that are made for task files. The first two run what a model wrote.
_RUN_ANSWERS = {f"{_ROOM}.run_answers", f"{_ROOM}.results"}
_OWN = _RUN_ANSWERS | {
    f"{_ROOM}.contains",
    f"{_ROOM}.articles",
    *(f"{_INSTRUCTIONS}.{name}" for name in ("checked", "graded", "share_of_instructions")),
}
# Loaders of `datasets` that unpickle what they read, in some of its versions.
_UNPICKLING = ("pandas",)


def check_functions(path: Path, allowed: bool) -> None:
    """Refuse a task YAML that names Python code of its own, unless that is allowed.

    Looked at are the file and all that it includes. The harness's own files are trusted, as the
    installed package is; so are this package's functions that are made for task files.

    Args:
        path: The file.
        allowed: `data.benchmarks.allow_task_code`.

    Raises:
        UserError: If there is such code and it is not allowed.
    """
    import lm_eval.tasks

    harness = Path(lm_eval.tasks.__file__).parent.resolve()
    found = [
        f"!function {name}"
        for file, _, functions in _included_files(path)
        if not file.is_relative_to(harness)
        for name in functions
        if not _is_own(name, file)
    ]
    if found and not allowed:
        raise _code_refused(path, found)


def check_settings(path: Path, own: dict[str, Any], config: dict[str, Any], allowed: bool) -> None:
    """Refuse settings that bring code from elsewhere: metrics of `evaluate`, pickled data.

    Args:
        path: The file.
        own: What it and its includes say.
        config: The same with what `same_as` adds.
        allowed: `data.benchmarks.allow_task_code`.

    Raises:
        UserError: If there are such settings and they are not allowed.
    """
    import lm_eval.api.metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import METRIC_REGISTRY

    found = []
    listed = own.get("metric_list")
    # Beside `process_results`, metrics are mere names.
    if isinstance(listed, list) and config.get("process_results") is None:
        for each in listed:
            metric = each.get("metric") if isinstance(each, dict) else None
            known = callable(metric) or metric is None or metric in METRIC_REGISTRY
            if not known or each.get("hf_evaluate"):
                found.append(f"metric: {metric}, whose code `evaluate` fetches")
    if own.get("dataset_path") in _UNPICKLING:
        found.append(f"dataset_path: {own['dataset_path']}, which unpickles")
    if found and not allowed:
        raise _code_refused(path, found)


def runs_answers(path: Path) -> bool:
    """Whether a task YAML, or what it includes, runs what a model wrote, whatever else it says."""
    return any(
        config.get("unsafe_code") or _RUN_ANSWERS.intersection(functions)
        for _, config, functions in _included_files(path)
    )


def _code_refused(path: Path, found: list[str]) -> UserError:
    return UserError(
        f"data.benchmarks.tasks: {path} runs Python code ({'; '.join(dict.fromkeys(found))[:300]}),"
        " with all of your rights and in no sandbox. Read that code, then set "
        "data.benchmarks.allow_task_code to true if you trust it; or leave the task out."
    )


def _included_files(
    path: Path, seen: frozenset[Path] = frozenset()
) -> Iterator[tuple[Path, dict[str, Any], list[str]]]:
    """A file and its includes: their settings, and the functions that they name.

    Read with the harness's own loader, so that there is no text that it reads in another way; but
    its `!function` imports nothing here.
    """
    from lm_eval.tasks._yaml_loader import _make_loader

    path = path.expanduser().resolve()
    if path in seen:
        raise ValueError(f"it includes itself ({path})")
    functions: list[str] = []

    def named(loader: Any, node: Any) -> str:
        functions.append(str(loader.construct_scalar(node)))
        return functions[-1]

    loader = _make_loader(path.parent, resolve_funcs=False)
    yaml.add_constructor("!function", named, Loader=loader)
    with path.open("rb") as file:
        config = yaml.load(file, Loader=loader)  # a safe loader with one more tag
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no settings but {type(config).__name__}")
    yield path, config, functions
    includes = config.get("include") or []
    for each in includes if isinstance(includes, list) else [includes]:
        yield from _included_files(path.parent / str(each), seen | {path})


def _is_own(name: str, file: Path) -> bool:
    """Whether a function is this package's; the harness takes a file beside the YAML first."""
    module = name.rpartition(".")[0]
    beside = (file.parent / f"{module.replace('.', '/')}.py").resolve()
    return name in _OWN and not beside.exists()


class _Templates(SandboxedEnvironment):
    """Jinja's own sandbox, which says what it refuses as an error of the user's."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Refuse an attribute through which a template would leave its data."""
        raise _refused(f"{attribute!r} of a {type(obj).__name__}")

    def is_safe_callable(self, obj: Any) -> bool:
        """Refuse what is no method of plain data."""
        if super().is_safe_callable(obj):
            return True
        raise _refused(f"to call {getattr(obj, '__name__', type(obj).__name__)!r}")


@contextmanager
def sandboxed_templates() -> Iterator[None]:
    """Let the harness render templates in Jinja's sandbox; its own environment has none."""
    from lm_eval import utils

    harness = utils.env
    templates = _Templates(
        loader=harness.loader,
        undefined=harness.undefined,
        keep_trailing_newline=harness.keep_trailing_newline,
    )
    templates.filters.update(harness.filters)
    utils.env = templates
    try:
        yield
    finally:
        utils.env = harness


def _refused(what: str) -> UserError:
    return UserError(
        f"data.benchmarks.tasks: a template of a task file asks for {what}, which reaches Python "
        "itself and is refused. Use the columns of the item and Jinja's filters."
    )


# The instructions that the harness checks with NLTK.
_CUT_UP = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
_DATA = "tokenizers/punkt_tab"


def check_sentence_data(name: str, task: Any, limit: float | None) -> None:
    """Look, before any answer is written, for the data with which it would be graded.

    The harness looks for it when the answers are there, and tries to fetch it before that without
    a word if it cannot.

    Args:
        name: The task's name.
        task: A task of the harness, with its data.
        limit: How many items are measured, or which part of them; all without it.

    Raises:
        UserError: If an item needs the data and they are not on this machine.
    """
    from lm_eval.evaluator_utils import get_sample_size

    items = islice(task.eval_docs, get_sample_size(task, limit))
    if not any(_CUT_UP & set(item.get("instruction_id_list") or ()) for item in items):
        return
    import nltk

    try:
        nltk.data.find(_DATA)
    except LookupError:
        raise UserError(
            f"data.benchmarks.tasks: {name} cuts answers into sentences with NLTK's punkt_tab, "
            "which is not on this machine and could not be fetched. Run `python -m nltk.downloader "
            "punkt_tab` where there is a network, and copy ~/nltk_data here; or leave the task out."
        ) from None


_SUFFIXES = {".yaml", ".yml"}


def task_file(name: str) -> Path | None:
    """The task YAML that a name of `data.benchmarks.tasks` stands for.

    Args:
        name: A path that ends in .yaml or .yml, `preset:benchmarks/<name>`, or a task that this
            package ships.

    Returns:
        The file; None where the name is the harness's, or nobody's.
    """
    if name.startswith(PRESET_PREFIX):
        return preset_path(name, "data.benchmarks.tasks")
    path = Path(name).expanduser()
    return path if path.suffix in _SUFFIXES else example_tasks().get(name)


@functools.cache
def task_manager() -> Any:
    """The harness's index of its thousands of task files; it takes several seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def harness_yaml(task: str) -> Path | None:
    """The file in which the harness defines a task; None where it has no such task."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(lm_eval.tasks.__file__).parent
    # Most are found by their names, without the index.
    for path in [*root.rglob(f"{glob.escape(task)}.yaml"), *(root / task).glob("*.yaml")]:
        if load_yaml(path, resolve_func=False).get("task") == task:
            return path
    entry = task_manager().task_index.get(task)
    found: Path | None = None if entry is None else entry.yaml_path
    return found


def read_task_yaml(
    path: Path,
    data_dir: str | None = None,
    check: Callable[[dict[str, Any]], None] | None = None,
    allow_code: bool = False,
) -> dict[str, Any]:
    """The settings of a task YAML, with `same_as` and local files resolved.

    Args:
        path: The file.
        data_dir: Where relative data files are; the YAML's folder without it.
        check: Refuses settings; called before code of the file, or of the task in `same_as`, is
            imported; functions are names then.
        allow_code: Whether the file may name Python code of its own, which is then imported.

    Returns:
        What the harness's `ConfigurableTask` takes.

    Raises:
        UserError: If the file, the task that it names, or one of its data files is missing, or code
            that they name cannot be imported.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    if not path.is_file():
        raise UserError(f"data.benchmarks.tasks: there is no file {path}.")
    check_yaml(path.read_text(encoding="utf-8", errors="replace"), str(path))
    try:
        check_functions(path, allow_code)
        # A later `unsafe_code: false` makes nothing safe.
        runs = {"unsafe_code": runs_answers(path)}
        if check is not None:
            check({**load_yaml(path, resolve_func=False), **runs})
        config: dict[str, Any] = {**load_yaml(path), **runs}
    except UserError:
        raise
    except Exception as error:  # its functions are imported, and code may raise anything
        raise UserError(
            f"data.benchmarks.tasks: {path} cannot be read: {_told(error)}. Correct it."
        ) from error
    _check_single(config, path)
    base = config.pop("same_as", None)
    own = config
    if base is not None:
        origin = _origin(base, config, path, check)
        config = {**origin, **own, "unsafe_code": _either("unsafe_code", origin, own)}
    check_settings(path, own, config, allow_code)
    if not isinstance(config.get("task"), str):
        raise UserError(f"{path}: it names no task. Add `task: <name>`.")
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    options = config.get("dataset_kwargs") or {}
    if "data_files" in options:
        folder = path.parent if data_dir is None else Path(data_dir).expanduser()
        files = _resolve_files(options["data_files"], folder, path)
        config["dataset_kwargs"] = {**options, "data_files": files}
    return config


def _check_single(config: Any, path: Path) -> None:
    """Refuse a file that holds several tasks, of which one would be measured, or none."""
    if not isinstance(config, dict):
        raise UserError(f"{path}: it must hold the settings of a task, as the harness's YAMLs do.")
    members = config.get("task_list") or config.get("task")
    if isinstance(members, list):
        found = [each.get("task", each) if isinstance(each, dict) else each for each in members]
        names = [str(each) for each in found]
        raise UserError(
            f"{path}: it is a group of {len(names)} tasks ({', '.join(names)[:200]}), and a file "
            "may hold one task. Name each of them in data.benchmarks.tasks, by its name in the "
            "harness or by a YAML of its own."
        )


def _origin(
    base: str, config: dict[str, Any], path: Path, check: Callable[[dict[str, Any]], None] | None
) -> dict[str, Any]:
    """The settings of the task that `same_as` names, once `check` lets their code be imported."""
    from lm_eval.tasks._yaml_loader import load_yaml

    origin = harness_yaml(base)
    if origin is None:
        raise UserError(
            f"{path}: same_as: lm-evaluation-harness has no task {base!r}; `lm-eval ls tasks` "
            "lists them."
        )
    try:
        if check is not None:
            theirs = load_yaml(origin, resolve_func=False)
            check({**theirs, **config, "unsafe_code": _either("unsafe_code", theirs, config)})
        found: dict[str, Any] = load_yaml(origin)
    except UserError:
        raise
    except Exception as error:  # humaneval's code alone fetches and runs things as it is imported
        raise UserError(
            f"{path}: same_as: the harness's {base} cannot be loaded: {_told(error)}. Install the "
            "package that is missing, if one is; or leave same_as out and write the settings into "
            "the file, as preset:benchmarks/humaneval does."
        ) from error
    return found


def _either(key: str, first: dict[str, Any], second: dict[str, Any]) -> bool:
    return bool(first.get(key) or second.get(key))


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {printable(str(error))}"


def _resolve_files(files: Any, folder: Path, origin: Path) -> Any:
    if isinstance(files, dict):
        return {split: _resolve_files(value, folder, origin) for split, value in files.items()}
    if isinstance(files, list):
        return [_resolve_files(value, folder, origin) for value in files]
    if "://" in files:
        return files
    if files.startswith(EXAMPLE_PREFIX):
        return str(example_path(files, f"{origin}: data_files"))
    found = folder / files  # an absolute path stays as it is
    if not found.is_file():
        raise UserError(
            f"{origin}: data_files: there is no file {found}. Set data.benchmarks.data_dir to the "
            "folder that it is in, or name the harness's own task, whose data come from the Hub."
        )
    return str(found.resolve())

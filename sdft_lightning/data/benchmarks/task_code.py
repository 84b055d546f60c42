"""What of a task YAML runs Python code, found before any of it is imported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sdft_lightning.errors import UserError

_ROOM = "sdft_lightning.data.benchmarks.task_functions"
# Functions of this package that are made for task files. The first two run what a model wrote.
_RUN_ANSWERS = {f"{_ROOM}.run_answers", f"{_ROOM}.results"}
_OWN = _RUN_ANSWERS | {f"{_ROOM}.contains", f"{_ROOM}.articles"}
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
        for file, _, functions in _files(path)
        if not file.is_relative_to(harness)
        for name in functions
        if not _is_own(name, file)
    ]
    if found and not allowed:
        raise _refused(path, found)


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
        raise _refused(path, found)


def runs_answers(path: Path) -> bool:
    """Whether a task YAML, or what it includes, runs what a model wrote, whatever else it says."""
    return any(
        config.get("unsafe_code") or _RUN_ANSWERS.intersection(functions)
        for _, config, functions in _files(path)
    )


def _refused(path: Path, found: list[str]) -> UserError:
    return UserError(
        f"data.benchmarks.tasks: {path} runs Python code ({'; '.join(dict.fromkeys(found))[:300]}),"
        " with all of your rights and in no sandbox. Read that code, then set "
        "data.benchmarks.allow_task_code to true if you trust it; or leave the task out."
    )


def _files(
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
        yield from _files(path.parent / str(each), seen | {path})


def _is_own(name: str, file: Path) -> bool:
    """Whether a function is this package's; the harness takes a file beside the YAML first."""
    module = name.rpartition(".")[0]
    beside = (file.parent / f"{module.replace('.', '/')}.py").resolve()
    return name in _OWN and not beside.exists()

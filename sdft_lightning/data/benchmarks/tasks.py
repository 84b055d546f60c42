"""Tasks of lm-evaluation-harness, by name or from a YAML, and what was read of them."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdft_lightning.data.benchmarks import Benchmarks, BenchmarkTask
from sdft_lightning.data.benchmarks.sandbox import run_program
from sdft_lightning.data.benchmarks.task_yaml import (
    check_sentence_data,
    read_task_yaml,
    sandboxed_templates,
    task_file,
    task_manager,
)
from sdft_lightning.data.sources import example_tasks
from sdft_lightning.errors import UserError, printable


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep the harness's progress bars and remarks out of the way of the run's own."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def task_line(name: str, leaves: dict[str, Any], limit: float | None) -> str:
    """One line on what is asked of a task or group.

    Args:
        name: As it was asked for.
        leaves: Its tasks by name, as the harness holds them.
        limit: The limit of each of them.

    Raises:
        UserError: If a task has no documents.
    """
    from lm_eval.evaluator_utils import get_sample_size

    asked = total = filtered = 0
    for leaf_name, leaf in leaves.items():
        count = len(_documents(leaf))
        unfiltered = _unfiltered(leaf)
        if count == 0:
            raise no_documents(leaf_name, source_of(vars(leaf.config)), unfiltered)
        size = get_sample_size(leaf, limit)
        asked += count if size is None else min(size, count)
        total += count
        filtered += max(0, (unfiltered or count) - count)
    line = f"benchmark {name}: {asked} of {total} documents"
    if len(leaves) > 1:
        line += f" in {len(leaves)} tasks ({_some(sorted(leaves))})"
    else:
        line += f" from {source_of(vars(next(iter(leaves.values())).config))}"
    return line + (f"; {filtered} more are left out by process_docs" if filtered else "")


def _documents(leaf: Any) -> Any:
    """What a task asks about; kept by the harness's own class, so that filters run once."""
    found = getattr(leaf, "task_docs", None)
    return leaf.eval_docs if found is None else found


def _split(leaf: Any) -> str | None:
    options = leaf.config
    return getattr(options, "test_split", None) or getattr(options, "validation_split", None)


def _unfiltered(leaf: Any) -> int | None:
    """Documents before the task's own filter; None where the task does not say."""
    split, dataset = _split(leaf), getattr(leaf, "dataset", None)
    try:
        return None if dataset is None or split is None else len(dataset[split])
    except (KeyError, TypeError):
        return None


def no_documents(name: str, source: str, unfiltered: int | None) -> UserError:
    """What to tell of a task that asks about nothing.

    Args:
        name: The task.
        source: See `source_of`.
        unfiltered: How many documents its own filter has seen; None where that is not known.
    """
    why = "it is empty, or its process_docs leaves none of it"
    if unfiltered is not None:
        why = f"its process_docs leaves none of {unfiltered}" if unfiltered else "it is empty"
    return UserError(
        f"data.benchmarks.tasks: {name} has no documents: {source}: {why}. Give a file with at "
        "least one, or leave the task out."
    )


def source_of(config: dict[str, Any]) -> str:
    """The files of a task's settings, or its data set and split."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    split = config.get("test_split") or config.get("validation_split")
    if isinstance(files, dict):
        files = files.get(split) or list(files.values())
    if files:
        return ", ".join(map(str, files)) if isinstance(files, list) else str(files)
    parts = [config.get("dataset_path"), config.get("dataset_name")]
    name = " ".join(str(part) for part in parts if part) or "its data set"
    return f"{name}, split {split}" if split else name


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]}, ... {names[-1]}"


log = logging.getLogger(__name__)

# The seeds with which `lm_eval.simple_evaluate` loads tasks and draws few-shot examples.
_PYTHON_SEED, _NUMPY_SEED, FEWSHOT_SEED = 0, 1234, 1234
SANDBOXED = "sdft_lightning.data.benchmarks.task_functions"


class LoadedTask(NamedTuple):
    """A task or group as the harness holds it.

    Attributes:
        settings: What was asked for.
        name: Its name in the results; for a YAML, the one written in it.
        loaded: What the harness's `evaluate` takes as task dictionary.
        leaves: The tasks themselves by name; one, or the members of a group.
    """

    settings: BenchmarkTask
    name: str
    loaded: dict[str, Any]
    leaves: dict[str, Any]

    def metric_names(self) -> set[str]:
        """What is measured of the task and its parts, `<task>/<metric>`."""
        groups = self.loaded.get("groups", {})
        found = {f"{group}/{each}" for group in groups for each in self.group_metrics(group)}
        for name, task in self.leaves.items():
            found |= {f"{name}/{each}" for each in _leaf_metrics(task)}
        return found

    def group_metrics(self, name: str) -> set[str]:
        """What is measured of a group as a whole; nothing of what is no group."""
        group = self.loaded.get("groups", {}).get(name)
        found: set[str] = set()
        for each in getattr(group, "aggregate_metric_list", None) or []:
            filters = each.filter_list
            filters = [filters] if isinstance(filters, str) else filters
            found |= {metric_label(each.metric, kind) for kind in filters}
        return found


def load_tasks(options: Benchmarks) -> list[LoadedTask]:
    """Load the tasks and their data.

    A task YAML is one of the harness, with two additions: `same_as: hellaswag` takes over all
    settings of that task of the harness, and relative `dataset_kwargs.data_files` belong to
    `data_dir` or the YAML's own folder (`example:<name>/<file>` to this package).

    Args:
        options: Names and settings.

    Returns:
        The tasks in order.

    Raises:
        UserError: If there is no such task, file or metric, the data cannot be had, or two tasks
            have the same name.
    """
    found: list[LoadedTask] = []
    seen: dict[str, str] = {}
    for settings in options.named():
        with quiet_harness(), sandboxed_templates():
            loaded = _load(settings, options)
        for name in loaded.leaves:
            if name in seen:
                raise UserError(
                    f"data.benchmarks.tasks: {settings.name} and {seen[name]} both measure "
                    f"{name}. Leave one of them out."
                )
            seen[name] = settings.name
        for name, task in loaded.leaves.items():
            _check_code(name, vars(task.config), options)
            _set_fewshot(name, task, settings)
            check_sentence_data(name, task, options.limit_of(settings))
        _check_metric(loaded)
        log.info(task_line(settings.name, loaded.leaves, options.limit_of(settings)))
        found.append(loaded)
    return found


def _load(settings: BenchmarkTask, options: Benchmarks) -> LoadedTask:
    path = task_file(settings.name)
    with _seeds():
        if path is not None:
            # A task that runs code is refused before any of its own code is imported.
            config = read_task_yaml(
                path,
                options.data_dir,
                lambda found: _check_code(settings.name, found, options, early=True),
                options.allow_task_code,
            )
            name = config["task"]
            _check_code(name, config, options)
            with explained(settings.name, source_of(config)):
                from lm_eval.api.task import ConfigurableTask

                task: Any = ConfigurableTask(config=config)
            return LoadedTask(settings, name, {"tasks": {name: task}}, {name: task})
        manager = task_manager()
        entry = manager.task_index.get(settings.name)
        if entry is None:
            known = [*example_tasks(), *manager.all_tasks]
            near = difflib.get_close_matches(settings.name, known, 3, 0.5)
            hint = f" Near: {', '.join(near)}." if near else ""
            raise UserError(
                f"data.benchmarks.tasks: lm-evaluation-harness has no task {settings.name!r}.{hint}"
                " Allowed are its tasks, groups and tags (`lm-eval ls tasks` lists them), this "
                f"package's own ({', '.join(example_tasks())}), or the path of a task YAML."
            )
        source = source_of(entry.cfg or {})
        _check_code(settings.name, entry.cfg or {}, options)
        with explained(settings.name, source):
            loaded: Any = manager.load([settings.name])
    return LoadedTask(settings, settings.name, loaded, dict(loaded["tasks"]))


@contextmanager
def explained(name: str, source: str) -> Iterator[None]:
    """Say what is missing where a data set cannot be had."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except UserError:
        raise
    except (IndexError, StopIteration) as error:  # the first document is looked at
        raise no_documents(name, source, None) from error
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"data.benchmarks.tasks: the settings of {name} are wrong "
            f"({type(error).__name__}: {printable(str(error))}). Compare its YAML with the "
            "harness's guide to task files."
        ) from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        # datasets and huggingface_hub raise all of these without network or data set.
        raise UserError(
            f"data.benchmarks.tasks: the data of {name} ({printable(str(source))}) cannot be had: "
            f"{printable(str(error))} Remedy: correct a malformed file; run once "
            "with network (the data set then stays in the Hugging Face cache), or name a task YAML "
            "with local files, as preset:benchmarks/hellaswag does."
        ) from error
    except ImportError as error:
        raise UserError(
            f"data.benchmarks.tasks: {name} needs a package that is not installed: "
            f"{printable(str(error))}. "
            "Install it, or leave the task out."
        ) from error
    except Exception as error:  # code of the task, which may raise anything
        raise UserError(
            f"data.benchmarks.tasks: {name} cannot be loaded ({type(error).__name__}: "
            f"{printable(str(error))}). Correct its YAML and code, or leave the task out."
        ) from error


def _check_code(
    name: str, config: dict[str, Any], options: Benchmarks, early: bool = False
) -> None:
    """Refuse a task that runs code, but for one that runs it in our sandbox and may.

    Early: functions are not imported yet, and a name stands for each.
    """
    if not config.get("unsafe_code"):
        return
    graded = config.get("process_results")
    ours = getattr(graded, "__module__", "") == SANDBOXED
    if early and isinstance(graded, str):
        ours = Path(graded).name == f"{SANDBOXED}.results"
    if not ours:
        raise UserError(
            f"data.benchmarks.tasks: {name} would run code that the model wrote outside our "
            "sandbox. Name preset:benchmarks/humaneval_hub (data from the Hub) or "
            "preset:benchmarks/humaneval (a local file), or a YAML of your own with "
            f"process_results: !function {SANDBOXED}.results."
        )
    if not options.allow_code_execution:
        raise UserError(
            f"data.benchmarks.tasks: {name} runs code that the model wrote, in a limited process. "
            "Set data.benchmarks.allow_code_execution to true if you want that, or leave it out."
        )
    tried = run_program("pass")  # tells now where the limits cannot be set
    if not tried.passed:
        raise UserError(
            f"data.benchmarks.tasks: {name}: a program that does nothing failed in the sandbox "
            f"({tried.reason}). Is the machine overloaded, or Python in a folder that cannot be "
            "read? Leave the task out if it stays so."
        )


def _set_fewshot(name: str, task: Any, settings: BenchmarkTask) -> None:
    own = task.config.num_fewshot
    if settings.num_fewshot is not None and own != 0:  # 0 in a task's YAML means: never any
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    elif settings.num_fewshot:
        raise UserError(
            f"data.benchmarks.tasks: {name} takes no examples (num_fewshot: 0 in its YAML), and "
            f"num_fewshot is {settings.num_fewshot}. Leave it out."
        )
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _check_metric(loaded: LoadedTask) -> None:
    metric = loaded.settings.metric
    if metric is None:
        return
    known = loaded.group_metrics(loaded.name)
    for task in loaded.leaves.values() if loaded.name in loaded.leaves else ():
        known |= _leaf_metrics(task)
    if not known:
        raise UserError(
            f"data.benchmarks.tasks: {loaded.name} is a group or tag without metrics of its own, "
            f"so {metric!r} cannot enter the mean. Name its tasks instead: "
            f"{', '.join(sorted(loaded.leaves)[:5])} ..."
        )
    if metric not in known:
        raise UserError(
            f"data.benchmarks.tasks: {loaded.name} has no metric {metric!r}. Allowed are "
            f"{', '.join(sorted(known))}."
        )


def _leaf_metrics(task: Any) -> set[str]:
    filters = [each.name for each in getattr(task, "_filters", [])] or ["none"]
    return {metric_label(name, kind) for name in task.aggregation() for kind in filters}


def metric_label(metric: str, kind: str) -> str:
    """A metric as it is named here: the harness's name, less the filter that does nothing."""
    return metric if kind == "none" else f"{metric},{kind}"


@contextmanager
def _seeds() -> Iterator[None]:
    """Random states as in `simple_evaluate` while tasks load; some shuffle their items then."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(_PYTHON_SEED)
    np.random.seed(_NUMPY_SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)

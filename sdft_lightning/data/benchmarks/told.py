"""What was read of a benchmark: one line for each, and an error where nothing was."""

from __future__ import annotations

from typing import Any

from sdft_lightning.errors import UserError


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

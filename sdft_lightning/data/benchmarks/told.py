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
            why = f"its process_docs leaves none of {unfiltered}" if unfiltered else "it is empty"
            raise UserError(
                f"data.benchmarks.tasks: {leaf_name} has no documents: {_source(leaf)}: {why}. "
                "Give a file with at least one, or leave the task out."
            )
        size = get_sample_size(leaf, limit)
        asked += count if size is None else min(size, count)
        total += count
        filtered += max(0, (unfiltered or count) - count)
    line = f"benchmark {name}: {asked} of {total} documents"
    if len(leaves) > 1:
        line += f" in {len(leaves)} tasks ({_some(sorted(leaves))})"
    else:
        line += f" from {_source(next(iter(leaves.values())))}"
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


def _source(leaf: Any) -> str:
    """The files or the data set, with its split."""
    options = leaf.config
    files = (getattr(options, "dataset_kwargs", None) or {}).get("data_files")
    split = _split(leaf)
    if isinstance(files, dict):
        files = files.get(split, list(files.values()))
    if files:
        return ", ".join(files) if isinstance(files, list) else str(files)
    name = " ".join(
        part
        for part in (
            getattr(options, "dataset_path", None),
            getattr(options, "dataset_name", None),
        )
        if part
    )
    return f"{name or 'its data set'}, split {split}" if split else name or "its data set"


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]}, ... {names[-1]}"

"""What differs between a run that was killed again and again and one left alone; for soak.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sdft_lightning.files.run_folder import resolve_checkpoint

_ENTERED = ("ready", "started")
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "loops", "callbacks")
# What a kill changes and no later step reads: Lightning counts an epoch that is entered again, and
# writes beside the checkpoint of a step that the killed life had written already (step-24-v1.ckpt).
NOT_COMPARED = (
    *(f"epoch_progress.{part}.{name}" for part in ("total", "current") for name in _ENTERED),
    ".best_model_path",
)


def checkpoint(run: Path) -> dict[str, Any]:
    """The content of what `--ckpt_path=last` stands for.

    That is last.ckpt, but for a run that was killed after the file of its last step was written and
    before last.ckpt was: it is over, and nothing writes last.ckpt anew.
    """
    path = resolve_checkpoint("last", run)
    assert path is not None
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def differences(one: Any, other: Any, where: str) -> list[str]:
    """Where two values differ: tensors bit for bit, everything else by equality."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [where]
        return [each for key in one for each in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [where]
        pairs = enumerate(zip(one, other, strict=True))
        return [each for i, (a, b) in pairs for each in differences(a, b, f"{where}[{i}]")]
    return [] if one == other else [where]


def without(value: Any, folder: str) -> Any:
    """The same, with a folder's name taken out of all texts."""
    if isinstance(value, str):
        return value.replace(folder, "")
    if isinstance(value, dict):
        return {without(key, folder): without(each, folder) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without(each, folder) for each in value]
    return value


def count_items(value: Any) -> int:
    """Tensors and plain values in a nested structure."""
    if isinstance(value, dict):
        return sum(map(count_items, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(count_items, value))
    return 1


def completions(run: Path) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """All logged completions by (step, row); a step done again after a kill has several."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    # Not splitlines(): completions of random weights hold U+2028 and the like.
    for line in filter(None, (run / "completions.jsonl").read_text(encoding="utf-8").split("\n")):
        record = json.loads(line)
        found.setdefault((record["step"], record["id"]), []).append(record)
    return found


def compare(killed: Path, whole: Path) -> tuple[int, list[str]]:
    """How many items two runs have in common, and which of them differ."""
    # Callbacks keep the paths of checkpoints.
    one, other = (without(checkpoint(run), str(run)) for run in (killed, whole))
    wrong = [
        each
        for key in COMPARED
        for each in differences(one[key], other[key], f"last.ckpt {key}")
        if not each.endswith(NOT_COMPARED)
    ]
    items = sum(count_items(other[key]) for key in COMPARED)
    mine, theirs = completions(killed), completions(whole)
    wrong += [f"completion {key}" for key in mine.keys() ^ theirs.keys()]
    for key in mine.keys() & theirs.keys():
        items += len(mine[key])
        wrong += [f"completion {key}" for record in mine[key] if record != theirs[key][0]]
    return items, wrong

"""Writes docs/models.md from what the sweep found: python models_page.py FOLDER."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import tiny_models
from model_sweep import Verdict

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
DECODING = {
    "masked": "cache",
    "unmasked": "cache, steps without a mask",
    "grouped": "a cache for each length of prompt",
    "uncached": "whole rows at every step",
}
HEAD = (
    "| architecture | class | trains | adapters | sampling | drops rows | shares prefix | packs "
    "| caches prompts | fused |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def row(verdict: Verdict) -> str:
    """The line of the table that belongs to an architecture."""
    if verdict.refusal:
        return (
            f"| {verdict.name} | {verdict.model} | refused: {_plain(verdict.refusal)} |" + " |" * 7
        )
    flags = (
        verdict.drops_rows,
        verdict.shares,
        verdict.packs,
        verdict.keeps_prompts,
        verdict.fused,
    )
    cells = [
        verdict.name,
        verdict.model,
        "yes",
        f"refused: {_plain(verdict.adapters)}" if verdict.adapters else "yes",
        DECODING[verdict.decoding],
        *("yes" if flag else "no" for flag in flags),
    ]
    return "| " + " | ".join(cells) + " |"


def _plain(sentence: str) -> str:
    """A sentence without what differs from one machine or process to the next."""
    sentence = sentence.split(" [PEFT")[0].removesuffix(":").removeprefix("model.policy.name: ")
    sentence = re.sub(r" \(relative difference [^)]*\)", "", sentence)
    return " ".join(sentence.replace("|", "/").split())


def page(verdicts: list[Verdict], version: str) -> str:
    """The whole page."""
    right = [each for each in verdicts if not each.refusal]
    refused = [each for each in verdicts if each.refusal]
    adapted = [each for each in right if not each.adapters]
    lines = [
        "# Models",
        "",
        f"Made by `make models` with transformers {version}. Tiny models of every causal language "
        "model that it has are",
        "trained, sampled from and scored on every path of this package, and compared with plain "
        "passes over each row by",
        "itself, without padding and without a cache: hidden states and gradients at completion "
        "tokens, log-probabilities",
        "of greedy and sampled completions, likelihoods of continuations, adapters and what they "
        "are merged to.",
        "",
        f"{len(right)} kinds are right, {len(refused)} are refused when they are loaded, "
        f"{len(tiny_models.NOT_BUILT)} could not be built here. None is wrong, none crashes. A "
        "colon names a variant of",
        "a kind, e.g. `mistral:whole` is Mistral without its sliding window.",
        "",
        "Nothing of this is a list inside the package: what a model can do is found out on a few "
        "tokens when it is loaded",
        "(`sdft_lightning/forward/forward_paths.py`), so a new architecture takes the paths that "
        "are right for it, or is refused.",
        "",
        "- **Train**: " + _names(right) + ".",
        "- **Train with adapters, too**: all of these"
        + (
            " but " + _names([each for each in right if each.adapters])
            if len(adapted) < len(right)
            else ""
        )
        + ". Adapters were put on linear layers.",
        *(
            f"- **Sampled with {DECODING[kind]}**: "
            + _names([each for each in right if each.decoding == kind])
            + "."
            for kind in DECODING
        ),
        "- **Sampled without dropping finished rows**, so a batch costs as much as its longest "
        "completion: " + _names([each for each in right if not each.drops_rows]) + ".",
        "- **Computed in fused blocks on a CPU**: "
        + _names([each for each in right if each.fused])
        + ".",
        "- **Refused**: " + _names(refused) + ".",
        "",
        "## What the columns mean",
        "",
        "- *sampling*: how tokens are appended. *Whole rows at every step* is right and slow: use "
        "an [engine](vllm.md).",
        "- *drops rows*: finished rows leave the batch.",
        "- *shares prefix*: what all prompts begin with is computed once. Never with a sliding "
        "window or a sparse index.",
        "- *packs*: short rows stand side by side instead of being padded. Never with a sliding "
        "window or a sparse index.",
        "- *caches prompts*: `teacher.cache_prompts` is allowed.",
        "",
        "Rotary positions that change with the longest row (`rope_type` `dynamic` or `longrope`) "
        "were tried below the length at",
        "which they change; longer rows are computed as transformers computes them in a batch.",
        "",
        "## Table",
        "",
        *HEAD,
        *(row(verdict) for verdict in verdicts),
        "",
        "## Not built",
        "",
        "| architecture | why |",
        "|---|---|",
        *(f"| {name} | {reason} |" for name, reason in tiny_models.NOT_BUILT.items()),
    ]
    return "\n".join(lines) + "\n"


def _names(verdicts: list[Verdict]) -> str:
    return ", ".join(each.name for each in verdicts) or "none"


def main(folder: str) -> None:
    """Read the verdicts in a folder and write the page."""
    import transformers

    found: dict[str, Any] = {}
    for path in Path(folder).glob("*.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        found[values["name"]] = Verdict(**values)
    expected = [name for name in tiny_models.every_name() if name not in tiny_models.NOT_BUILT]
    missing = [name for name in expected if name not in found]
    if missing:
        sys.exit(f"no verdict on {', '.join(missing)}: see what the tests said")
    verdicts = [found[name] for name in sorted(expected)]
    PAGE.write_text(page(verdicts, transformers.__version__), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

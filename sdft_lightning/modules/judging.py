"""What a validation asked of a judge, logged and told."""

from __future__ import annotations

import logging

import lightning as L

from sdft_lightning.graders import Judge, Usage

log = logging.getLogger(__name__)


def log_usage(module: L.LightningModule, judge: Judge, stage: str) -> None:
    """Log `<stage>/judge/...` over all ranks, and tell this rank's share in one line.

    Args:
        module: Logs it; called on every rank, at the end of a validation or test.
        judge: Was asked.
        stage: val or test.
    """
    usage = judge.take_usage()
    cost = judge.cost(usage)
    counts: dict[str, float] = {
        "answers": usage.judged + usage.unjudged,
        "cached": usage.cached,
        "unjudged": usage.unjudged,
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
    }
    if cost is not None:
        counts["cost"] = cost
    for name, value in counts.items():
        module.log(f"{stage}/judge/{name}", float(value), reduce_fx="sum", sync_dist=True)
    if usage.judged + usage.unjudged:
        log.info(usage_line(judge, usage, cost))


def usage_names(judge: Judge) -> list[str]:
    """What `log_usage` logs of a judge."""
    names = ["answers", "cached", "unjudged", "input_tokens", "output_tokens"]
    return names if judge.cost(Usage()) is None else [*names, "cost"]


def usage_line(judge: Judge, usage: Usage, cost: float | None) -> str:
    """One line on what was asked."""
    line = (
        f"judge {judge.settings.model}: {usage.judged} answers judged, {usage.cached} of them from "
        f"the cache, {usage.unjudged} without a verdict; {usage.input_tokens} tokens sent, "
        f"{usage.output_tokens} received"
    )
    return line if cost is None else f"{line}; cost {cost:.4f}"

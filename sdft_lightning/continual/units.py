"""The runs that a plan comes to: chains of stages, their folders, and their shares."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from sdft_lightning.continual.plan import ContinualPlan, Method, Stage
from sdft_lightning.errors import UserError
from sdft_lightning.files.run_folder import named_folder


class Unit(NamedTuple):
    """One stage of one chain.

    Attributes:
        method: Name of the method.
        seed: Seed of the chain.
        number: Place of the stage, from 1.
        stage: The stage.
        options: The method's options.
        chain: Folder of the chain, `<root>/<name>/<method>/seed<k>`.
    """

    method: str
    seed: int
    number: int
    stage: Stage
    options: Method
    chain: Path

    @property
    def folder_name(self) -> str:
        """Name of the run in its chain's folder."""
        return f"{self.number}_{self.stage.name}"

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.chain / self.folder_name

    @property
    def run(self) -> str:
        """The run below the plan's folder, as results name it."""
        return f"{self.method}/seed{self.seed}/{self.folder_name}"

    @property
    def key(self) -> tuple[str, int | None, int]:
        """What tells a record from others."""
        return self.method, self.seed, self.number


class Shard(NamedTuple):
    """A share of the chains.

    Attributes:
        number: Which share, from 1.
        of: Of how many.
    """

    number: int = 1
    of: int = 1

    @property
    def results_name(self) -> str:
        """Name of the file that this share's records go to."""
        if self.of == 1:
            return "results.jsonl"
        return f"results-shard{self.number}of{self.of}.jsonl"


def parse_shard(text: str | None) -> Shard:
    """Read `2/8`.

    Raises:
        UserError: If it is no such share.
    """
    if text is None:
        return Shard()
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    shard = Shard(int(found[1]), int(found[2])) if found else None
    if shard is None or not 1 <= shard.number <= shard.of:
        raise UserError(
            f"shard: got {text!r}; give i/n with 1 <= i <= n, e.g. 2/8 for the second of eight."
        )
    return shard


def plan_folder(plan: ContinualPlan) -> Path:
    """Where everything of a plan is written.

    Raises:
        UserError: If its name would lead out of its root.
    """
    return named_folder(plan.root, plan.name, "name", "root")


def chains_of(plan: ContinualPlan) -> list[list[Unit]]:
    """All chains, the first seed of every method first, so that early results can be compared."""
    return [
        [
            Unit(name, seed, number, stage, method, plan_folder(plan) / name / f"seed{seed}")
            for number, stage in enumerate(plan.stages, start=1)
        ]
        for seed in plan.seeds
        for name, method in plan.methods.items()
    ]


def share_of(chains: list[list[Unit]], shard: Shard) -> list[list[Unit]]:
    """Every n-th chain."""
    return chains[shard.number - 1 :: shard.of]

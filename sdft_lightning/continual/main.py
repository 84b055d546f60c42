"""The command `continual`: reads a plan, checks it, shows it as a table, works through it."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sdft_lightning.callbacks.terminal import format_seconds
from sdft_lightning.continual.plan import (
    BASE,
    Budget,
    ContinualPlan,
    Shard,
    Unit,
    chains_of,
    parse_shard,
    plan_folder,
    share_of,
)
from sdft_lightning.continual.plan_file import build_plan, read_options
from sdft_lightning.continual.records import Key
from sdft_lightning.continual.rough_time import RoughTime

if TYPE_CHECKING:
    from sdft_lightning.continual.checks import Parse


Records = Mapping[Key, Mapping[str, Any]]
Guess = Callable[[Unit | None], float | None]


def overview(
    plan: ContinualPlan, shard: Shard, records: Records, guess: Guess | None = None
) -> str:
    """All runs of a share with their state, and the time that is left.

    Args:
        plan: The plan.
        shard: The share.
        records: The newest record of each run.
        guess: Seconds of a run of whose method none is finished; `RoughTime` without it.
    """
    guess = guess or RoughTime(plan).seconds
    base: list[list[Unit | None]] = [[None]] if shard.number == 1 else []
    chains = base + [[*chain] for chain in share_of(chains_of(plan), shard)]
    rows = [("run", "trains", "state", "seconds")]
    measured: list[float] = []
    guessed: list[float | None] = []
    for unit in (unit for chain in chains for unit in chain):
        record = records.get((BASE, None, 0) if unit is None else unit.key)
        if record is not None and record["status"] == "finished":
            state, seconds = "done", f"{_seconds(record):.0f}"
        else:
            state = "to do" if record is None else "failed, to do again"
            known = estimate(plan, unit, records)
            if known is not None:
                measured.append(known)
                seconds = f"about {known:.0f}"
            else:
                guessed.append(guess(unit))
                seconds = "" if guessed[-1] is None else f"roughly {guessed[-1]:.0f}"
        length = "nothing" if unit is None else _length(plan.budget_of(unit.stage))
        rows.append((BASE if unit is None else unit.run, length, state, seconds))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([f"{plan_folder(plan)}:", *lines, _time_left(measured, guessed)])


def _length(budget: Budget) -> str:
    if budget.updates is not None:
        return f"{budget.updates} updates"
    return f"{budget.tokens} tokens"


def _seconds(record: Mapping[str, Any]) -> float:
    return float(sum(record["seconds"].values()))


def estimate(plan: ContinualPlan, unit: Unit | None, records: Records) -> float | None:
    """Seconds of a run, from finished runs of the same method; None where there is none.

    Training is taken to grow with updates (or tokens), evaluation to be as long as it was.
    """
    method = BASE if unit is None else unit.method
    done = [
        record
        for (name, _, _), record in records.items()
        if name == method and record["status"] == "finished"
    ]
    if unit is None or not done:
        return None
    budget = plan.budget_of(unit.stage)
    what, amount = ("updates", budget.updates) if budget.updates else ("tokens", budget.tokens)
    trained: int = sum(record[what] for record in done)
    fit: float = sum(record["seconds"]["fit"] for record in done)
    evaluation: float = sum(record["seconds"]["evaluate"] for record in done)
    return fit / max(trained, 1) * (amount or 0) + evaluation / len(done)


def _time_left(measured: list[float], guessed: list[float | None]) -> str:
    """The sums of what is known and of what is guessed, and how many runs nothing tells of."""
    rough = [seconds for seconds in guessed if seconds is not None]
    unknown = len(guessed) - len(rough)
    if not measured and not guessed:
        return "All is done."
    parts = [f"{len(measured) + len(guessed)} runs to do"]
    if measured:
        took = format_seconds(sum(measured))
        parts.append(f"{len(measured)} of them about {took} (as their method took)")
    if rough:
        parts.append(
            f"{len(rough)} roughly {format_seconds(sum(rough))} (within a factor of three, from "
            "the model's size, the rows and a matrix product on this machine)"
        )
    if unknown:
        parts.append(f"{unknown} of which nothing is known, as their model or rows are not here")
    return "; ".join(parts) + "."


DESCRIPTION = "Methods x stages x seeds from one YAML; started again, it goes on where it was."


def plan_parser() -> ArgumentParser:
    """The command's own options; those of the plan follow in the help."""
    about = (ContinualPlan.__doc__ or "").partition("Args:")[2]
    parser = ArgumentParser(
        prog="continual",
        description=DESCRIPTION,
        epilog=f"options of the plan, in YAML or as --name=value:{about}",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="append", required=True, help="the plan; may be repeated, later wins"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print the plan and its state, and write nothing"
    )
    parser.add_argument("--shard", help="only every n-th chain, e.g. 2/8 for the second of eight")
    return parser


def run_continual(args: list[str], main: Callable[[], None], parse: Parse) -> None:
    """Carry out the command.

    Args:
        args: Its arguments.
        main: The whole command line's entry, which the runs go through; reads sys.argv.
        parse: Parses the options of a run as its command does.

    Exits with code 1 if a run has failed, and with 128 plus the signal's
    number if someone has asked it to end.
    """
    own, overrides = plan_parser().parse_known_args(args)
    plan, shard = build_plan(read_options(own.config, overrides)), parse_shard(own.shard)
    _work_through(plan, shard, own.dry_run, main, parse)


def _work_through(
    plan: ContinualPlan, shard: Shard, dry_run: bool, main: Callable[[], None], parse: Parse
) -> None:
    # Only what is to be carried out waits for torch; a wrong plan has been refused by now.
    from sdft_lightning.continual.checks import canonical_plan, check_plan, claim_folder, plan_hash
    from sdft_lightning.continual.drive import (
        Stopped,
        Work,
        in_own_process,
        in_this_process,
        work_through,
    )
    from sdft_lightning.continual.records import all_records

    check_plan(plan, parse)
    canonical = canonical_plan(plan)
    folder, found = plan_folder(plan), plan_hash(canonical)
    claim_folder(folder, canonical, write=not dry_run)
    records = all_records(folder, found)
    print(overview(plan, shard, records), flush=True)
    if dry_run:
        return
    same = plan.processes == "same"
    work = Work(
        plan, found, shard, lambda locks: in_this_process(main) if same else in_own_process(locks)
    )
    try:
        failed = work_through(work)
    except Stopped as stop:
        print("Stopped. Give the same command to go on.", flush=True)
        raise SystemExit(stop.code) from stop
    print(f"\nResults: {work.results}", flush=True)
    if failed:
        print(f"{failed} failed; give the same command to try again.", flush=True)
        raise SystemExit(1)

"""Many runs from one plan: methods x stages x seeds, resumable, results as JSON Lines.

The command `continual` reads the plan, checks it, and works through it. What carries it out, and
the callbacks, need torch and are imported when they are first asked for (PEP 562).
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sdft_lightning.continual.plan import (
    ContinualPlan,
    Shard,
    parse_shard,
    plan_folder,
)
from sdft_lightning.continual.plan_file import build_plan, read_options

if TYPE_CHECKING:
    from sdft_lightning.continual.checks import Parse
    from sdft_lightning.continual.stage_callbacks import ResumePoint, StageEnd

__all__ = ["ContinualPlan", "ResumePoint", "StageEnd", "run_continual"]

DESCRIPTION = "Methods x stages x seeds from one YAML; started again, it goes on where it was."


def plan_parser() -> ArgumentParser:
    """The command's own options; those of the plan follow in the help."""
    about = (ContinualPlan.__doc__ or "").partition("Args:")[2]
    parser = ArgumentParser(
        prog="sdft continual",
        description=DESCRIPTION,
        epilog=f"options of the plan, in YAML or as --name=value:{about}",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="append",
        required=True,
        help="the plan, a file or preset:<name>; may be repeated, later wins",
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
    from sdft_lightning.continual.overview import overview
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


def __getattr__(name: str) -> Any:
    if name in __all__:
        from sdft_lightning.continual import stage_callbacks

        return getattr(stage_callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

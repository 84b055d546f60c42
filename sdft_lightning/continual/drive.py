"""Works through a plan: the commands of each stage, in processes of their own."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from sdft_lightning.continual.plan import (
    BASE,
    ContinualPlan,
    Shard,
    Unit,
    chains_of,
    plan_folder,
    share_of,
)
from sdft_lightning.continual.plan_file import base_folder, evaluation_options, fit_options
from sdft_lightning.continual.records import (
    Key,
    all_records,
    curve,
    empty_record,
    measured,
)
from sdft_lightning.continual.stage_callbacks import FIT_RESULT
from sdft_lightning.errors import UserError, harmless
from sdft_lightning.files.run_folder import unused_path
from sdft_lightning.files.whole_files import append_record, held_lock, repair_records, write_whole

Command = Callable[[list[str]], None]
_LAST_LINES = 20
_INTERRUPTED_ITSELF = 5.0  # seconds until a process is told that may have had a Ctrl-C itself
# Of a process that a person or a scheduler ended.
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_STOPPED = (*(-each for each in _ENDING), *(128 + each for each in _ENDING))


class RunFailed(Exception):
    """A command has failed; the text says why."""


class Stopped(Exception):
    """Someone has asked this process, or the one of a command, to end.

    Args:
        code: What to exit with: 128 plus the signal's number.
    """

    def __init__(self, code: int = 128 + signal.SIGTERM) -> None:
        super().__init__(code)
        self.code = code


def in_this_process(main: Callable[[], None]) -> Command:
    """Carry commands out here.

    Args:
        main: The command line's entry; reads sys.argv, as everything below it may.
    """

    def run(args: list[str]) -> None:
        try:
            with _as_command_line(args):
                main()
        except (Exception, SystemExit) as error:
            if _is_stop(error):
                raise Stopped(_stop_code(error)) from error
            if not isinstance(error, SystemExit) or error.code not in (None, 0):
                raise RunFailed(_reason(error)) from error
        finally:
            gc.collect()  # the modules of a run hold each other, and their tensors

    return run


@contextmanager
def _as_command_line(args: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = [before[0], *args]
    try:
        yield
    finally:
        sys.argv = before


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _is_stop(error: BaseException) -> bool:
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    # Lightning turns Ctrl-C into an exit with code 1.
    return any(isinstance(each, KeyboardInterrupt | SIGTERMException) for each in _chain(error))


def _stop_code(error: BaseException) -> int:
    if any(isinstance(each, KeyboardInterrupt) for each in _chain(error)):
        return 128 + signal.SIGINT
    code = getattr(error, "code", None)
    return code if code in _STOPPED else 128 + signal.SIGTERM


def _reason(error: BaseException) -> str:
    """The first cause that says something: an exit code does not."""
    for each in _chain(error):
        if not isinstance(each, SystemExit):
            return f"{type(each).__name__}: {each}"
    return f"exit code {error.code}" if isinstance(error, SystemExit) else str(error)


def in_own_process(locks: tuple[int, ...] = ()) -> Command:
    """Carry each command out in a process of its own.

    Args:
        locks: Files that the process keeps open: should this one be killed, the locks stay until
            the other has ended, and nobody starts a second run in its folder.
    """

    def run(args: list[str]) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "sdft_lightning.cli", *args],
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            pass_fds=locks,
        )
        assert process.stderr is not None
        with _told_to_stop(process) as told:
            last = _show(process.stderr)
            code = process.wait()
        if code in _STOPPED or told:
            raise Stopped(128 + told[0] if told else code if code > 0 else 128 - code)
        if code:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise RunFailed("\n".join([f"{how}; the last lines of its messages:", *last]))

    return run


@contextmanager
def _told_to_stop(process: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Pass SIGTERM, Ctrl-C and a hang-up on to a command's process, and wait until it has ended.

    Yields:
        The signals that came.
    """
    told: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        if number == signal.SIGHUP and number in told:
            return  # it comes from the terminal and from its shell: the run's end is under way
        told.append(number)
        # A terminal sends Ctrl-C and its hang-up to both. Where it came to this process alone, the
        # other is told.
        delay = 0.0 if number == signal.SIGTERM else _INTERRUPTED_ITSELF
        timer = threading.Timer(delay, process.terminate)  # nothing, where it has ended
        timer.daemon = True
        timer.start()

    before = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python takes none
        for number in _ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` has it, for both
                before[number] = signal.signal(number, pass_on)
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(stream: IO[str]) -> list[str]:
    """Pass messages on as they come, and keep the last ones."""
    last: deque[str] = deque(maxlen=_LAST_LINES)
    for line in stream:
        sys.stderr.write(line)
        last.append(line.rstrip("\n"))
    return list(last)


# The locks that a command's process keeps -> how it is carried out.
MakeCommand = Callable[[tuple[int, ...]], Command]


class Work(NamedTuple):
    """What the work on a share of a plan needs to know.

    Attributes:
        plan: The plan.
        plan_hash: Its hash, which every record holds.
        shard: The share.
        make_command: How commands are carried out.
    """

    plan: ContinualPlan
    plan_hash: str
    shard: Shard
    make_command: MakeCommand

    @property
    def folder(self) -> Path:
        """Folder of the plan."""
        return plan_folder(self.plan)

    @property
    def results(self) -> Path:
        """The file that this share's records go to."""
        return self.folder / self.shard.results_name

    def finished(self) -> dict[Key, dict[str, Any]]:
        """The records of finished runs, of all shares."""
        records = all_records(self.folder, self.plan_hash)
        return {key: found for key, found in records.items() if found["status"] == "finished"}


def work_through(work: Work) -> int:
    """Do what is not done of a share.

    Args:
        work: The share; its folder is this plan's already.

    Returns:
        How many chains have failed; the base model counts as one.
    """
    failed = 0
    locks = work.folder / "locks"
    with _held(locks / f"{work.results.stem}.lock", str(work.results)) as results_lock:
        repair_records(work.results)
        # The base model is evaluated once in a plan: by the first share.
        chains: list[list[Unit | None]] = [[None]] if work.shard.number == 1 else []
        chains += [[*chain] for chain in share_of(chains_of(work.plan), work.shard)]
        for chain in chains:
            name = BASE if chain[0] is None else f"{chain[0].method}-seed{chain[0].seed}"
            with _held(locks / f"{name}.lock", f"the chain {name}") as chain_lock:
                command = work.make_command((results_lock, chain_lock))
                failed += not _finish_chain(work, chain, command)
    return failed


def _held(path: Path, what: str) -> AbstractContextManager[int]:
    return held_lock(
        path,
        lambda holder: (
            f"name: another process works on {what} (process {holder} holds {path}). Wait for it "
            "or end it; to work beside it, give each process its own --shard."
        ),
    )


def _finish_chain(work: Work, chain: list[Unit | None], command: Command) -> bool:
    """Do the stages of a chain that are not done; false if one of them fails."""
    for unit in chain:
        key = (BASE, None, 0) if unit is None else unit.key
        if key not in work.finished():
            record = run_unit(work, unit, command)
            append_record(work.results, record)
            if record["status"] == "failed":
                print(f"failed: {record['run']}: {record['error']}", flush=True)
                return False
        if unit is not None and not work.plan.keep_checkpoints:
            remove_checkpoints(unit.folder)
    return True


def run_unit(work: Work, unit: Unit | None, command: Command) -> dict[str, Any]:
    """Train and evaluate a stage, or evaluate the base model without one; returns its record."""
    record = empty_record(work.plan, work.plan_hash, unit)
    print(f"\n=== {record['run']} ({time.strftime('%H:%M:%S')})", flush=True)
    try:
        fit: dict[str, Any] = {"updates": 0, "tokens": 0, "selected_step": 0, "seconds": 0.0}
        folder, model = base_folder(work.plan), None
        if unit is not None:
            folder = unit.folder
            fit = finish_fit(work.plan, unit, command)
            model = str(folder / fit["exported"])
            record["curve"] = curve(folder)
        record.update({name: fit[name] for name in ("updates", "tokens", "selected_step")})
        record["seconds"]["fit"] = fit["seconds"]
        start = time.monotonic()
        record.update(evaluate(work.plan, folder, model, command))
        record["seconds"]["evaluate"] = round(time.monotonic() - start, 1)
    except (RunFailed, UserError, OSError) as error:
        return {**record, "error": harmless(str(error))}
    return {**record, "status": "finished"}


def finish_fit(plan: ContinualPlan, unit: Unit, command: Command) -> dict[str, Any]:
    """Train a stage, go on where it was interrupted, or leave it alone if it is finished.

    Returns:
        The content of fit.json.
    """
    result = unit.folder / FIT_RESULT
    if not result.is_file():
        arguments = []
        if (unit.folder / "checkpoints" / "last.ckpt").exists():
            arguments = ["--ckpt_path=last"]
        elif unit.folder.exists():
            # Interrupted before the first resume point. Nothing of it is needed, nothing deleted.
            unit.folder.rename(unused_path(unit.folder.with_name(f"{unit.folder_name}-cut")))
        options = fit_options(plan, unit, _model_before(unit))
        command(["fit", _config(unit.folder, "fit", options), *arguments])
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def _model_before(unit: Unit) -> str | None:
    """The model that the stage before handed on; None at the first stage."""
    if unit.number == 1:
        return None
    (before,) = unit.chain.glob(f"{unit.number - 1}_*/{FIT_RESULT}")
    exported: str = json.loads(before.read_text(encoding="utf-8"))["exported"]
    return str(before.parent / exported)


def evaluate(
    plan: ContinualPlan, folder: Path, model: str | None, command: Command
) -> dict[str, Any]:
    """Measure a model on every stage's test set, the held-out sets and the benchmarks."""
    before = set(folder.glob("test-*"))
    command(["test", _config(folder, "test", evaluation_options(plan, folder, model))])
    (new,) = set(folder.glob("test-*")) - before
    return measured(new, [stage.name for stage in plan.stages], list(plan.held_out))


def _config(folder: Path, command: str, options: dict[str, Any]) -> str:
    """Write the options of a run beside its folder, where one can run it again by hand."""
    path = folder.with_name(f"{folder.name}.{command}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(options, indent=1, ensure_ascii=False) + "\n")  # JSON is YAML
    return f"--config={path}"


def remove_checkpoints(folder: Path) -> None:
    """Delete Lightning's checkpoints of a finished stage, and nothing else."""
    for path in [*folder.glob("checkpoints/*.ckpt"), *folder.glob("best/*.ckpt")]:
        if path.is_dir():  # of a strategy that shards
            shutil.rmtree(path)
        else:
            path.unlink()

"""Kills a run with SIGKILL again and again, resumes it, and compares it with one left alone.

    python scripts/soak.py                              # 300 steps, a kill every 20 s or so
    python scripts/soak.py --steps 24 --kill_after 6    # the short form that the tests run

Needs a system that forks: the imports are paid for once, each run is a child of this process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

torch.set_num_threads(1)  # a pool of threads does not survive a fork

from soak_compare import checkpoint, compare  # noqa: E402

from sdft_lightning.cli import main as command  # noqa: E402

SAVED_EVERY = 3  # steps


class Killed(NamedTuple):
    """What the killed run went through."""

    kills: int
    steps_lost: list[int]  # at each kill
    memory: list[list[tuple[int, float]]]  # of each life: (steps since its start, megabytes)


def write_inputs(folder: Path) -> None:
    """The tiny model of the tests, and thirty rows."""
    path = Path(__file__).parents[1] / "tests" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny", path)
    assert spec is not None
    assert spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    tokenizer = tiny.build_tokenizer()
    tiny.build_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps(row) + "\n" for row in tiny.example_rows(30)]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")


def arguments(folder: Path, name: str, steps: int, tokens: int) -> list[str]:
    """A fit with an EMA teacher, a checkpoint every third step, and every completion logged."""
    return [
        "fit",
        "--model=SDFTModule",
        f"--model.policy.name={folder / 'model'}",
        f"--model.sampling.max_new_tokens={tokens}",
        "--model.teacher=EMATeacher",
        "--model.teacher.update_rate=0.1",
        "--model.optimizer=AdamW",
        "--model.optimizer.lr=0.003",
        f"--data.train={folder / 'rows.jsonl'}",
        "--data.prompts.style=turns",
        "--data.batch_size=4",
        f"--trainer.max_steps={steps}",
        "--trainer.max_epochs=-1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1",
        f"--checkpoint.every_n_train_steps={SAVED_EVERY}",
        "--trainer.callbacks+=CompletionLog",
        "--trainer.callbacks.every_n_steps=1",
        f"--run.root={folder / 'runs'}",
        f"--run.name={name}",
    ]


def start(args: list[str], log: Path) -> int:
    """Run the command line in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 1
    try:
        command(args)
        code = 0
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)


def wait(
    child: int, time_is_up: Callable[[], bool], run: Path, memory: list[tuple[int, float]]
) -> bool:
    """Wait for a child to end; false if its time is up first. Notes (age, megabytes) meanwhile.

    An age is in steps that the child itself has logged.

    Raises:
        RuntimeError: If it failed.
    """
    before = len(logged(run))
    while not time_is_up():
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            if status:
                raise RuntimeError(f"a run ended with wait status {status}; see its log")
            return True
        memory.append((len(logged(run)) - before, resident(child)))
        time.sleep(0.05)
    return False


def after_seconds(seconds: float) -> Callable[[], bool]:
    """Whether so much time has passed from now on."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def resident(process: int) -> float:
    """Resident memory in megabytes; 0 where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def logged(run: Path) -> list[int]:
    """The steps that the run wrote down; one done again after a kill comes twice."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [int(line.split('"step": ')[1].split(",")[0]) for line in lines if '"step": ' in line]


def last_step(run: Path) -> int:
    """The last step that the run wrote down."""
    return next(reversed(logged(run)), 0)


def saved_step(run: Path) -> int:
    """The step of last.ckpt, 0 where there is none."""
    path = run / "checkpoints" / "last.ckpt"
    return int(checkpoint(run)["global_step"]) if path.is_file() else 0


def run_killed(args: list[str], run: Path, options: argparse.Namespace, log: Path) -> Killed:
    """Start, kill and resume until the run is through.

    Args:
        args: Of the fit.
        run: Its folder.
        options: Of the command line: when to kill, and the seed of that.
        log: Where the output goes.
    """
    chance = random.Random(options.seed)
    seconds = options.seconds
    kills, lost = 0, []
    lives: list[list[tuple[int, float]]] = []
    while True:
        resumed = ["--ckpt_path=last"] if (run / "checkpoints" / "last.ckpt").is_file() else []
        if not resumed and run.exists():  # killed before the first checkpoint: begin anew
            run.rename(run.with_name(f"{run.name}-{kills}"))
        before = saved_step(run)
        child = start([*args, *resumed], log)
        time_is_up = after_seconds(seconds * chance.uniform(0.5, 1.5))
        if options.kill_after:
            target = before + options.kill_after
            time_is_up = lambda: last_step(run) >= target  # noqa: B023, E731 - used at once
        memory: list[tuple[int, float]] = []
        over = wait(child, time_is_up, run, memory)
        lives.append(memory)
        if over:
            return Killed(kills, lost, lives)
        if options.kill_after:
            time.sleep(chance.uniform(0, 0.1))  # anywhere in a step, or in a checkpoint
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        lost.append(max(0, last_step(run) - saved_step(run)))
        if saved_step(run) == before:
            seconds *= 1.5  # a busy machine: give it time to get somewhere
        print(f"kill {kills}: at step {last_step(run)}, goes on from {saved_step(run)}", flush=True)


def growth(memory: list[tuple[int, float]], steps: int) -> float:
    """How much more memory a run has in its last quarter of steps than in its second, megabytes."""
    second = [size for step, size in memory if steps / 4 <= step < steps / 2]
    last = [size for step, size in memory if step >= 3 * steps / 4]
    return statistics.median(last) - statistics.median(second) if second and last else math.inf


def at_age(memory: list[tuple[int, float]], age: int) -> list[float]:
    """The sizes of a life between this age and the double of it."""
    return [size for step, size in memory if age <= step < 2 * age]


def resumed_growth(
    lives: list[list[tuple[int, float]]], whole: list[tuple[int, float]], age: int = SAVED_EVERY
) -> float:
    """How much more memory the largest life has than the run left alone at the same age, megabytes.

    Each life is a process of its own, so it is compared where it is as old, not as far.
    """
    sizes = [statistics.median(found) for life in lives if (found := at_age(life, age))]
    alone = at_age(whole, age)
    return max(sizes) - statistics.median(alone) if sizes and alone else math.inf


def problems(result: Killed, wanted: int, more: float, resumed: float, most: float) -> list[str]:
    """What speaks against a soak apart from differences."""
    found = []
    if result.kills < wanted:
        found.append(f"only {result.kills} kills, wanted at least {wanted}")
    if max(result.steps_lost, default=0) > SAVED_EVERY:
        found.append(f"steps lost at a kill {result.steps_lost}, saved every {SAVED_EVERY}")
    for name, size in (("from the second quarter to the last", more), ("in a life", resumed)):
        if size > most:
            found.append(f"memory grew {size:+.1f} MB {name}, allowed {most:+.1f}")
    return found


def main() -> None:
    """Run from the command line; exit code 1 where anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="mean time to a kill; at most a quarter of what the run takes alone",
    )
    parser.add_argument("--kill_after", type=int, default=0, help="steps, instead of seconds")
    parser.add_argument("--tokens", type=int, default=48, help="of a completion")
    parser.add_argument("--kills", type=int, default=2, help="fewer are a failure")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("--most_growth", type=float, default=30.0, help="megabytes, see growth()")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        log = folder / "log.txt"
        whole, killed = folder / "runs" / "whole", folder / "runs" / "killed"
        memory: list[tuple[int, float]] = []
        began = time.monotonic()
        try:
            child = start(arguments(folder, "whole", options.steps, options.tokens), log)
            if not wait(child, after_seconds(3600), whole, memory):
                raise RuntimeError("the run left alone took more than an hour")
            alone = time.monotonic() - began
            # On a fast machine the whole run takes no longer than the time to the first kills.
            options.seconds = min(options.seconds, alone / 4)
            args = arguments(folder, "killed", options.steps, options.tokens)
            result = run_killed(args, killed, options, log)
        except RuntimeError:
            print(log.read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
            raise
        items, wrong = compare(killed, whole)
        parts = sorted(path.name for path in (killed / "checkpoints").iterdir())
    more = growth(memory, options.steps)
    resumed = resumed_growth(result.memory, memory)
    wrong += problems(result, options.kills, more, resumed, options.most_growth)
    print(
        f"kills survived {result.kills}, steps lost and done again {sum(result.steps_lost)}, items "
        f"compared {items}, wrong {len(wrong)}; {options.steps} steps, {alone:.0f} s left "
        f"alone; memory {more:+.1f} MB from the second quarter to the last (at most "
        f"{max((size for _, size in memory), default=0):.0f}), {resumed:+.1f} MB in the largest "
        f"life against the run left alone; checkpoints {parts}"
    )
    for each in wrong[:20]:
        print(f"wrong: {each}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

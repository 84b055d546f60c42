"""`make gpu`: try and measure on a GPU what no CPU can show, in at most ten minutes.

    python scripts/gpu_check.py                          # real shapes on the GPU
    python scripts/gpu_check.py --parts token,loss       # some parts only
    python scripts/gpu_check.py --device cpu --small     # every part on tiny shapes, on a CPU

Each part runs in a process of its own for a limited time, so that none that crashes, hangs or runs
out of memory ends the others. It becomes one JSON line, printed when the part ends: its name,
status (ok, failed, skipped), seconds, why it is not ok, and its figures. A table ends the output.
Weights are random and of real shapes; nothing is downloaded. The exit code is 1 where a part
failed, 2 for a wrong command.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent
TOTAL = 600.0  # seconds of all parts together
_TAIL = 3000  # characters of a failed part's output that are shown
_SHOWN = 160  # characters of a reason in the table


class Part(NamedTuple):
    """One part.

    Attributes:
        name: A function of this name is called with the setting.
        module: Where the function is.
        seconds: It may take.
        what: What it shows.
    """

    name: str
    module: str
    seconds: float
    what: str


PARTS = (
    Part("machine", "gpu_kernels", 15, "versions and memory"),
    Part("steps", "gpu_runs", 60, "three steps of the command line beside those of a CPU"),
    Part("gradients", "gpu_runs", 110, "every micro-batch reaches every trained weight"),
    Part("tests", "gpu_kernels", 50, "the tests that are marked gpu"),
    Part("token", "gpu_kernels", 60, "milliseconds, launches and synchronisations of a token"),
    Part("loss", "gpu_kernels", 25, "the loss over sizes of its chunks"),
    Part("attention", "gpu_kernels", 30, "attention with a mask, with none, by lengths"),
    Part("whole_step", "gpu_runs", 130, "a low-memory step, phases and peaks beside the plan"),
    Part("hand_over", "gpu_others", 50, "weights to a sampler, by each transport"),
    Part("trl", "gpu_others", 70, "a step beside TRL's SDFTTrainer"),
)
# What the server of processes imports once for all parts; nothing of it touches a GPU.
PRELOADED = ("torch", "sdft_lightning.cli.command", "gpu_kernels", "gpu_runs", "gpu_others")


class Outcome(NamedTuple):
    """How a part ended.

    Attributes:
        part: Its name.
        status: ok, failed or skipped.
        seconds: It took.
        why: It is not ok.
        figures: What it reported, also before it failed.
    """

    part: str
    status: str
    seconds: float
    why: str
    figures: list[dict[str, Any]]

    def line(self) -> str:
        """One line of JSON: name, status, reason and figures of the part, seconds to a tenth."""
        return json.dumps({**self._asdict(), "seconds": round(self.seconds, 1)})


def work(part: Part, device: str, small: bool, connection: Any, log: str) -> None:
    """Run a part in this process, and send what it finds and how it ended.

    Args:
        part: Which.
        device: `cuda` or `cpu`.
        small: Tiny shapes.
        connection: Where (kind, content) is sent: figures, and one end.
        log: File that takes the output.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # what the part starts ends with it
    # Line by line, so that what is printed before a crash is there.
    sys.stdout = sys.stderr = file = open(log, "a", encoding="utf-8", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    try:
        common = importlib.import_module("gpu_common")
        setting = common.Setting(device, small, lambda figure: connection.send(("figure", figure)))
        if device == "cuda" and not _has_cuda():
            raise common.WrongError("torch sees no CUDA device; --device cpu --small needs none")
        getattr(importlib.import_module(part.module), part.name)(setting)
        end = ("ok", "")
    except BaseException as error:
        traceback.print_exc()
        kind = {"SkippedError": "skipped"}.get(type(error).__name__, "failed")
        told = str(error) if type(error).__name__ in ("SkippedError", "WrongError") else repr(error)
        end = (kind, told)
    connection.send(end)
    connection.close()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def run_part(part: Part, device: str, small: bool, seconds: float, context: Any) -> Outcome:
    """Run a part in a process of its own.

    Args:
        part: Which.
        device: `cuda` or `cpu`.
        small: Tiny shapes.
        seconds: After these it is ended.
        context: Of `multiprocessing`, which starts the process.
    """
    receiver, sender = context.Pipe(duplex=False)
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sdft-gpu-check-") as folder:
        log = Path(folder) / "output.txt"
        log.touch()
        process = context.Process(target=work, args=(part, device, small, sender, str(log)))
        process.start()  # the first waits for the server's imports
        began = time.monotonic()
        sender.close()
        status, why = "failed", ""
        while not why and status == "failed":
            if not receiver.poll(max(0.0, began + seconds - time.monotonic())):
                why = f"ended after {seconds:.0f} s, the time that it has"
                break
            try:
                kind, content = receiver.recv()
            except EOFError:
                process.join(5)
                why = f"its process ended with code {process.exitcode} (-9: perhaps out of memory)"
                break
            if kind == "figure":
                figures.append(content)
            else:
                status, why = kind, content
        spent = time.monotonic() - began
        _end(process)
        if status == "failed":
            print(log.read_text(encoding="utf-8", errors="replace")[-_TAIL:], file=sys.stderr)
    return Outcome(part.name, status, spent, why, figures)


def _end(process: Any) -> None:
    """End a process that we started, with all that it has started."""
    process.join(1)
    if hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # all of it has ended
            pass
    if process.is_alive():
        process.kill()
    process.join(10)


def table(outcomes: Sequence[Outcome]) -> str:
    """All parts, and their figures, as Markdown."""
    lines = ["| part | status | seconds | |", "|---|---|---|---|"]
    told = {part.name: part.what for part in PARTS}
    for each in outcomes:
        note = each.why.replace("\n", " ").replace("|", "/")[:_SHOWN] or told.get(each.part, "")
        lines.append(f"| {each.part} | {each.status} | {each.seconds:.1f} | {note} |")
    lines += ["", "| part | of what | figures |", "|---|---|---|"]
    for each in outcomes:
        for figure in each.figures:
            values = ", ".join(
                f"{name} {value}" for name, value in figure.items() if name != "what"
            )
            lines.append(f"| {each.part} | {figure['what']} | {values} |")
    return "\n".join(lines)


def chosen_parts(text: str | None) -> list[Part]:
    """The parts that a list names; all without it.

    Raises:
        ValueError: If there is none of a name.
    """
    known = {part.name: part for part in PARTS}
    names = list(known) if text is None else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--parts: no part {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def process_context(device: str) -> Any:
    """Who starts processes: where there is one, a server that has imported what all parts need."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def main(args: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for, print their lines and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--parts", help=f"of {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--out", type=Path, help="a new file for the JSON lines")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="multiplies all limits, for a busy machine"
    )
    options = parser.parse_args(args)
    try:
        parts = chosen_parts(options.parts)
    except ValueError as error:
        parser.error(str(error))
    if not options.patience > 0:
        parser.error(f"--patience {options.patience}: it must be above 0")
    if options.out is not None:
        try:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.open("x").close()
        except OSError as error:
            parser.error(f"--out {options.out}: {error.strerror}; name a file that is not there")
    context = process_context(options.device)
    end = time.monotonic() + TOTAL * options.patience
    outcomes = []
    for part in parts:
        print(f"{part.name}: {part.what}", file=sys.stderr, flush=True)
        left = min(part.seconds * options.patience, end - time.monotonic())
        if left < 1:
            outcome = Outcome(part.name, "failed", 0.0, "no time was left for it", [])
        else:
            outcome = run_part(part, options.device, options.small, left, context)
        outcomes.append(outcome)
        print(outcome.line(), flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(outcome.line() + "\n")
    print("\n" + table(outcomes))
    return int(any(each.status == "failed" for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())

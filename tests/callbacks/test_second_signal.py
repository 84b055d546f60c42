"""A second SIGTERM or Ctrl-C ends a run at once, also one that hangs where no Python runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

HANG = """
import ctypes, multiprocessing, os, pathlib, signal, sys
import lightning as L

class Hang(L.Callback):
    '''Hangs in the second step as a collective does: no signal interrupts the lock.'''
    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == 1:
            children = multiprocessing.active_children()
            (worker,) = (each for each in children if type(each) is multiprocessing.Process)
            pathlib.Path("workers.part").write_text(str(worker.pid))
            os.replace("workers.part", "workers")
            lock = ctypes.create_string_buffer(256)
            libc = ctypes.CDLL(None)
            libc.pthread_mutex_lock(lock)
            libc.pthread_mutex_lock(lock)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    from sdft_lightning.cli import main
    main()
"""


def wait_for(what: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.05)
    return what()


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_a_hung_step_at_once_and_its_workers_but_no_other_signal_is_a_second(
    number: signal.Signals, fit_args: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "hang.py"
    script.write_text(HANG)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    args = [*fit_args, "--data.num_workers=1", "--trainer.callbacks+=hang.Hang"]
    run = subprocess.Popen(
        [sys.executable, str(script), *args],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert wait_for(lambda: (tmp_path / "workers").exists() or run.poll() is not None, 120)
        assert run.poll() is None
        worker = int((tmp_path / "workers").read_text())
        other = signal.SIGINT if number == signal.SIGTERM else signal.SIGTERM
        time.sleep(0.5)  # it hangs by now
        for each in (number, number, other, signal.SIGHUP):  # two at once, as `timeout` sends them
            os.killpg(run.pid, each) if each != signal.SIGTERM else os.kill(run.pid, each)
        time.sleep(1.6)
        os.kill(run.pid, signal.SIGHUP)  # as a terminal and its shell, one after the other
        time.sleep(0.5)
        assert run.poll() is None
        assert lives(worker)
        os.kill(run.pid, number)
        _, messages = run.communicate(timeout=10)
        assert run.returncode == 128 + number
        assert f"{number.name} came again: ended at once, without saving." in messages
        assert wait_for(lambda: not lives(worker), 2)  # torch alone would take up to 5 seconds
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()

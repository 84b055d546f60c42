"""What a process that prepares batches does about signals and about the end of its run."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def start_worker(parent: int, dies_with_parent: bool, worker: int) -> None:
    """Leave Ctrl-C and a hang-up to the run, which ends its workers; end where the run is killed.

    Args:
        parent: The run's process.
        dies_with_parent: Let the system end this process with its parent, rather than torch some
            seconds later. Linux does so when the parent's *thread* ends that started it.
        worker: Number of the process; not needed.
    """
    # A terminal sends both to all its processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if dies_with_parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # which was killed before
            os._exit(1)

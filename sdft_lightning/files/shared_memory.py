"""What runs keep in shared memory, and the clearing of what killed ones have left there.

Memory under /dev/shm is not given back when a process is killed: it stays taken until a reboot.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

from sdft_lightning.files.whole_files import clear_left, held_folder

MEMORY = Path("/dev/shm")
_PREFIX = "sdft-weights-"
_PATTERN = f"{_PREFIX}*-*"
# Tensors that torch passes between processes; the number is the process that made the file.
_TORCH = re.compile(r"torch_(\d+)_\d+(_\d+)?")
_HOST_PROCESSES, _HOST_MEMORY = 0xEFFFFFFC, 0xEFFFFFFF  # the kernel's numbers of these namespaces


def new_weights_folder(parent: Path | None) -> tuple[Path, int]:
    """Make a folder for weights that are handed to another process; clear those of killed runs.

    Args:
        parent: Where; /dev/shm or the system's temporary folder without it.

    Returns:
        The folder, and the number of its open lock: while that is open, nobody clears the folder.
    """
    place = parent or (MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir()))
    clear_left(place, _PATTERN)
    return held_folder(place, f"{_PREFIX}{os.getpid()}-")


def remove_weights_folder(folder: Path, lock: int) -> None:
    """Remove what `new_weights_folder` made."""
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def clear_shared_memory() -> None:
    """Remove what killed runs of this user have left: handed-over weights, and torch's tensors."""
    for place in {MEMORY, Path(tempfile.gettempdir())}:
        clear_left(place, _PATTERN)
    left = [path for path in MEMORY.glob("torch_*") if _made_by_dead(path)]
    if not left or _may_miss_processes():
        return
    used = _mapped()
    for path in left:
        if str(path) not in used:
            with contextlib.suppress(OSError):
                path.unlink()


def _made_by_dead(path: Path) -> bool:
    """Whether a file is this user's, and was made by a process that is there no more."""
    match = _TORCH.fullmatch(path.name)
    if match is None:
        return False
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
            return False
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # gone meanwhile; another user's process; no process's number
        return False
    return False


def _may_miss_processes() -> bool:
    """Whether processes that are not seen here share this memory: a container with --ipc=host."""
    try:
        seen, shared = (os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "ipc"))
    except OSError:
        return True
    return shared == _HOST_MEMORY and seen != _HOST_PROCESSES


def _mapped() -> set[str]:
    """Files that living processes of this user have in their memory, also in containers."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # has ended meanwhile, or is another user's
            text = maps.read_text(encoding="utf-8", errors="replace")
            found.update(re.findall(rf"{MEMORY}/\S+", text))
    return found

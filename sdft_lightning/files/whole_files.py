"""Files, folders and records that appear whole or not at all, by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sdft_lightning.errors import UserError
from sdft_lightning.files.texts import json_text

_LOCK_ATTEMPTS = 20
_LOCK_PAUSE = 0.5  # seconds
_MEANINGS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your disk quota is used up",
    errno.EFBIG: "the file is larger than this process may write (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "you may not write there",
    errno.EPERM: "you may not write there",
}


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file under a temporary name in the same folder; it takes its name when complete.

    An older file of that name stays until then, and stays for good if something goes wrong.

    Args:
        path: The file.

    Yields:
        The open file.

    Raises:
        UserError: If it cannot be written: no space, no permission.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_left(path.parent, _unfinished(path))
        with os.fdopen(_opened_and_held(temporary, os.O_TRUNC), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise_user_error(error, path)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name beside it; it takes its name when complete.

    Args:
        path: The folder; must not exist.

    Yields:
        The folder to write into.

    Raises:
        UserError: If it cannot be written: no space, no permission.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_left(path.parent, _unfinished(path))
        number = _made_and_held(temporary)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb") as content:
                        os.fsync(content.fileno())
            os.rename(temporary, path)
        finally:
            os.close(number)
        sync_folder(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise_user_error(error, path)
        raise


def _unfinished(path: Path) -> str:
    """Pattern of the temporary names of a file or folder."""
    return f".{glob.escape(path.name)}.*.part"


def clear_left(parent: Path, pattern: str) -> None:
    """Remove this user's files and folders that killed processes have left.

    What a living process is using it holds a lock on; that is not touched.

    Args:
        parent: Where they are.
        pattern: Of their names.
    """
    for left in parent.glob(pattern):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            number = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if os.fstat(number).st_uid != os.geteuid() or not _locked(number):
                    continue
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()
            finally:
                os.close(number)


@contextmanager
def held_lock(path: Path, refusal: Callable[[str], str], remove: bool = False) -> Iterator[int]:
    """Hold a lock for as long as this process, and processes that inherit the file, are there.

    Args:
        path: The lock's file; made, with its folders.
        refusal: From the process that holds it to the sentence of the error.
        remove: Remove the file in the end.

    Yields:
        The file's number, for children to inherit.

    Raises:
        UserError: If another process holds it.
        OSError: If the file cannot be made.
    """
    number = _wait_for(path)
    if number is None:
        raise UserError(refusal(_holder(path)))
    try:
        os.ftruncate(number, 0)
        os.write(number, f"{os.getpid()} on {socket.gethostname()}".encode())
        yield number
    finally:
        if remove:
            path.unlink(missing_ok=True)
        os.close(number)


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:100] or "unknown"
    except OSError:
        return "unknown"


def _wait_for(path: Path) -> int | None:
    """Try for a while: workers of a killed process let go some seconds after it."""
    for attempt in range(_LOCK_ATTEMPTS):
        if attempt:
            time.sleep(_LOCK_PAUSE)
        path.parent.mkdir(parents=True, exist_ok=True)
        number = _held(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), path)
        if number is not None:
            return number
    return None


def _opened_and_held(path: Path, flags: int) -> int:
    while True:
        number = _held(os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666), path)
        if number is not None:
            return number


def held_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """Make a new folder and hold a lock on it, so that `clear_left` of others leaves it.

    Args:
        parent: Where it is made.
        prefix: Begin of its name.

    Returns:
        The folder, and the number of the open lock, to be closed when the folder is gone.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    return folder, _made_and_held(folder)


def _made_and_held(folder: Path) -> int:
    while True:
        folder.mkdir(exist_ok=True)
        number = _held(os.open(folder, os.O_RDONLY), folder)
        if number is not None:
            return number


def _held(number: int, path: Path) -> int | None:
    """Lock an open file; None, and it is closed, where another holds it or has removed it."""
    with contextlib.suppress(FileNotFoundError):
        if _locked(number) is not False and os.path.samestat(os.fstat(number), path.stat()):
            return number
    os.close(number)
    return None


def _locked(number: int) -> bool | None:
    """Lock an open file: whether nobody else had; None where the file system has no locks."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a power cut; not all systems can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def raise_user_error(error: BaseException, path: Path) -> None:
    """Say what a failed write means, if the operating system refused it.

    Args:
        error: What was raised, maybe by a library that wraps the system's own error.
        path: What was to be written.

    Raises:
        UserError: With the reason and the remedy; nothing is raised for other errors.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _MEANINGS:
            raise _refused(cause, path) from error
        cause = cause.__cause__ or cause.__context__


def no_room(error: OSError, path: object) -> UserError | None:
    """What an error means that only writing can meet; None for others, such as a missing file.

    Args:
        error: What was raised.
        path: What was to be written.
    """
    only = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    return _refused(error, path) if error.errno in only else None


def _refused(error: OSError, path: object) -> UserError:
    assert error.errno is not None
    return UserError(
        f"{path} could not be written: {_MEANINGS[error.errno]} ({error.strerror}). What was there "
        "before is untouched. Make room or give another folder (--run.root), then go on with "
        "--ckpt_path=last."
    )


def check_can_make(folder: Path, option: str = "run.root") -> None:
    """Try, before any work, whether a folder can be made and written into; nothing stays.

    Args:
        folder: It need not exist.
        option: What names the folder that it is in.

    Raises:
        UserError: If it cannot.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        Path(tempfile.mkdtemp(prefix=".sdft-", dir=place)).rmdir()
    except OSError as error:
        reason = _MEANINGS.get(error.errno or 0, error.strerror)
        raise UserError(
            f"{option}: {folder} cannot be made or written into: {reason}, in {place}. Give "
            f"another folder with --{option}."
        ) from error


def append_whole(path: Path, lines: str) -> None:
    """Append lines to a text file; half a line that a killed process left behind goes first.

    Args:
        path: The file; made if absent.
        lines: Text that ends with a newline.

    Raises:
        UserError: If it cannot be written: no space, no permission.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            end = file.tell()
            while end > 0 and _byte_before(file, end) != b"\n":
                end -= 1
            file.truncate(end)
            file.write(lines.encode("utf-8"))
    except OSError as error:
        raise_user_error(error, path)
        raise


def _byte_before(file: IO[bytes], place: int) -> bytes:
    file.seek(place - 1)
    return file.read(1)


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and move it there."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append one line in one write, and wait until it is on the disk."""
    line = (json_text(record) + "\n").encode()
    with path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def repair_records(path: Path) -> None:
    """Take away a last line that was cut short, so that the next one stands on its own."""
    if not path.is_file():
        return
    content = path.read_bytes()
    if content.endswith(b"\n") or not content:
        return
    kept = content[: content.rfind(b"\n") + 1]
    with path.open("r+b") as file:
        file.truncate(len(kept))
        os.fsync(file.fileno())


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of records; a last one without its end is left out.

    Raises:
        UserError: If another line is no record.
    """
    records: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: malformed: {error}. Remove the line; its run is then "
                "evaluated again."
            ) from error
        records.append(record)
    return records

"""Verdicts on disk: one small file each, so that any number of processes may share a folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdft_lightning.errors.foreign_text import mask, printable

_MOST_BYTES = 2**24  # of a file that `put` has written; replies are shorter


class VerdictCache:
    """Replies of a judge by what was asked.

    Args:
        folder: Where they are kept; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, request: dict[str, Any]) -> str | None:
        """The reply to an equal request, or None; a damaged file counts as none."""
        path = self._path(request)
        try:
            if not path.is_file() or path.stat().st_size > _MOST_BYTES:
                return None
            found = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        reply = found.get("reply") if isinstance(found, dict) else None
        return reply if isinstance(reply, str) else None

    def put(self, request: dict[str, Any], reply: str) -> str:
        """Keep a reply, known secrets masked; the file holds the request too, to be read by people.

        Returns:
            Why it could not be kept; empty where it was.
        """
        entry = {"request": request, "reply": mask(reply)}
        text = json.dumps(entry, ensure_ascii=False, indent=1)
        raw = text.encode("utf-8", "backslashreplace")  # half a character becomes JSON's \\ud800
        partial: str | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=self.folder, suffix=".partial")
            with os.fdopen(handle, "wb") as file:
                file.write(raw)
            os.replace(partial, self._path(request))
        except OSError as error:
            if partial is not None:
                with suppress(OSError):
                    os.unlink(partial)
            return (
                f"{self.folder}: {printable(str(error.strerror))}. Make room there, or name "
                "another folder as data.judge.cache."
            )
        return ""

    def _path(self, request: dict[str, Any]) -> Path:
        text = json.dumps(request, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"

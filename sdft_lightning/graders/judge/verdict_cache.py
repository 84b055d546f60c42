"""Verdicts on disk: one small file each, so that any number of processes may share a folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


class VerdictCache:
    """Replies of a judge by what was asked.

    Args:
        folder: Where they are kept; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, request: dict[str, Any]) -> str | None:
        """The reply to an equal request, or None; a damaged file counts as none."""
        try:
            found = json.loads(self._path(request).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        reply = found.get("reply") if isinstance(found, dict) else None
        return reply if isinstance(reply, str) else None

    def put(self, request: dict[str, Any], reply: str) -> None:
        """Keep a reply; the file holds the request too, to be read by people."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"request": request, "reply": reply}, ensure_ascii=False, indent=1)
        handle, partial = tempfile.mkstemp(dir=self.folder, suffix=".partial")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, self._path(request))

    def _path(self, request: dict[str, Any]) -> Path:
        text = json.dumps(request, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"

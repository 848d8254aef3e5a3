"""The journal of an unfinished overlay: one JSON line for each group of tensors whose bytes are safely on disk.

    {"journal": 1, "layout": <sha256 of tensors, shards and config>}
    {"key": "model.layers.0", "sha256": {"<tensor>": "<hex>", ...}}

Lines are appended and synced after the data they speak of, so a line that is there is true. A kill can tear the last
line only; a torn line is cut off.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from everybit.errors import OutputError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are then not told apart
    fcntl = None

JOURNAL_NAME = "journal.jsonl"


class Journal:
    """An open journal, locked against other runs until it is closed or the process ends.

    Raises: OutputError when another run holds it, or it was made for another layout
    """

    def __init__(self, folder: Path, layout: str) -> None:
        self.path = folder / JOURNAL_NAME
        self._file: BinaryIO = open(self.path, "a+b", buffering=0)  # noqa: SIM115  held until close()
        try:
            self._lock()
            self.groups = self._read(layout)
        except BaseException:
            self.close()
            raise

    def append(self, key: str, checksums: dict[str, str]) -> None:
        """Adds a line and syncs it to disk."""
        self._write({"key": key, "sha256": checksums})

    def close(self) -> None:
        """Closes the file and lets other runs have it."""
        self._file.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.lockf(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise OutputError(
                f"{self.path.parent} is being written by another run: wait for it, or choose another folder"
            ) from None
        except OSError:
            return  # a file system without locks

    def _read(self, layout: str) -> dict[str, dict[str, str]]:
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines:
            self._file.truncate(0)
            self._write({"journal": 1, "layout": layout})
            return {}
        groups: dict[str, dict[str, str]] = {}
        try:
            found = json.loads(lines[0])["layout"]
            for line in lines[1:]:
                entry = json.loads(line)
                groups[str(entry["key"])] = {str(name): str(value) for name, value in entry["sha256"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise OutputError(f"{self.path} is damaged: delete {self.path.parent} and start again") from None
        if found != layout:
            raise OutputError(
                f"{self.path.parent} belongs to a run with other options or another model: "
                "use the same options to resume it, or delete the folder to start again"
            )
        self._file.truncate(len(whole))
        return groups

    def _write(self, entry: object) -> None:
        line = memoryview(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        before = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:  # the disk is full: no torn line may stay before the next one
            self._file.truncate(before)
            raise
        os.fsync(self._file.fileno())

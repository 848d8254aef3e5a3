"""One log of many processes: each sends its lines over a local socket, the driver writes them."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from typing import IO

SEND_S = 1.0  # a line that the driver does not take for so long is lost, and counted
_LONGEST = 1 << 20


class Sender:
    """A stream for a log handler: each write, a whole line, is one datagram."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(SEND_S)

    def write(self, text: str) -> None:
        self._socket.sendto(text.encode("utf-8", "replace"), str(self._path))

    def flush(self) -> None:
        """Nothing is held back."""


class Relay:
    """Takes the lines at `path` and writes them to `stream`, until `close`."""

    def __init__(self, path: Path, stream: IO[str]) -> None:
        self._stream = stream
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._run, name="everybit-log", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while line := self._socket.recv(_LONGEST):
            with contextlib.suppress(OSError, ValueError):  # a log that cannot be written stops nothing
                self._stream.write(line.decode("utf-8", "replace"))
                self._stream.flush()

    def close(self) -> None:
        """What has arrived is written first."""
        path = self._socket.getsockname()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last, contextlib.suppress(OSError):
            last.sendto(b"", path)
            self._thread.join(5)
        self._socket.close()

"""`everybit serve` in a process of its own, for benchmarks that speak HTTP."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@dataclass
class Served:
    """A server that is ready; `ready_s` from its start."""

    name: str
    port: int
    ready_s: float


@contextlib.contextmanager
def serving(overlay: Path, *options: str) -> Iterator[Served]:
    command = [sys.executable, "-m", "everybit.cli.main", "serve", f"model={overlay}", "--port", "0", *options]
    begin = time.perf_counter()
    process = subprocess.Popen([*command, "--log", "/dev/null"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"ready on http://\S+:(\d+)", line):
                yield Served("model", int(found[1]), time.perf_counter() - begin)
                break
        else:
            raise RuntimeError(f"everybit serve ended with {process.wait()}")
    finally:
        process.terminate()
        process.wait()


def commit() -> str:
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def write_line(path: Path | None, line: dict[str, Any]) -> None:
    """One JSON line, printed, and appended to `path`."""
    text = json.dumps(line)
    print(text)
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

"""Where an overlay grows: `OUT.partial`, locked, stamped with its options, renamed to OUT when complete."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from everybit.errors import OutputError

STATISTICS, OPTIONS, LOCK = "sensitivity.part", "options.json.part", ".lock"
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")  # tokenizer, generation config, licence


def free_output(out: Path, resume: bool, dry_run: bool) -> Path:
    """`out`, if nothing stands there and no interrupted run waits beside it. Raises: OutputError"""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not empty: choose another output folder or remove it")
    partial = partial_of(out)
    if partial.exists() and not resume and not dry_run:
        raise OutputError(f"{partial} is left from an interrupted run: continue it with --resume, or remove it")
    return out


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@contextmanager
def workspace(out: Path, options: dict[str, Any]) -> Iterator[Path]:
    """The partial folder of `out`; on a clean exit it is renamed to `out`, otherwise it stays for `--resume`.

    Raises: OutputError when another run holds it, when it was begun with other options, or on a disk error.
    """
    partial = partial_of(out)
    stamp = json.dumps(options, sort_keys=True)
    with writable(partial):
        partial.mkdir(parents=True, exist_ok=True)
        with open(partial / LOCK, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"{partial} is being written by another run: wait or choose another output") from None
            recorded = partial / OPTIONS
            if recorded.is_file() and recorded.read_text() != stamp:
                raise OutputError(
                    f"{partial} was begun with another model or other options: repeat the same command, or remove it"
                )
            temporary = partial / (OPTIONS + ".tmp")
            temporary.write_text(stamp)
            os.replace(temporary, recorded)
            yield partial
            for leftover in (STATISTICS, OPTIONS, LOCK):
                (partial / leftover).unlink(missing_ok=True)
            if out.is_dir():
                out.rmdir()  # an empty folder that the user made
            os.rename(partial, out)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turns the disk's errors into OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(f"disk full while writing {path}: free space, then continue with --resume") from error
        raise OutputError(f"cannot write {path} ({error.strerror or error}): choose another output folder") from error


def copy_side_files(source: Path, out: Path) -> None:
    """Tokenizer, generation config and licence; never weights, config.json or an index."""
    for pattern in SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file.name not in ("config.json",) and not file.name.endswith(".index.json"):
                shutil.copyfile(file, out / file.name)

"""Where an overlay grows: `OUT.partial`, renamed to OUT when it is complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from everybit.errors import OutputError, ShapeError, SourceError

STATISTICS = "sensitivity.part"  # not *.safetensors: it is no part of the overlay
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")  # tokenizer, generation config, licence


def free_output(out: Path, resume: bool, dry_run: bool = False) -> Path:
    """The partial folder of `out`, if nothing stands at `out` and no interrupted run waits unasked for.

    Raises: OutputError
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not empty: choose another output folder or remove it")
    partial = out.with_name(out.name + ".partial")
    if partial.exists() and not resume and not dry_run:
        raise OutputError(f"{partial} is left from an interrupted run: continue it with --resume, or remove it")
    return partial


@contextmanager
def new_folder(partial: Path) -> Iterator[None]:
    """Removes `partial` again when the input turns out to be unusable, unless it was there before.

    A kill, a full disk or Ctrl-C leaves it for `--resume`.
    """
    before = partial.exists()
    try:
        yield
    except (SourceError, ShapeError):
        if not before:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except OutputError:
        if partial.is_dir() and not any(partial.iterdir()):
            partial.rmdir()  # refused before the first byte
        raise


def promote(partial: Path, out: Path) -> None:
    """The finished partial folder becomes `out`. Raises: OutputError"""
    with writable(out):
        (partial / STATISTICS).unlink(missing_ok=True)
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
            if file.is_file() and file.name != "config.json" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, out / file.name)

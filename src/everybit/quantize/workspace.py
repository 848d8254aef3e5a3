"""Where an overlay grows: `OUT.partial`, renamed to OUT when it is complete."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from everybit.errors import FormatError, OutputError, ShapeError, SourceError
from everybit.formats.files import open_inside

WORK = "work.part"  # a folder for statistics, solutions and tuned tables: no part of the overlay
SIDE_FILES = (  # what a tokenizer and `generate` read; everything else in a model folder is left behind
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
)


def free_output(out: Path, resume: bool, dry_run: bool = False, remedy: str = "continue it with --resume, or ") -> Path:
    """The partial folder of `out`, if nothing stands at `out` and no interrupted run waits unasked for.

    Raises: OutputError
    """
    if out.is_symlink():
        raise OutputError(f"{out} is a link: choose another output folder, or its target")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not empty: choose another output folder or remove it")
    partial = out.with_name(out.name + ".partial")
    if partial.exists() and not resume and not dry_run:
        raise OutputError(f"{partial} is left from an interrupted run: {remedy}remove it")
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
        shutil.rmtree(partial / WORK, ignore_errors=True)
        if out.is_dir():
            out.rmdir()  # an empty folder that the user made
        os.rename(partial, out)


def statistics_folder(folder: Path, origin: Mapping[str, Any]) -> Path:
    """The part of `folder` that belongs to this model and calibration; a file there says which. Raises: OutputError"""
    text = json.dumps(origin, sort_keys=True, indent=1)
    own = folder.expanduser() / hashlib.sha256(text.encode()).hexdigest()[:16]
    try:
        own.mkdir(parents=True, exist_ok=True)
        (own / "origin.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--statistics {folder}: {error.strerror or error}; choose another folder") from error
    return own


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
    """Tokenizer, generation config and licence, where they are files of the folder itself.

    Raises: SourceError for a link that leads out of the folder: publishing the overlay would publish its target
    """
    for name in SIDE_FILES:
        if not os.path.lexists(source / name):
            continue
        try:
            file = open_inside(source, name)
        except FormatError as error:
            raise SourceError(str(error)) from None
        with file, open(out / name, "wb") as copy:
            shutil.copyfileobj(file, copy)

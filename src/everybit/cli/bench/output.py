"""What a command leaves: a card on the terminal, and the document, the requests and the report in a folder."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from everybit.bench.card import card
from everybit.bench.measuring import Measured
from everybit.bench.records import Record, read_records
from everybit.bench.report import write_report
from everybit.bench.result import SERIES, read_result, write_result
from everybit.errors import OutputError, SourceError

INTERRUPTED = 130


@contextlib.contextmanager
def claimed_folder(args: argparse.Namespace) -> Iterator[None]:
    """Makes `args.folder` before the measurement, so that no other bench writes there; gone again if nothing came.

    Raises: OutputError, SourceError
    """
    if args.json:
        if args.output is not None:
            raise SourceError("--json writes nothing: leave -o out")
        yield
        return
    args.folder = _new_folder() if args.output is None else _folder(args.output)
    lock = args.folder / ".running"
    try:
        with lock.open("w") as file:
            _lock(file, args.folder)
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):
            args.folder.rmdir()  # only where it is empty


def _lock(file: IO[str], folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise OutputError(f"{folder}: another bench is writing there; give another folder with -o") from None


def check_writable(path: Path) -> None:
    """Raises: OutputError where a file or folder cannot be made."""
    there = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    special = there == path.absolute() and not there.is_file() and not there.is_dir()
    if special or not os.access(there, os.W_OK) or (there != path.absolute() and not there.is_dir()):
        raise OutputError(f"{path}: cannot be written")


def finish(
    args: argparse.Namespace, document: dict[str, Any], records: Sequence[Record] = (), interrupted: bool = False
) -> int:
    """Prints and writes; 0, or 130 after Ctrl-C. Raises: OutputError"""
    if interrupted and document["kind"] in SERIES:
        document[document["kind"]]["interrupted"] = True
    if args.json:
        print(json.dumps(document, allow_nan=False))
    else:
        print(card(document))  # first: a full disk must not take it
        write_result(args.folder, document, records)
        write_report(args.folder / "report.html", document)
        print(f"written: {args.folder}/result.json, report.html" + (", requests.csv, records.jsonl" if records else ""))
    if interrupted:
        print("everybit: interrupted; what was measured until then is above", file=sys.stderr)
    return INTERRUPTED if interrupted else 0


class Runs:
    """The runs of a series, each written as it ends to a folder run-01, run-02, ... of its own.

    After a kill the same command with the same -o takes them from there and goes on. Raises: OutputError, SourceError
    """

    def __init__(self, args: argparse.Namespace, command: Sequence[str]) -> None:
        self._folder: Path | None = None if args.json else args.folder
        self._command = list(command)
        self._count = 0

    def measured(self, measure: Callable[[], Measured]) -> Measured:
        """The next run: what an earlier try has left of it, or what `measure` gives."""
        self._count += 1
        if self._folder is None:
            return measure()
        place = self._folder / f"run-{self._count:02}"
        if (place / "result.json").exists():
            document = read_result(place)
            if document["command"] != self._command:
                raise OutputError(f"{place}: a run of another command; give another folder with -o")
            print(f"bench: run {self._count} was there: {place}", file=sys.stderr)
            return Measured(document, read_records(place / "records.jsonl")[1], interrupted=False)
        measured = measure()
        if measured.interrupted:  # kept, and made again by the same command
            place = place.with_name(place.name + "-cut")
        write_result(place, measured.document, measured.records)
        return measured


def _folder(given: Path) -> Path:
    """Results are not written over; a series that was interrupted may go on."""
    if given.exists() and not given.is_dir():
        raise OutputError(f"{given}: a file; give a folder with -o")
    if (given / "result.json").exists() and not _unfinished(given):
        raise OutputError(f"{given}: holds a result already; give another folder with -o")
    try:
        given.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{given}: cannot be written ({error.strerror})") from None
    return given


def _unfinished(folder: Path) -> bool:
    document = read_result(folder)
    return bool(document.get(document["kind"], {}).get("interrupted"))


def _new_folder() -> Path:
    stamp = datetime.now().strftime("bench-%Y%m%d-%H%M%S")
    for number in range(100):
        folder = Path(stamp + (f"-{number}" if number else ""))
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made ({error.strerror}); give a folder with -o") from None
        return folder
    raise OutputError(f"{stamp}: exists a hundred times over; give a folder with -o")

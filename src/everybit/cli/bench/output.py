"""What a command leaves: a card on the terminal, and the document, the requests and the report in a folder."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from everybit.bench.card import card
from everybit.bench.measuring import Measured
from everybit.bench.records import Record, read_records
from everybit.bench.report import write_report
from everybit.bench.result import read_result, write_result
from everybit.errors import OutputError, SourceError

INTERRUPTED = 130


def check_output(args: argparse.Namespace) -> None:
    """Before the measurement, not after it: whether its result has a place. Raises: OutputError, SourceError"""
    if args.json and args.output is not None:
        raise SourceError("--json writes nothing: leave -o out")
    if not args.json:
        args.folder = _folder(args.output)
        check_writable(args.folder)


def check_writable(path: Path) -> None:
    """Raises: OutputError where a file or folder cannot be made."""
    there = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    if not os.access(there, os.W_OK) or (there != path.absolute() and not there.is_dir()):
        raise OutputError(f"{path}: cannot be written")


def finish(
    args: argparse.Namespace, document: dict[str, Any], records: Sequence[Record] = (), interrupted: bool = False
) -> int:
    """Prints and writes; 0, or 130 after Ctrl-C. Raises: OutputError"""
    if args.json:
        print(json.dumps(document, allow_nan=False))
    else:
        write_result(args.folder, document, records)
        write_report(args.folder / "report.html", document)
        print(card(document))
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
        if not measured.interrupted:
            write_result(place, measured.document, measured.records)
        return measured


def _folder(given: Path | None) -> Path:
    """A new folder: results are not written over."""
    if given is not None:
        if given.exists() and not given.is_dir():
            raise OutputError(f"{given}: a file; give a folder with -o")
        if (given / "result.json").exists():
            raise OutputError(f"{given}: holds a result already; give another folder with -o")
        return given
    stamp = datetime.now().strftime("bench-%Y%m%d-%H%M%S")
    for number in range(100):
        folder = Path(stamp + (f"-{number}" if number else ""))
        if not folder.exists():
            return folder
    raise OutputError(f"{stamp}: exists a hundred times over; give a folder with -o")

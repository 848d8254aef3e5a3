"""What a command leaves: a card on the terminal, and the document, the requests and the report in a folder."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from everybit.bench.card import card
from everybit.bench.records import Record
from everybit.bench.report import write_report
from everybit.bench.result import write_result
from everybit.errors import OutputError, SourceError

INTERRUPTED = 130


def check_output(args: argparse.Namespace) -> None:
    """Before the measurement, not after it: whether its result has a place. Raises: OutputError, SourceError"""
    if args.json and args.output is not None:
        raise SourceError("--json writes nothing: leave -o out")
    if not args.json:
        check_writable(_folder(args.output))


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
        folder = _folder(args.output)
        write_result(folder, document, records)
        write_report(folder / "report.html", document)
        print(card(document))
        print(f"written: {folder}/result.json, report.html" + (", requests.csv, records.jsonl" if records else ""))
    if interrupted:
        print("everybit: interrupted; what was measured until then is above", file=sys.stderr)
    return INTERRUPTED if interrupted else 0


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

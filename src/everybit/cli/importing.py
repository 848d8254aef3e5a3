"""`everybit import FOLDER OUT`: a model that others quantized to an overlay, without quantizing it again."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from everybit.errors import SourceError

if TYPE_CHECKING:
    from everybit.integrations.imported import ImportReport


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "import",
        help="turn an Any-Precision or ternary checkpoint into an overlay",
        description="Turn a checkpoint of Any-Precision LLM, or one with ternary weights, into an overlay, losslessly; "
        "with --absmean, round one with float weights.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="Any-Precision, BitNet or other ternary model folder")
    parser.add_argument("out", metavar="OUT", help="folder to create")
    parser.add_argument(
        "--absmean",
        action="store_true",
        help="round float weights to -s, 0 and s as a model does that was trained so (BitNet, MatMul-free): "
        "the one way of import that changes values",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.formats import QUANT_METHOD
    from everybit.formats.files import read_inside
    from everybit.formats.jsontext import parse_object
    from everybit.integrations.anyprec import import_anyprec
    from everybit.integrations.ternary import import_ternary

    folder, out = Path(args.folder).expanduser(), Path(args.out).expanduser()
    if not os.path.isfile(folder / "config.json"):
        found = "has no config.json" if os.path.isdir(folder) else "is no folder"
        raise SourceError(
            f"{folder} {found if os.path.lexists(folder) else 'does not exist'}, expected the folder of an "
            "Any-Precision, BitNet or other ternary model: import takes no other"
        )
    config = parse_object(read_inside(folder, "config.json"), str(folder / "config.json"))
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        raise SourceError(f"{folder} is an overlay already: use it as it is")
    if "anyprec" not in config:
        report = import_ternary(folder, out, config, args.absmean)
    elif args.absmean:
        raise SourceError(f"--absmean has no effect on an Any-Precision checkpoint ({folder}): drop it")
    else:
        report = import_anyprec(folder, out, config)
    print(json.dumps(report.to_dict()) if args.json else describe(report))
    return 0


def describe(report: ImportReport) -> str:
    """What it was, the size table, and the next command."""
    lines = [f"{report.format} checkpoint, {report.weights} quantized weights", str(report.sizes), *report.notes]
    out, bits = shlex.quote(str(report.out)), max(report.sizes.rows)
    lines.append(f'next: everybit generate {out} --prompt "Once upon a time" --bits {bits}')
    return "\n".join(lines)

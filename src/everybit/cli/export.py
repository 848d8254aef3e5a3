"""`everybit export OVERLAY OUT --to FORMAT`: an overlay at one precision in another program's format."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everybit.cli.options import parse_bits, plan_file
from everybit.errors import PrecisionError, SourceError

if TYPE_CHECKING:
    from everybit.integrations.dense_export import ExportReport

FORMATS = ("safetensors", "compressed-tensors", "gguf")
# Which formats an option has an effect on.
_OF = {
    "dtype": FORMATS[:2],
    "group_size": FORMATS[1:2],
    "type": FORMATS[2:],
    "source": FORMATS[2:],
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write an overlay in another format",
        description="Write one precision of an overlay as a float model, as compressed-tensors or as GGUF.",
    )
    parser.add_argument("overlay", metavar="OVERLAY", help="folder made by everybit quantize")
    parser.add_argument("out", metavar="OUT", help="folder to create; a file where --to is gguf")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format to write")
    parser.add_argument(
        "--bits", metavar="N|PLAN.json", help="precision, or a plan of everybit allocate (default: the highest it has)"
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "f16", "f32"),
        help="of floats: weights (safetensors), scales (compressed-tensors), all else (default: as the model had them)",
    )
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="weights that share a scale, -1: a whole row (default 128)"
    )
    parser.add_argument("--type", metavar="TYPE", help="of the GGUF file, such as Q8_0 (default Q4_K_M)")
    parser.add_argument("--source", metavar="FOLDER", help="float model to take the values of a GGUF file from")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    given = {name: getattr(args, name) for name in _OF if getattr(args, name) is not None}
    for name in given:
        if args.to not in _OF[name]:
            option = "--" + name.replace("_", "-")
            raise SourceError(
                f"{option} has no effect with --to {args.to}, only with {' and '.join(_OF[name])}: drop it"
            )
    overlay, out = Path(args.overlay).expanduser(), Path(args.out).expanduser()
    bits = _precision(args.bits)
    if args.to == "gguf":
        document, text = _gguf(overlay, out, bits, given, progress=not args.json)
    else:
        report = _folder(args.to, overlay, out, bits, given)
        document, text = report.to_dict(), describe(report)
    print(json.dumps({"to": args.to, **document}) if args.json else text)
    return 0


def _precision(text: str | None) -> int | Path | None:
    """Raises: PrecisionError"""
    if text is None:
        return None
    if (path := plan_file(text)) is not None:
        return path
    bits = parse_bits(text)
    if len(bits) != 1:
        raise PrecisionError(f"--bits {text}: expected one precision")
    return bits[0]


def _folder(to: str, overlay: Path, out: Path, bits: int | Path | None, given: dict[str, Any]) -> ExportReport:
    if to == "safetensors":
        from everybit.integrations.dense_export import export_safetensors

        return export_safetensors(overlay, out, bits=bits, **given)
    from everybit.integrations.compressed_tensors import export_compressed_tensors

    return export_compressed_tensors(overlay, out, bits=bits, **given)


def _gguf(
    overlay: Path, out: Path, bits: int | Path | None, given: dict[str, Any], progress: bool
) -> tuple[dict[str, Any], str]:
    if isinstance(bits, Path):
        raise PrecisionError(f"--bits {bits}: --to gguf takes one precision, its types have a mix of their own")
    from everybit.formats import Overlay
    from everybit.integrations.gguf import export_gguf

    with Overlay.open(overlay):  # refuses anything else; export_gguf takes float models as well
        pass
    if "source" in given:
        given = {**given, "source": Path(given["source"]).expanduser()}
    report = export_gguf(overlay, out, bits=bits, progress=progress, **given)
    types = ", ".join(f"{count} {kind}" for kind, count in report.tensors.items())
    document = {"out": str(out), "bytes": report.bytes, "bpw": report.bpw, "tensors": dict(report.tensors)}
    lines = [f"{out}: {report.bytes:,} bytes, {report.bpw:.2f} bits per weight ({types})", *report.notes]
    return document | {"notes": list(report.notes)}, "\n".join(lines)


def describe(report: ExportReport) -> str:
    """Where it is, its size, and what each weight lost."""
    lines = [f"{report.out}: {report.precision}, floats in {report.dtype}, {report.bytes:,} bytes of tensors"]
    if report.losses:
        lines += [
            "",
            "error of each weight, relative to its highest precision in the overlay (all values count the same, not as",
            "calibration weighed them: a smaller error is no proof of a better model):",
            f"{'weight':<48} {'bits':>4} {'grid':>6} {'overlay':>9} {'written':>9}",
        ]
        lines += [f"{x.name:<48} {x.bits:>4} {x.how:>6} {x.before:>9.2e} {x.after:>9.2e}" for x in report.losses]
        exact = sum(x.how == "exact" for x in report.losses)
        lines.append(f"{exact} of {len(report.losses)} weights keep the overlay's grid, the others were fitted anew")
    return "\n".join(lines)

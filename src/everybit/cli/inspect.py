"""`everybit inspect OVERLAY`: layers, sizes, planes and their entropy, provenance; verifies every checksum."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everybit.formats import Overlay, WeightSpec


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show what an overlay holds",
        description="Show layers, bits per weight, planes with their entropy, and provenance; verifies every checksum.",
    )
    parser.add_argument("overlay", metavar="OVERLAY", help="folder made by everybit quantize")
    parser.add_argument("--quick", action="store_true", help="headers only: no entropy, no checksums")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.formats import Overlay

    with Overlay.open(args.overlay) as overlay:
        document = describe(overlay, args.quick)
        if not args.quick:
            overlay.verify_all()
    print(_json(document) if args.json else table(document))
    return 0


def describe(overlay: Overlay, quick: bool) -> dict[str, Any]:
    """Everything that is printed, as one JSON object."""
    return {
        "overlay": str(overlay.folder),
        "architecture": overlay.config.get("architectures"),
        "format_version": overlay.quantization.format_version,
        "bits": list(overlay.bits),
        "codebook": overlay.quantization.codebook,
        "provenance": overlay.quantization.provenance,
        "sizes": overlay.sizes().to_dict(),
        "layers": [_layer(overlay, spec, quick) for spec in overlay.weights.values()],
    }


def _layer(overlay: Overlay, spec: WeightSpec, quick: bool) -> dict[str, Any]:
    layer: dict[str, Any] = {
        "name": spec.name,
        "shape": list(spec.shape),
        "transposed": spec.transposed,
        "bits": list(spec.bits),
        "codebook": spec.codebook,
        "planes": spec.planes,
    }
    if not quick:
        ones = [_ones(plane) / spec.parameters for plane in overlay.planes(spec.name, spec.planes)]
        layer["plane_entropy"] = [_entropy(share) for share in ones]
    return layer


def _ones(plane: Any) -> int:
    import numpy as np

    counts = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.int64)
    return int(np.bincount(plane.reshape(-1), minlength=256) @ counts)


def _entropy(share: float) -> float:
    """Bits of information per stored bit, from the share of ones alone (1.0: incompressible by its frequencies)."""
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)


def table(document: dict[str, Any]) -> str:
    """The document for people."""
    made = document["provenance"]  # free-form: whoever wrote the file may have put anything there
    lines = [
        f"{document['overlay']}: {_text(document['architecture'])}, format {document['format_version']}",
        f"made by everybit {_text(made.get('everybit_version'))}, solver {_text(made.get('solver'))}",
        f"calibration {_text(_pick(made.get('calibration'), 'file', 'kind'))}, "
        f"from {_text(_pick(made.get('source'), 'name'))}",
        "",
        f"{'layer':<48} {'shape':>18} {'bits':>8} {'codebook':>9}  entropy of planes 0..",
    ]
    for layer in document["layers"]:
        bits = layer["bits"]
        span = f"{bits[0]}-{bits[-1]}" if len(bits) > 2 else ",".join(map(str, bits))
        entropy = " ".join(f"{e:.2f}" for e in layer.get("plane_entropy", []))
        shape = " x ".join(map(str, layer["shape"]))
        lines.append(f"{_text(layer['name']):<48} {shape:>18} {span:>8} {layer['codebook']:>9}  {entropy}")
    sizes = document["sizes"]
    lines += ["", "bits    bpw        bytes"]
    lines += [f"{row['bits']:>4} {row['bpw']:>6.2f} {row['bytes']:>12,}" for row in sizes["rows"]]
    lines.append(
        f"{sizes['quantized_parameters']:,} quantized parameters, {sizes['stored_bytes']:,} bytes on disk "
        f"({sizes['stored_bpw']:.2f} bpw with every plane and codebook)"
    )
    return "\n".join(lines)


def _pick(value: Any, *keys: str) -> Any:
    """The first of `keys` that `value` has, if it is an object as our writer makes it; else `value` itself."""
    return next((value[key] for key in keys if key in value), value) if isinstance(value, dict) else value


def _json(document: dict[str, Any]) -> str:
    """Valid JSON: NaN and Infinity, which Python reads from a file that is not, become null."""
    return json.dumps(json.loads(json.dumps(document), parse_constant=lambda _: None))


def _text(value: Any) -> str:
    """A value of the file on one line, without anything a terminal would act on."""
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)[:200]

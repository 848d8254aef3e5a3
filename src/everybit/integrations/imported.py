"""What the importers share: from the tensors of another format to an overlay folder, one weight at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from everybit import __version__
from everybit.formats import OverlayWriter, QuantizationConfig, TensorSpec, WeightSpec
from everybit.formats.sizes import SizeReport
from everybit.quantize.card import model_card
from everybit.quantize.workspace import copy_side_files, free_output, new_folder, promote, writable


@dataclass(frozen=True)
class ImportReport:
    """What was written: `format` that was recognised, sizes, how many weights, and what a reader should know."""

    out: Path
    format: str
    sizes: SizeReport
    weights: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "format": self.format,
            "weights": self.weights,
            "notes": list(self.notes),
            **self.sizes.to_dict(),
        }


def write_overlay(
    out: Path,
    source: Path,
    kind: str,
    config: Mapping[str, Any],
    weights: Mapping[str, WeightSpec],
    plain: Mapping[str, TensorSpec],
    groups: Iterable[tuple[str, Mapping[str, NDArray[Any]]]],
    details: Mapping[str, Any],
    notes: tuple[str, ...] = (),
) -> ImportReport:
    """Writes the overlay and its model card; `groups` brings the tensors of each weight, and the plain ones.

    `config` is the model's own, without what the other format added; `details` go into the provenance.
    Raises: OutputError, and whatever `groups` raises; nothing appears under `out` then
    """
    out = Path(os.path.abspath(out.expanduser()))
    partial = free_output(out, resume=False, remedy="")
    first = next(iter(weights.values()))
    provenance = {
        "everybit_version": __version__,
        "solver": f"import of {kind}",
        "calibration": {"kind": "not stated"},
        "source": {"name": source.resolve().name},
        **details,
    }
    quantization = QuantizationConfig(first.bits, first.codebook, dict(weights), provenance)
    document = {**config, "quantization_config": quantization.to_dict()}
    layout = dict(plain)
    for spec in weights.values():
        layout |= spec.tensors()
    sizes = SizeReport.of(weights.values(), first.bits, layout)
    with new_folder(partial), OverlayWriter(partial, layout, document) as writer:
        for key, arrays in groups:
            writer.write_group(key, arrays)
        with writable(partial):
            copy_side_files(source, partial)
            (partial / "README.md").write_text(model_card(document, sizes), encoding="utf-8")
        writer.finish()
    promote(partial, out)
    return ImportReport(out, kind, sizes, len(weights), notes)

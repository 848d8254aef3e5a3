"""What the importers share: from the tensors of another format to an overlay folder, one weight at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from everybit import __version__
from everybit.errors import SourceError
from everybit.formats import OverlayWriter, QuantizationConfig, TensorSpec, WeightSpec
from everybit.formats.sizes import SizeReport
from everybit.formats.tensors import show
from everybit.integrations.model_folder import new_model
from everybit.quantize.card import model_card
from everybit.quantize.workspace import copy_side_files


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
    Raises: OutputError, SourceError (a plain tensor has the name of a plane or table), and whatever `groups` raises;
    nothing appears under `out` then
    """
    out = Path(os.path.abspath(out.expanduser()))
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
        own = spec.tensors()
        if taken := sorted(set(own) & set(plain)):
            raise SourceError(
                f"{source} holds a tensor {show(taken[0])}, which is the name of a plane or table of "
                f"{show(spec.name)} in an overlay: rename it, or leave it out"
            )
        layout |= own
    sizes = SizeReport.of(weights.values(), first.bits, layout)
    with new_model(out, source) as partial, OverlayWriter(partial, layout, document) as writer:
        for key, arrays in groups:
            writer.write_group(key, arrays)
        copy_side_files(source, partial)
        (partial / "README.md").write_text(model_card(document, sizes), encoding="utf-8")
        writer.finish()
    return ImportReport(out, kind, sizes, len(weights), notes)

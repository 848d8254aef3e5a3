"""The `quantization_config` of an overlay: which weights are quantized, at which precisions, with which codebook.

Everything a user might have typed or a file might claim is checked here, and unknown keys are refused by name:
a misspelled key that is silently ignored is a wrong model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from everybit.errors import EverybitError, FormatError
from everybit.formats.codebooks import CODEBOOKS
from everybit.formats.tensors import show
from everybit.formats.weights import WeightSpec, check_bits

QUANT_METHOD = "everybit"
FORMAT_VERSION = 3  # the newest this code reads; an overlay says the oldest that has all it uses
KEYS = ("quant_method", "format_version", "bits", "codebook", "weights", "provenance")
WEIGHT_KEYS = ("shape", "transposed", "bits", "codebook")


@dataclass(frozen=True)
class QuantizationConfig:
    """The parsed and checked `quantization_config`. `bits` and `codebook` are the defaults of `weights`.

    `format_version` is raised to the first that has every codebook kind in use.
    """

    bits: tuple[int, ...]
    codebook: str
    weights: dict[str, WeightSpec]
    provenance: dict[str, Any] = field(default_factory=dict)
    format_version: int = 1

    def __post_init__(self) -> None:
        kinds = {self.codebook, *(spec.codebook for spec in self.weights.values())}
        needed = max(CODEBOOKS[kind].since for kind in kinds)
        object.__setattr__(self, "format_version", max(self.format_version, needed))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; a weight lists only what differs from the defaults."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "bits": list(self.bits),
            "codebook": self.codebook,
            "weights": {name: self._entry(spec) for name, spec in self.weights.items()},
            "provenance": self.provenance,
        }

    def _entry(self, spec: WeightSpec) -> dict[str, Any]:
        entry: dict[str, Any] = {"shape": list(spec.shape)}
        if spec.transposed:
            entry["transposed"] = True
        if spec.bits != self.bits:
            entry["bits"] = list(spec.bits)
        if spec.codebook != self.codebook:
            entry["codebook"] = spec.codebook
        return entry

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], where: str = "quantization_config") -> QuantizationConfig:
        """Checks and parses the JSON form; `where` names it in errors.

        Raises: FormatError
        """
        if not isinstance(found, Mapping):
            raise FormatError(f"{where}: {show(found)} arrived, expected an object with the keys {', '.join(KEYS)}")
        _check_version(found, where)
        _refuse_unknown(found, KEYS, where)
        for key in KEYS[:-1]:
            if key not in found:
                raise FormatError(f"{where}: the key {key!r} is missing: quantize again or download it again")
        codebook, weights, provenance = found["codebook"], found["weights"], found.get("provenance", {})
        if not isinstance(codebook, str) or codebook not in CODEBOOKS:
            raise FormatError(
                f"{where}: codebook {show(codebook)} is unknown, expected one of {', '.join(CODEBOOKS)}: "
                "upgrade everybit or fix the name"
            )
        if not isinstance(weights, Mapping) or not weights:
            raise FormatError(f"{where}: weights {show(weights)} arrived, expected at least one name with its shape")
        if not isinstance(provenance, Mapping):
            raise FormatError(f"{where}: provenance {show(provenance)} arrived, expected an object")
        try:
            bits = check_bits(found["bits"])
        except EverybitError as error:
            raise FormatError(f"{where}: {error}") from None
        specs = {name: _parse_weight(name, entry, bits, codebook, where) for name, entry in weights.items()}
        _check_names(specs, where)
        stated = found["format_version"]
        parsed = cls(bits, codebook, specs, dict(provenance), stated)
        if parsed.format_version > stated:
            raise FormatError(
                f"{where}: format_version {stated} arrived beside a codebook kind that came with format_version "
                f"{parsed.format_version}: quantize again or download it again"
            )
        return parsed


def _check_version(found: Mapping[str, Any], where: str) -> None:
    method, version = found.get("quant_method"), found.get("format_version")
    if method != QUANT_METHOD:
        raise FormatError(
            f"{where}: quant_method {show(method)} arrived, expected {QUANT_METHOD!r}: "
            "run everybit quantize on the model before it was quantized"
        )
    if type(version) is not int or version < 1:
        raise FormatError(f"{where}: format_version {show(version)} arrived, expected an integer from 1 up")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{where}: format_version {show(version)} arrived, this everybit reads up to {FORMAT_VERSION}: "
            "this file needs a newer everybit, upgrade it with pip install --upgrade everybit"
        )


def _refuse_unknown(found: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = [key for key in found if key not in known]
    if unknown:
        raise FormatError(
            f"{where}: unknown key {show(unknown[0])}, expected only {', '.join(known)}: upgrade everybit or remove it"
        )


def _parse_weight(name: str, entry: Any, bits: tuple[int, ...], codebook: str, where: str) -> WeightSpec:
    here = f"{where}: weights[{show(name)}]"
    if not isinstance(entry, Mapping):
        raise FormatError(f"{here}: {show(entry)} arrived, expected an object with shape")
    _refuse_unknown(entry, WEIGHT_KEYS, here)
    shape, transposed = entry.get("shape"), entry.get("transposed", False)
    if not isinstance(shape, (list, tuple)):
        raise FormatError(f"{here}: shape {show(shape)} arrived, expected [N, K] or [E, N, K]")
    if not isinstance(transposed, bool):
        raise FormatError(f"{here}: transposed {show(transposed)} arrived, expected true or false")
    own_book = entry.get("codebook", codebook)
    if not isinstance(own_book, str):
        raise FormatError(f"{here}: codebook {show(own_book)} arrived, expected one of {', '.join(CODEBOOKS)}")
    try:
        own_bits = check_bits(entry.get("bits", bits))
        return WeightSpec(name, tuple(shape), own_bits, own_book, transposed)
    except EverybitError as error:
        raise FormatError(f"{here}: {error}") from None


def _check_names(specs: dict[str, WeightSpec], where: str) -> None:
    """Refuses weights whose tensors share a name (`a` with `a_plane0`): one would be read as the other."""
    owner: dict[str, str] = {name: name for name in specs}
    for name, spec in specs.items():
        for tensor in spec.tensors():
            if tensor in owner:
                raise FormatError(
                    f"{where}: weights {show(owner[tensor])} and {show(name)} both claim the tensor {show(tensor)}"
                )
            owner[tensor] = name

"""Bit plans: a precision for each weight of an overlay, where a number of bits is one for all. A file names them; the
weights stay where they are.

    plan = Plan.open("overlay-3.4bpw.plan.json", overlay)
    logits = runtime.prefill(0, tokens, bits=plan)

`everybit allocate` (everybit.allocate) makes plans.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from everybit.errors import FormatError, OutputError, PrecisionError
from everybit.formats import Overlay, WeightSpec
from everybit.formats.files import read_inside
from everybit.formats.inventory import CHECKSUM_PREFIX
from everybit.formats.jsontext import parse_object
from everybit.formats.tensors import show
from everybit.formats.weights import require_bits

PLAN_VERSION = 1
MARK = "everybit_plan"  # the key that says what the file is, and its version
REQUIRED = (MARK, "overlay", "bits", "bpw", "bytes", "budget")
OPTIONAL = ("predicted_kl", "provenance")
_AGAIN = "run everybit allocate again"


@dataclass(frozen=True, eq=False)  # compared by identity: a step looks plans up, and hashing hundreds of names is slow
class Plan:
    """Which of its own precisions each quantized weight is read at. Make one with `Plan.of` or `Plan.open`.

    `overlay` is the `identity` of the one it was made for, `bits` by weight name, `bpw` and `bytes` as those of
    `SizeReport`; `budget` what was asked for, `predicted_kl` in nats per token, `provenance` how it was made.
    """

    overlay: str
    bits: Mapping[str, int]
    bpw: float
    bytes: int
    budget: str = ""
    predicted_kl: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        overlay: Overlay,
        bits: Mapping[str, int],
        *,
        budget: str = "",
        predicted_kl: float | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Plan:
        """A plan for an opened overlay; every quantized weight must be named.

        Raises: PrecisionError (a precision that a weight does not have), FormatError (a weight unknown or left out)
        """
        for what, names in (
            ("is not in it", set(bits) - set(overlay.weights)),
            ("is left out", set(overlay.weights) - set(bits)),
        ):
            if names:
                raise FormatError(
                    f"weight {show(min(names))} {what} ({len(names)} such): the plan must name the "
                    f"{len(overlay.weights)} quantized weights of {overlay.folder}: {_AGAIN}"
                )
        for name, own in bits.items():
            require_bits(own, overlay.weights[name].bits, f"weight {show(name)}")
        read = sum(read_bytes(overlay, overlay.weights[name], own) for name, own in bits.items())
        sizes = overlay.sizes()
        return cls(
            identity(overlay),
            MappingProxyType(dict(bits)),
            read * 8 / sizes.parameters,
            read + sizes.plain_bytes,
            budget,
            predicted_kl,
            provenance or {},
        )

    @classmethod
    def open(cls, path: str | os.PathLike[str], overlay: Overlay | None) -> Plan:
        """Reads a plan and checks it against the overlay it is to be used with (None: float weights, an error).

        Raises: FormatError, PrecisionError
        """
        path = Path(path)
        found = read_plan_json(path)
        if overlay is None:
            raise PrecisionError(
                f"{path}: a plan was asked of float weights, which have one precision: pass an overlay"
            )
        if found["overlay"] != (own := identity(overlay)):
            raise FormatError(
                f"{path} was made for the overlay {found['overlay']}, {overlay.folder} is {own}: "
                "use the plan with its own overlay, or run everybit allocate on this one"
            )
        try:
            plan = cls.of(
                overlay,
                found["bits"],
                budget=found["budget"],
                predicted_kl=found.get("predicted_kl"),
                provenance=found.get("provenance"),
            )
        except (FormatError, PrecisionError) as error:
            raise type(error)(f"{path}: {error}") from None
        if found["bytes"] != plan.bytes or not math.isclose(found["bpw"], plan.bpw, rel_tol=1e-9):
            raise FormatError(
                f"{path} states {found['bytes']} bytes and {found['bpw']} bpw, its precisions read {plan.bytes} and "
                f"{plan.bpw}: the file was edited, {_AGAIN}"
            )
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan under a temporary name and renames it; replaces another plan, nothing else.

        Raises: OutputError
        """
        path = Path(path)
        if os.path.lexists(path) and not is_plan(path):
            raise OutputError(f"{path} exists and is not a plan: choose another name with --out, or remove it")
        document: dict[str, Any] = {MARK: PLAN_VERSION, "overlay": self.overlay, "bits": dict(self.bits)}
        document |= {"bpw": self.bpw, "bytes": self.bytes, "budget": self.budget}
        if self.predicted_kl is not None:
            document["predicted_kl"] = self.predicted_kl
        write_json(path, {**document, "provenance": dict(self.provenance)})

    def __str__(self) -> str:
        return f"a plan of {self.bpw:.2f} bits per weight"


Precision: TypeAlias = int | Plan  # what a model can be run at


def identity(overlay: Overlay) -> str:
    """A SHA-256 that tells overlays apart, in hex: of the `quantization_config` without its provenance and of the
    checksum of every tensor as the shard headers state it. Reads no data."""
    quantization = {key: value for key, value in overlay.quantization.to_dict().items() if key != "provenance"}
    checksums = {
        name: text
        for shard in overlay._shards  # formats has no public view of them yet
        for name, text in shard.metadata.items()
        if name.startswith(CHECKSUM_PREFIX)
    }
    text = json.dumps([quantization, checksums], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def own_bits(spec: WeightSpec, precision: Precision) -> int:
    """Which of its own precisions a weight is read at.

    Raises: FormatError (a plan that does not name it)
    """
    if not isinstance(precision, Plan):
        return spec.served_bits(precision)
    if spec.name not in precision.bits:
        raise FormatError(f"the plan does not name the weight {show(spec.name)}: {_AGAIN}")
    return precision.bits[spec.name]


def require_precision(precision: Precision, overlay: Overlay) -> None:
    """Refuses bits that the overlay does not serve, and plans made for another overlay.

    Raises: PrecisionError, FormatError
    """
    if not isinstance(precision, Plan):
        require_bits(precision, overlay.bits, "the overlay")
    elif precision.overlay != (own := identity(overlay)):
        raise FormatError(
            f"a plan for the overlay {precision.overlay} arrived, {overlay.folder} is {own}: "
            "use the plan with its own overlay, or run everybit allocate on this one"
        )


def read_bytes(overlay: Overlay, spec: WeightSpec, own: int) -> int:
    """Bytes that a weight reads at one of its own precisions: planes and its codebook."""
    codebook = sum(overlay.spec_of(name).nbytes for name in spec.codebook_names(own).values())
    return own * spec.plane_bytes + codebook


def is_plan(path: Path) -> bool:
    """Whether a file is a plan, of any overlay and version."""
    try:
        return path.is_file() and MARK in parse_object(read_inside(path.parent, path.name), str(path))
    except FormatError:
        return False


def read_plan_json(path: Path) -> dict[str, Any]:
    """The keys of a plan file, each of its type; nothing is compared with an overlay.

    Raises: FormatError
    """
    if not path.is_file():
        raise FormatError(f"{path}: no such file, expected a plan that everybit allocate wrote")
    found = parse_object(read_inside(path.parent, path.name), str(path), _AGAIN)
    if MARK not in found:
        raise FormatError(f"{path} has no key {MARK!r}, expected a plan that everybit allocate wrote")
    version = found[MARK]
    if type(version) is not int or version < 1:
        raise FormatError(f"{path}: {MARK} {show(version)} arrived, expected an integer from 1 up")
    if version > PLAN_VERSION:
        raise FormatError(
            f"{path}: {MARK} {show(version)} arrived, this everybit reads up to {PLAN_VERSION}: "
            "upgrade it with pip install --upgrade everybit"
        )
    if unknown := [key for key in found if key not in (*REQUIRED, *OPTIONAL)]:
        raise FormatError(
            f"{path}: unknown key {show(unknown[0])}, expected only {', '.join((*REQUIRED, *OPTIONAL))}: "
            "upgrade everybit or remove it"
        )
    if missing := [key for key in REQUIRED if key not in found]:
        raise FormatError(f"{path}: the key {missing[0]!r} is missing: {_AGAIN}")
    bits = found["bits"]
    checks = {
        "overlay": (_is_sha256(found["overlay"]), "64 lower-case hex digits"),
        "bits": (
            isinstance(bits, dict) and all(type(own) is int for own in bits.values()),
            "an object of weight names and whole numbers",
        ),
        "bpw": (_is_number(found["bpw"]), "a number above 0"),
        "bytes": (type(found["bytes"]) is int and found["bytes"] > 0, "a whole number above 0"),
        "budget": (isinstance(found["budget"], str), "text"),
        "predicted_kl": (_is_number(found.get("predicted_kl", 1)) or found.get("predicted_kl") == 0, "a number from 0"),
        "provenance": (isinstance(found.get("provenance", {}), dict), "an object"),
    }
    for key, (right, expected) in checks.items():
        if not right:
            raise FormatError(f"{path}: {key} {show(found[key])} arrived, expected {expected}: {_AGAIN}")
    return found


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all.

    Raises: OutputError
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({error.strerror or error}): choose another place") from None
    finally:
        partial.unlink(missing_ok=True)


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 1e300  # type: ignore[operator]

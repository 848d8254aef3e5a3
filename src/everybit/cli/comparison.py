"""The work of `everybit compare`: calibrate once, write a model per method and bits, score them beside the float."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from everybit import evaluate
from everybit.errors import OutputError, SourceError
from everybit.evaluate.report import FloatQuality, Report, Row
from everybit.formats import Overlay
from everybit.formats.sizes import Size
from everybit.quantize import calibrate
from everybit.quantize.build import quantize
from everybit.quantize.discover import Target, discover
from everybit.quantize.peers import Method, UnfitError
from everybit.quantize.peers.collect import Collected, collect
from everybit.quantize.peers.model import model_bytes, write_model
from everybit.quantize.source import Source, resolve
from everybit.tokenizer import Tokenizer

F32 = NDArray[np.float32]
BATCH = 12  # models open at once; the float model is run once for each batch
BATCH_BYTES = 8 << 30  # of written models that lie on the disk at once
WARN_BYTES = 4 << 30
ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
OWN = "everybit"


@dataclass(frozen=True)
class Entry:
    """Whose a row is. `seconds` to quantize (one seed), None for an overlay that was there already."""

    method: str
    seeds: int
    seconds: float | None


@dataclass
class Comparison:
    """All rows, what they were measured on, and what is missing."""

    model: str
    calibration: Mapping[str, Any]
    report: Report  # of the last batch: what all rows have in common
    rows: list[tuple[Entry, Row]]
    left_out: list[dict[str, Any]]
    notes: list[str]

    @property
    def reference(self) -> FloatQuality:
        assert self.report.reference is not None  # every batch is scored beside the float model
        return self.report.reference

    def sorted(self) -> list[tuple[Entry, Row]]:
        """By bits, then by KL."""
        return sorted(self.rows, key=lambda found: (found[1].bits, found[1].kl_mean))

    def document(self) -> dict[str, Any]:
        """One JSON document; rows as `Report.document` has them, with method, seeds and seconds."""
        ordered = self.sorted()
        report = dataclasses.replace(self.report, rows=[row for _, row in ordered]).document()
        rows = [{**vars(entry), **row} for (entry, _), row in zip(ordered, report["rows"], strict=True)]
        return {
            "model": self.model,
            "tokens": self.report.tokens,
            "calibration": dict(self.calibration),
            **report,
            "rows": rows,
            "left_out": self.left_out,
            "notes": self.notes,
        }


@dataclass
class Batch:
    """Models that are open at once, behind one `set_precision`, and the rows that they make."""

    bar: Any
    tokens: int
    models: list[tuple[evaluate.EngineModel, int, Size]] = field(default_factory=list)  # bits 0: float weights
    entries: list[tuple[Entry, int, list[int]]] = field(default_factory=list)  # bits, places in `models`
    folders: list[Path] = field(default_factory=list)
    current: int = 0

    @property
    def vocabulary(self) -> int:
        return self.models[0][0].vocabulary

    def set_precision(self, place: int) -> None:
        self.current = place
        model, bits, _ = self.models[place]
        if bits:
            model.set_precision(bits)

    def score(self, windows: Sequence[Sequence[int]]) -> Iterator[F32]:
        for logits in self.models[self.current][0].score(windows):
            yield logits
            self.bar.update(len(logits) / self.tokens)

    def evaluate(self, windows: evaluate.Windows, reference: evaluate.EngineModel, size: Size) -> Report:
        """Mutates: closes the models and removes their folders."""
        try:
            return evaluate.evaluate(
                self,
                range(len(self.models)),
                windows,
                reference,
                set_precision=self.set_precision,
                size=lambda place: self.models[place][2],
                reference_size=size,
                progress=False,
                threads=reference.runtime.threads,
            )
        finally:
            for model, _, _ in self.models:
                model.close()
            for folder in self.folders:
                shutil.rmtree(folder, ignore_errors=True)


class Comparer:
    """One run of the command."""

    def __init__(self, args: argparse.Namespace, bits: Sequence[int], scratch: Path) -> None:
        self.args, self.bits, self.scratch = args, bits, scratch
        self.source = Source(resolve(args.model))
        self.targets, _ = discover(self.source.model, [], [])
        documents = evaluate.read_documents(args.text)
        self.record, calibration = calibrate.describe(
            args.calibration, args.calibration_sequences, args.calibration_length, args.seed
        )
        if calibration is None:
            raise SourceError(f"--calibration {args.calibration}: expected a text file, the same for every method")
        self.calibration = calibration
        self.context = evaluate.context_length(self.source.config, args.context)
        tokenizer = Tokenizer.open(self.source.folder)
        self.windows = evaluate.windows(tokenizer, documents, self.context, max_tokens=args.max_tokens)
        self.size = _float_size(self.source, self.targets)
        self.rows: list[tuple[Entry, Row]] = []
        self.left_out: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.report: Report | None = None

    def open(self, folder: Path) -> evaluate.EngineModel:
        return evaluate.EngineModel.open(folder, self.context, threads=self.args.threads, mode=self.args.mode)

    def run(self, methods: Sequence[Method]) -> Comparison:
        """Mutates: the scratch folder. Raises: as quantize, evaluate and the engine; SourceError without a row"""
        jobs = list(self._jobs(methods))
        overlays = [Path(path).expanduser() for path in self.args.overlay]
        self._check_room(jobs)
        with ExitStack() as opened:
            reference = opened.enter_context(self.open(self.source.folder))
            if reference.bits:
                raise SourceError(f"{self.args.model} is an overlay, expected the float model that was quantized")
            for path in overlays:
                self._check_overlay(path)
            collected = self._collect(jobs)
            own = not overlays
            steps = 2 * sum(self._seeds(method) for method, _ in jobs) + (len(overlays) + own) * (len(self.bits) + own)
            self.bar = opened.enter_context(
                tqdm(
                    total=steps + 1e-6,  # the fractions add up to a little more or less
                    bar_format="{desc}{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}",
                    mininterval=0.5 if sys.stderr.isatty() else 30,  # a log gets a line now and then
                    miniters=0,  # steps are fractions
                )
            )
            batch = Batch(self.bar, self.windows.tokens)
            for found in [self._own_overlay()] if own else [(path, path.name, None) for path in overlays]:
                self._add_overlay(batch, *found)
            for method, bits in jobs:
                size = self._seeds(method)
                over = (len(batch.folders) + size) * model_bytes(self.source) > BATCH_BYTES
                if batch.models and (over or len(batch.models) + size > BATCH):
                    batch = self._flush(batch, reference)
                self._add(batch, method, bits, collected)
            self._flush(batch, reference)
        if self.report is None:
            raise SourceError("nothing is left to compare: " + "; ".join(entry["why"] for entry in self.left_out))
        return Comparison(
            Path(self.args.model).name,
            self.record.provenance(),
            self.report,
            self.rows,
            self.left_out,
            self._all_notes(methods),
        )

    def _seeds(self, method: Method) -> int:
        return int(self.args.seeds) if method.seeded else 1

    def _jobs(self, methods: Sequence[Method]) -> Iterator[tuple[Method, int]]:
        """What there is to do; methods that are not installed are left out at once."""
        for method in methods:
            try:
                method.load()
            except UnfitError as error:
                self.left_out.append({"method": method.name, "bits": None, "why": str(error)})
                continue
            yield from ((method, bits) for bits in method.bits if bits in self.bits)

    def _check_room(self, jobs: Sequence[tuple[Method, int]]) -> None:
        own = model_bytes(self.source)
        most = min(sum(self._seeds(method) for method, _ in jobs), max(BATCH_BYTES // own, self.args.seeds, 1)) * own
        if most > (free := shutil.disk_usage(self.scratch).free):
            raise OutputError(
                f"{self.scratch.parent}: {most:,} bytes are needed for models in float32, {free:,} are free: "
                "set TMPDIR to a place with more, or give fewer methods, bits or seeds"
            )
        if most > WARN_BYTES:
            print(f"everybit: up to {most / 1e9:.1f} GB of models in {self.scratch.parent} at a time", file=sys.stderr)

    def _collect(self, jobs: Sequence[tuple[Method, int]]) -> Collected:
        began = time.perf_counter()
        needs = {need for method, _ in jobs for need in method.needs}
        shown = sys.stderr.isatty()
        found = collect(self.source, self.targets, self.record, self.calibration, needs, self.scratch, shown)
        if needs:
            self.notes.append(f"calibration, once for all methods: {time.perf_counter() - began:.0f} s")
        return found

    def _add(self, batch: Batch, method: Method, bits: int, collected: Collected) -> None:
        """Write the models of a method at one precision, all seeds, and open them; or leave the row out."""
        total = sum(prod(target.shape) for target in self.targets)
        places: list[int] = []
        folders: list[Path] = []
        seconds: list[float] = []
        before = self.bar.n
        for i in range(self._seeds(method)):
            folder = self.scratch / f"{len(self.rows)}-{len(batch.models)}-{method.name.replace(':', '-')}-{bits}"
            folders.append(folder)
            self.bar.set_description(f"{method.name}, {bits} bits")
            try:
                written = write_model(
                    self.source,
                    self.targets,
                    method,
                    bits,
                    collected,
                    self.args.seed + i,
                    folder,
                    lambda weights: self.bar.update(weights / total),
                )
            except UnfitError as error:
                self.left_out.append({"method": method.name, "bits": bits, "why": str(error)})
                for made in folders:
                    shutil.rmtree(made, ignore_errors=True)
                for _ in places:
                    batch.models.pop()[0].close()
                self.bar.update(before + 2 * self._seeds(method) - self.bar.n)
                return
            places.append(len(batch.models))
            plain = self.size.bytes - int(self.size.bpw * total / 8)
            batch.models.append((self.open(folder), 0, Size(written.bpw, plain + int(written.bpw * total / 8))))
            seconds.append(written.seconds)
        batch.folders += folders
        batch.entries.append((Entry(method.name, len(places), float(np.mean(seconds))), bits, places))

    def _own_overlay(self) -> tuple[Path, str, float | None]:
        self.bar.set_description(f"{OWN} quantize")
        out = self.scratch / OWN
        began = time.perf_counter()
        quantize(
            self.source.folder,
            out,
            calibration=self.args.calibration,
            seed=self.args.seed,
            calibration_sequences=self.args.calibration_sequences,
            calibration_length=self.args.calibration_length,
            threads=self.args.threads,
            progress=False,
        )
        self.notes.append(
            f"{OWN}: everybit quantize with its defaults; its seconds are of 2 to 8 bits at once, calibration included"
        )
        self.bar.update(1)
        return out, OWN, time.perf_counter() - began

    def _check_overlay(self, path: Path) -> None:
        """Notes what makes an overlay's rows another comparison. Raises: FormatError, SourceError"""
        with Overlay.open(path) as overlay:
            if not set(overlay.bits) & set(self.bits):
                raise SourceError(f"--overlay {path}: it holds {overlay.bits} bits, none of those asked for")
            own = {name: spec.shape for name, spec in overlay.weights.items()}
            if own != {target.name: target.shape for target in self.targets}:
                self.notes.append(f"{path.name} quantizes other weights than the methods do: its bpw is of those")
            made = overlay.config["quantization_config"].get("provenance", {}).get("calibration", {})
            if {**self.record.provenance(), **made} != self.record.provenance():
                self.notes.append(f"{path.name} was calibrated differently: {made}")

    def _add_overlay(self, batch: Batch, path: Path, name: str, seconds: float | None) -> None:
        model = self.open(path)
        for bits in sorted(set(model.bits) & set(self.bits)):
            batch.entries.append((Entry(name, 1, seconds), bits, [len(batch.models)]))
            batch.models.append((model, bits, model.sizes().rows[bits]))

    def _flush(self, batch: Batch, reference: evaluate.EngineModel) -> Batch:
        """Score what is open. Returns the next batch."""
        if batch.models:
            self.bar.set_description("scoring")
            self.report = batch.evaluate(self.windows, reference, self.size)
            self.rows += [(entry, self.report.average(places, bits)) for entry, bits, places in batch.entries]
        return Batch(self.bar, self.windows.tokens)

    def _all_notes(self, methods: Sequence[Method]) -> list[str]:
        assert self.report is not None
        notes = [f"{self.report.tokens:,} tokens{self.report.how()}", *self.notes]
        if seeded := [method.name for method in methods if method.seeded]:
            notes.append(f"{', '.join(seeded)}: mean of {self.args.seeds} seeds (perplexity: geometric)")
        why: dict[str, list[str]] = {}
        for entry in self.left_out:
            names = why.setdefault(entry["why"], [])
            if entry["method"] not in names:
                names.append(entry["method"])
        return [*notes, *(f"left out: {', '.join(names)} ({reason})" for reason, names in why.items())]


def _float_size(source: Source, targets: Sequence[Target]) -> Size:
    """Of the float model in its own dtypes."""
    item = {name: ITEM_BYTES.get(source.dtype_of(name), 4) for name in source.shapes}
    quantized = {target.name: prod(target.shape) for target in targets}
    bpw = 8 * sum(item[name] * count for name, count in quantized.items()) / sum(quantized.values())
    return Size(bpw, sum(item[name] * prod(shape) for name, shape in source.shapes.items()))

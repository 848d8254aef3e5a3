"""`everybit plan probe`: this machine as a card, and our engine on it as a calibration."""

from __future__ import annotations

import argparse
import datetime
import itertools
import mmap
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everybit.cli.options import positive_int
from everybit.errors import OutputError, SourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from everybit.plan.probe import Measurements

ROWS = (1, 2, 4, 8, 16, 64, 128, 512)
MANY = 64  # rows from which on arithmetic takes the time, and fewer products are enough
WIDTHS = (512, 960, 1024, 2048, 5120)  # the engine reads 7 and 8 bits in another way from 1024 on
BITS = (2, 16, 3, 8, 4, 7, 5, 6)  # in an order in which no cache still has the planes that two share
OUT, WEIGHTS = 1024, 1 << 25  # of a product; of all products of a width
LAUNCHES = 64
LAYERS, HEADS, HEAD, FEED = 8, 16, 64, 4096
PAST, PROMPT = 2048, 256
NEEDED_BYTES = 1_500_000_000
LEAST_ROUNDS = 3


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "probe",
        help="measure this machine into a card, and our engine on it into a calibration",
        description="Measures read bandwidth, products of random planes at 2 to 8 bits and of 16-bit floats for 1 to "
        "512 rows, attention and launches, and keeps the best of several rounds. Writes CARD.toml and beside it "
        "CARD.calibration.json: --on CARD.toml --engine everybit --calibration CARD.calibration.json.",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="CARD.toml", help="the card to write")
    parser.add_argument(
        "--seconds", type=positive_int, default=30, metavar="S", help=f"about so long, {LEAST_ROUNDS} rounds at least"
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="default: one per processor this process may use"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit.plan.probe import calibration_of, card_of, write_card

    if args.output.suffix != ".toml":
        raise SourceError(f"--output {args.output}: expected a name that ends in .toml")
    if not args.output.parent.is_dir():
        raise OutputError(f"--output {args.output}: no folder {args.output.parent}, make it first")
    calibration = args.output.with_suffix(".calibration.json")
    for path in (args.output, calibration):
        if path.is_dir():
            raise OutputError(f"--output {args.output}: {path} is a folder, expected the name of a file: pass another")
    found = measure(args.threads, args.seconds)
    card = card_of(found)
    write_card(card, args.output)
    calibration_of(found).save(calibration)
    print(f"{card.name}: {card.main_memory.bytes_per_s / 1e9:.1f} GB/s, {found.fp32_flops / 1e9:.0f} GFLOP/s (fp32)")
    print("GB/s of weights   rows" + "".join(f"{rows:>7}" for rows in ROWS))
    for bits in sorted(BITS):
        rates = [bits / 8e9 / found.weight_s[bits, rows, WIDTHS[-2]] for rows in ROWS]
        print(f"{bits:>15} bits   " + "".join(f"{rate:7.1f}" for rate in rates))
    print(f"wrote {args.output} and {calibration}")
    return 0


def measure(threads: int = 0, seconds: float = 30) -> Measurements:
    """The best of rounds that each measure everything once: other programs can only slow it down.

    Raises: ModelError (threads), SourceError (too little memory, times that make no sense)
    """
    from everybit import __version__, _native
    from everybit.cli.probe import available_bytes, processor_name, thread_counts
    from everybit.engine.runtime import check_threads
    from everybit.plan.probe import Measurements

    threads = check_threads(threads)
    if 0 < (free := available_bytes()) < NEEDED_BYTES:
        raise SourceError(f"{free / 1e9:.1f} GB are free, a probe needs {NEEDED_BYTES / 1e9:g}: stop other programs")
    counts = sorted({*thread_counts(_native.usable_processors()), threads})
    array_bytes = _native.stream_array_bytes()
    rates = {count: 1e9 * _native.measure_bandwidth("read", count, array_bytes, 7)[0] for count in counts}
    empty = Probe(threads, 512).finish()

    def asleep() -> float:
        time.sleep(1e-3)  # as the sampling between an engine's steps
        return empty.seconds()

    cases: dict[Any, Callable[[], float]] = {
        "asleep": asleep, "step": empty.seconds, "launch": _launches(threads).seconds,
    }  # fmt: skip
    layers = _layers(threads)
    for past in range(0, PAST, PROMPT):
        layers.seconds(PROMPT, past)  # a cache that was never written has no memory of its own
    for rows, past in ((1, 0), (16, 0), (PROMPT, 0), (1, PAST)):
        cases["layers", rows, past] = partial(layers.seconds, rows, past)
    products = {
        (width, many): _products(threads, width, many) for width, many in itertools.product(WIDTHS, (False, True))
    }
    grid = set(itertools.product(BITS, ROWS, WIDTHS))
    for rows, bits, width in itertools.product(ROWS, BITS, WIDTHS):
        cases[bits, rows, width] = partial(products[width, rows >= MANY][bits == 16].seconds, rows, 0, bits)

    best: dict[Any, float] = {}
    end, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < end or rounds <= LEAST_ROUNDS:
        for case, run_case in cases.items():
            for _ in range(1 if case in grid else 5):  # differences of short times are taken
                empty.seconds()  # wakes the threads: how long that takes is in `asleep` alone
                took = run_case()
                best[case] = min(took, best.get(case, took))
        rounds += 1

    width = HEADS * HEAD
    launch_s = (best["launch"] - best["step"]) / LAUNCHES
    numbers = LAYERS * (8 * width + 3 * FEED)  # into and out of the products that such layers would have
    number_s = (best["layers", 16, 0] - best["layers", 1, 0]) / 15 / numbers
    prompt_s = best["layers", PROMPT, 0] - best["layers", 1, 0] - (PROMPT - 1) * numbers * number_s
    weight_s = {}
    for bits, rows, into in grid:
        count = _count(into, rows >= MANY)
        took = best[bits, rows, into] - best["step"] - count * launch_s
        weight_s[bits, rows, into] = took / (count * OUT * into)
    return Measurements(
        processor=processor_name(),
        date=datetime.date.today().isoformat(),
        version=__version__,
        threads=threads,
        memory_bytes=float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        bytes_per_s=rates,
        fp32_flops=max(2 * rows / took for (bits, rows, _), took in weight_s.items() if bits == 16),
        weight_s=weight_s,
        step_s=best["asleep"],
        layer_s=(best["layers", 1, 0] - best["step"]) / LAYERS,
        launch_s=launch_s,
        number_s=number_s,
        attention_flops=LAYERS * 4 * width * (PROMPT * (PROMPT + 1) / 2) / prompt_s,
        cache_bytes_per_s=LAYERS * 4 * width * PAST / (best["layers", 1, PAST] - best["layers", 1, 0]),
    )


class Probe:
    """A program of the engine over weights made here: `add_...`, `finish`, then `seconds` of a step."""

    def __init__(self, threads: int, width: int, layers: int = 1, heads: int = 1, most: int = ROWS[-1]) -> None:
        from everybit import _native
        from everybit.engine.runtime import blocks_of

        self.native = _native.Program(
            threads, [], "", "default", False, most, layers, heads, HEAD, blocks_of(PAST + most), "F16"
        )
        self._planes: list[bool] = []
        self.x = self.buffer(width)
        self.out = self.x
        embedding = self.halves(1, width, random_memory(2 * width))
        self.native.add_embed("embedding", self.x, embedding, False, 0, 1.0, False)

    def buffer(self, width: int) -> tuple[int, int, int]:
        return self.native.add_buffer(width), 0, width

    def halves(self, out: int, into: int, data: NDArray[np.uint8]) -> int:
        self._planes.append(False)
        return self.native.add_plain("halves", data, "F16", 1, out, into, False)

    def planes(self, planes: list[NDArray[np.uint8]], into: int) -> int:
        self._planes.append(True)
        return self.native.add_planes("planes", planes, 1, into)

    def multiply(self, weight: int, out: tuple[int, int, int]) -> None:
        self.native.add_linear("product", self.x, [out], [weight], [], False)
        self.out = out

    def finish(self) -> Probe:
        few = self.buffer(HEAD)
        self.native.add_select("select", few, (self.out[0], 0, HEAD))
        self.native.set_logits(few)
        return self

    def seconds(self, rows: int = 1, past: int = 0, bits: int = 0) -> float:
        """Of one step, tokens in to logits in memory."""
        import numpy as np

        from everybit.engine.native import make_step
        from everybit.engine.runtime import blocks_of

        served = np.array([bits if planes else 0 for planes in self._planes], np.uint8)
        tokens, blocks = np.zeros(rows, np.int32), np.arange(blocks_of(rows + past), dtype=np.int32)
        start = time.perf_counter()
        step = make_step([(tokens, past, blocks)], [rows - 1])
        logits = np.empty((1, HEAD), np.float32)
        self.native.run(step.tokens, step.starts, step.past, step.blocks, step.rows, served, logits)
        return time.perf_counter() - start


def _launches(threads: int) -> Probe:
    """Products that are next to nothing."""
    probe = Probe(threads, 512)
    out, weight = probe.buffer(HEAD), probe.halves(HEAD, 512, random_memory(2 * HEAD * 512))
    for _ in range(LAUNCHES):
        probe.multiply(weight, out)
    return probe.finish()


def _layers(threads: int) -> Probe:
    """Layers of a decoder without their products."""
    width = HEADS * HEAD
    probe = Probe(threads, width, LAYERS, HEADS, PROMPT)
    native = probe.native
    normed, q, k, v, out = (probe.buffer(width) for _ in range(5))
    gate, up = probe.buffer(FEED), probe.buffer(FEED)
    turns = [10000 ** (-2 * i / HEAD) for i in range(HEAD // 2)]
    for layer in range(LAYERS):
        native.add_norm("norm", normed, probe.x, [1.0] * width, [], "rms", 1e-5, False, 1)
        native.add_rope("rope", q, HEADS, turns, 1.0, False)
        native.add_rope("rope", k, HEADS, turns, 1.0, False)
        native.add_attention("attention", out, q, k, v, layer, HEADS, HEAD**-0.5, 0, 0.0, [])
        native.add_norm("norm", normed, probe.x, [1.0] * width, [], "rms", 1e-5, False, 1)
        native.add_activate("activate", gate, gate, up, True, "silu", 0.0)
    return probe.finish()


def _products(threads: int, width: int, many: bool) -> tuple[Probe, Probe]:
    """Of planes and of halves. Unless for `many` rows, so many that no cache keeps them until they are read again."""
    planes, plain = Probe(threads, width), Probe(threads, width)
    places = planes.buffer(OUT), plain.buffer(OUT)
    bytes_ = random_memory(_count(width, many) * OUT * width).reshape(-1, 8, OUT, width // 8)
    halves = random_memory(_count(width, many) * OUT * width * 2).reshape(-1, OUT * width * 2)
    weights = []
    for one, other in zip(bytes_, halves, strict=True):
        weights.append(planes.planes(list(one), width))
        planes.multiply(weights[-1], places[0])
        plain.multiply(plain.halves(OUT, width, other), places[1])
    _prepare(planes, weights, width, threads)
    return planes.finish(), plain.finish()


def _prepare(probe: Probe, weights: list[int], width: int, threads: int) -> None:
    """Codebooks of the container's usual kind, as the engine prepares them."""
    import numpy as np

    from everybit.engine.native import MADE_BITS, MADE_COLUMNS
    from everybit.formats import Compact

    levels = np.linspace(-127, 127, 16).astype(np.int8)
    arrays = Compact.pack(
        np.full(OUT, 1e-3, np.float32),
        {bits: np.tile(levels[: 1 << bits], (OUT, 1)) for bits in (2, 3, 4)},
        np.tile(levels, (OUT, 1)),
        np.ones((OUT, 16), np.uint8),
        np.full(OUT, 1e-3, np.float32),
    )
    book = Compact()
    for bits in range(2, 9):
        grid = book.grid(arrays, bits)
        made = bits >= MADE_BITS and width >= MADE_COLUMNS
        table, unit = book.expand(arrays, bits), book.unit(arrays, bits)
        for weight in weights:
            if grid and made:
                probe.native.prepare_cells(weight, bits, grid.centres, grid.ladders, grid.steps)
            else:
                probe.native.prepare(weight, bits, table, unit, threads)


def _count(width: int, many: bool) -> int:
    return -(-(WEIGHTS // 8 if many else WEIGHTS) // (OUT * width))


def random_memory(size_bytes: int) -> NDArray[np.uint8]:
    """Finite halves, or planes; in small pages, as those of a file (numpy asks for large ones, which are faster)."""
    import numpy as np

    memory = np.frombuffer(mmap.mmap(-1, size_bytes), np.uint8)
    some = np.random.default_rng(0).standard_normal(min(size_bytes // 2, 1 << 20)).astype(np.float16)
    memory[:] = np.resize(some.view(np.uint8), size_bytes)
    return memory

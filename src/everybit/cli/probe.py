"""`everybit probe`: what this machine has: processors, caches, instruction sets, measured memory bandwidth."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from everybit.cli.options import positive_int
from everybit.errors import RequestError

KERNELS = ("read", "copy", "triad")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "probe",
        help="measure this machine: processors, instruction sets, memory bandwidth",
        description="Show what the engine finds here, and measure the memory's bandwidth with arrays that no cache "
        "holds (a STREAM of our own: read, copy, triad). A token reads every weight once, so read bandwidth divided by "
        "the bytes of a precision (everybit inspect) is the most tokens per second.",
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="measure with N threads only (default: 1, 2, 4, ... to all)"
    )
    parser.add_argument("--runs", type=positive_int, default=7, metavar="N", help="of every kernel (default 7)")
    parser.add_argument("--array-mb", type=positive_int, metavar="MB", help="size of an array (default: 4 caches)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from everybit import _native
    from everybit.engine.runtime import ISA_VARIABLE, check_threads

    if args.threads is not None and args.threads > 1024:
        raise RequestError("--threads", f"{args.threads}: expected at most 1024")
    processors = _native.usable_processors()
    counts = [check_threads(args.threads)] if args.threads else thread_counts(processors)
    array_bytes = args.array_mb * 10**6 if args.array_mb else _native.stream_array_bytes()
    available = available_bytes()
    if available and 3 * array_bytes > available:
        raise RequestError(
            "--array-mb",
            f"{array_bytes // 10**6}: three such arrays do not fit into the {available // 10**6} MB that are free, "
            "expected a third of that or less",
        )
    isas = _native.isas()
    isa = os.environ.get(ISA_VARIABLE) or isas[0]
    if isa not in isas:
        raise RequestError(ISA_VARIABLE, f"{isa!r}: expected one of {', '.join(isas)}, or nothing for the first")
    document: dict[str, Any] = {
        "processor": processor_name(),
        "processors": processors,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "caches": _caches(),
        "isas": isas,
        "isa": isa,
        "array_bytes": array_bytes,
        "runs": args.runs,
        "bandwidth": [
            {"kernel": kernel, "threads": threads, "best_gbps": best, "median_gbps": median}
            for threads in counts
            for kernel in KERNELS
            for best, median in [_native.measure_bandwidth(kernel, threads, array_bytes, args.runs)]
        ],
    }
    print(json.dumps(document) if args.json else _tables(document))
    return 0


def thread_counts(processors: int) -> list[int]:
    """1, 2, 4, ... and all."""
    counts = [1 << k for k in range(processors.bit_length()) if 1 << k < processors]
    return [*counts, processors]


def _tables(found: dict[str, Any]) -> str:
    bandwidth = found["bandwidth"]
    lines = [
        f"processor          {found['processor']}, {found['processors']} usable",
        f"memory             {found['memory_bytes'] / 1e9:.1f} GB",
        "caches             " + (", ".join(f"{c['name']} {_size(c['bytes'])}" for c in found["caches"]) or "unknown"),
        "instruction sets   " + ", ".join(f"{name} (used)" if name == found["isa"] else name for name in found["isas"]),
        "",
        f"GB/s, best and median of {found['runs']} runs over arrays of {found['array_bytes'] / 1e6:,.0f} MB",
        "threads" + "".join(f"{kernel:>16}" for kernel in KERNELS),
    ]
    for threads in dict.fromkeys(entry["threads"] for entry in bandwidth):
        cells = [f"{e['best_gbps']:.1f} ({e['median_gbps']:.1f})" for e in bandwidth if e["threads"] == threads]
        lines.append(f"{threads:>7}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def _size(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"


def _caches() -> list[dict[str, object]]:
    """The caches that processor 0 sees, smallest first; none where the system does not say."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
            unit = {"K": 1 << 10, "M": 1 << 20}[size[-1]]
            letter = {"Data": "d", "Instruction": "i"}.get(kind, "")
            found.append({"name": f"L{level}{letter}", "bytes": int(size[:-1]) * unit})
        except (OSError, KeyError, IndexError, ValueError):
            continue
    return found


def processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available_bytes() -> int:
    """Memory that can be had without swapping; 0 where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0

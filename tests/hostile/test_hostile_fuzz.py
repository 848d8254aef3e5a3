"""Mutated overlays by the thousand: each opens and reads in full, or raises an EverybitError. Nothing else.

Seeded, so a failure repeats: the message holds the case's number and what was changed.
"""

from __future__ import annotations

import copy
import json
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from everybit.errors import EverybitError
from everybit.formats import Overlay
from tests.hostile.craft import Folder

CASES, SEED = 12_000, 1
INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"

# What a JSON value is replaced by: each type, the edges of each number, names that lead elsewhere.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 8, 9, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308),
    *(
        "",
        "U8",
        "F16",
        "F32",
        "I64",
        "table",
        "affine",
        "cells",
        "compact",
        "everybit",
        "a.weight",
        "../x",
        "/etc/passwd",
        "\0",
        "\ud800",
    ),
    *([], {}, [[]], [1, 2], [2, 3], [3, 2], [0, 6], [-1, 6], {"shape": [3, 16]}, ["x"], [None]),
]
KEYS = ["", "bits", "shape", "dtype", "__metadata__", "a.weight", "x_plane0", "sha256:x", "\ud800", "x" * 300]


def _places(found: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys."""
    if isinstance(found, dict | list):
        for key in list(found) if isinstance(found, dict) else range(len(found)):
            yield found, key
            yield from _places(found[key])


def _change(found: Any, random_: random.Random) -> str:
    """Changes one place of a JSON value."""
    box, key = random_.choice(list(_places(found)))
    kind = random_.randrange(5)
    value = box[key]
    if kind == 0 and type(value) is int:
        box[key] = value + random_.choice([-8, -2, -1, 1, 2, 8, 64, 2**32])
    elif kind == 1:
        del box[key]
    elif kind == 2 and isinstance(box, dict):
        box[random_.choice(KEYS)] = box.pop(key) if random_.random() < 0.5 else copy.deepcopy(value)
    elif kind == 3:
        other, place = random_.choice(list(_places(found)))
        box[key] = json.loads(json.dumps(other[place]))
    else:
        box[key] = copy.deepcopy(random_.choice(VALUES))
    return f"{kind} at {key!r:.40}"


def _damage(raw: bytes, random_: random.Random) -> tuple[bytes, str]:
    """Flips bits, cuts, grows or repeats parts of a file."""
    kind, place = random_.randrange(6), random_.randrange(len(raw))
    if kind == 0:
        return raw[:place], f"cut at {place}"
    if kind == 1:
        return raw + raw[place : place + random_.randrange(1, 70)], "grown"
    if kind == 2:
        return raw[:place] + raw[place + random_.randrange(1, 9) :], f"removed at {place}"
    if kind == 3:
        text = random_.choice([b"[" * 3000, b'"', b"\xff", b"9" * 30, b'{"a":', b"-", b"NaN", b"\\ud800", b",", b"e9"])
        return raw[:place] + text + raw[place + random_.choice([0, len(text)]) :], f"{text[:9]!r} at {place}"
    changed = bytearray(raw)
    for _ in range(random_.choice([1, 1, 2, 8])):
        first, last = random_.choice([(0, 8), (0, len(raw)), (0, len(raw)), (max(len(raw) - 150, 0), len(raw))])
        place = random_.randrange(first, min(last, len(raw)))  # the length, anywhere, or the data at the end
        changed[place] = changed[place] ^ 1 << random_.randrange(8) if kind == 4 else random_.randrange(256)
    return bytes(changed), f"bytes near {place}"


class Opened:
    """Records the files that the interpreter opens while `watching`; audit hooks cannot be removed."""

    def __init__(self) -> None:
        self.watching = False
        self.paths: set[str] = set()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.watching and event == "open" and not isinstance(arguments[0], int):  # fdopen of a known file
            self.paths.add(str(arguments[0]))


@contextmanager
def _watchdog(seconds: float, case: str) -> Iterator[None]:
    def late(*_: object) -> None:
        pytest.fail(f"{case} took over {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _mutate(folder: Path, crafted: Folder, random_: random.Random) -> tuple[str, Callable[[], None]]:
    """Damages one file of an honest folder; says how, and how to undo it. Mutates: `crafted`."""
    shard = FIRST if crafted.index else "model.safetensors"
    name = random_.choices(["config.json", shard, INDEX if crafted.index else shard], [2, 4, 1])[0]
    path = folder / name
    honest = path.read_bytes()
    notes = []
    if random_.random() < 0.6:
        part: Any = {"config.json": crafted.config, INDEX: crafted.index}.get(name, crafted.shards[shard].header)
        for _ in range(random_.choice([1, 1, 1, 2, 3])):
            if part:
                notes.append(_change(part, random_))
        raw = crafted.shards[shard].bytes() if name == shard else json.dumps(part).encode()
    else:
        raw, note = _damage(honest, random_)
        notes.append(note)
    _put(path, raw)
    return f"{name}: {', '.join(notes)}", lambda: _put(path, honest)


def _put(path: Path, raw: bytes) -> None:
    """Overwrites in place: opening with truncation costs ext4 a flush, 3 ms a case."""
    with path.open("r+b") as file:
        file.write(raw)
        file.truncate()


def test_mutations(tmp_path: Path) -> None:
    opened, outcomes, random_ = Opened(), Counter[str](), random.Random(SEED)
    kinds: list[dict[str, Any]] = [{}, {"split": True}, {"kind": "cells"}, {"kind": "compact"}]
    folders = [Folder(**kind).save(tmp_path / str(number)) for number, kind in enumerate(kinds)]
    for number in range(CASES):
        folder = folders[number % len(kinds)]
        note, undo = _mutate(folder, Folder(**kinds[number % len(kinds)]), random_)
        case = f"case {number} ({note})"
        opened.paths.clear()
        with _watchdog(10, case):
            opened.watching = True
            try:
                # Without checksums more damage reaches the code behind them.
                with Overlay.open(folder, verify=random_.random() < 0.3) as overlay:
                    overlay.verify_all()
                    str(overlay.sizes())
                outcomes["read"] += 1
                readable = True
            except EverybitError as error:
                readable = False
                outcomes[type(error).__name__] += 1
                if "\n" in str(error) or len(str(error)) > 1000:
                    pytest.fail(f"{case}: the message is not one short line: {error}")
            except Exception as error:
                raise AssertionError(f"{case}: {type(error).__name__} escaped") from error
            finally:
                opened.watching = False
        outside = {path for path in opened.paths if not path.startswith(str(folder))}
        assert not outside, f"{case} opened {outside}"
        if readable:  # whatever we accept, the stock library accepts too
            for path in folder.glob("*.safetensors"):
                with safe_open(path, "np"):
                    pass
        undo()
    # A fuzzer that breaks everything, or nothing, tests little.
    assert outcomes["read"] > CASES / 50
    assert outcomes["FormatError"] > CASES / 2
    assert outcomes["ChecksumError"] > CASES / 400

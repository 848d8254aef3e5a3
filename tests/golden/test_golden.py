"""Overlays written by earlier versions keep their meaning, and today's writer makes the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

from everybit.formats import Overlay
from tests.golden.make import FOLDER, VALUES, decode
from tests.unit import formats_tiny


def test_the_committed_overlay_decodes_to_the_committed_values() -> None:
    assert decode(FOLDER) == json.loads(VALUES.read_text())


def test_the_writer_makes_the_committed_bytes(tmp_path: Path) -> None:
    with Overlay.open(FOLDER) as overlay:
        tensors = {name: overlay.tensor(name).copy() for name in overlay.names()}
    written = formats_tiny.write(tmp_path / "overlay", tensors=tensors)
    assert formats_tiny.fingerprint(written) == formats_tiny.fingerprint(FOLDER)

"""Overlays written by earlier versions keep their meaning, and today's writer makes the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everybit.formats import Overlay
from tests.golden.make import HERE, VERSIONS, decode, values_of
from tests.unit import formats_tiny


@pytest.mark.parametrize("name", VERSIONS)
def test_the_committed_overlay_decodes_to_the_committed_values(name: str) -> None:
    assert decode(HERE / name) == json.loads(values_of(name).read_text())


@pytest.mark.parametrize("name", VERSIONS)
def test_the_writer_makes_the_committed_bytes(tmp_path: Path, name: str) -> None:
    with Overlay.open(HERE / name) as overlay:
        tensors = {tensor: overlay.tensor(tensor).copy() for tensor in overlay.names()}
    written = VERSIONS[name](tmp_path / "overlay", tensors=tensors)
    assert formats_tiny.fingerprint(written) == formats_tiny.fingerprint(HERE / name)


def test_each_version_has_one() -> None:
    for name, version in zip(VERSIONS, (1, 2, 3), strict=True):
        with Overlay.open(HERE / name) as overlay:
            assert overlay.quantization.format_version == version

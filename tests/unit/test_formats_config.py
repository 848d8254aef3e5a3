"""quantization_config: round trips, and one refusal per thing that can be wrong with it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from everybit.errors import FormatError
from everybit.formats import QuantizationConfig, WeightSpec


def good() -> dict[str, Any]:
    return {
        "quant_method": "everybit",
        "format_version": 1,
        "bits": [2, 3, 4],
        "codebook": "table",
        "weights": {
            "a.weight": {"shape": [6, 20]},
            "b.experts": {"shape": [2, 3, 16], "transposed": True, "bits": [2, 8], "codebook": "affine"},
        },
        "provenance": {"solver": "tree", "seed": 0},
    }


def test_parse_and_back() -> None:
    config = QuantizationConfig.from_dict(good())
    assert config.bits == (2, 3, 4)
    assert config.weights["a.weight"] == WeightSpec("a.weight", (6, 20), (2, 3, 4), "table")
    assert config.weights["b.experts"] == WeightSpec("b.experts", (2, 3, 16), (2, 8), "affine", True)
    assert config.to_dict() == good()
    assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_provenance_may_be_left_out() -> None:
    found = good()
    del found["provenance"]
    assert QuantizationConfig.from_dict(found).provenance == {}


def test_what_equals_the_default_is_not_repeated() -> None:
    found = good()
    found["weights"]["a.weight"] |= {"bits": [2, 3, 4], "codebook": "table", "transposed": False}
    assert QuantizationConfig.from_dict(found).to_dict() == good()


def cells() -> dict[str, Any]:
    found = good()
    found["weights"]["a.weight"]["codebook"] = "cells"
    return {**found, "format_version": 2}


def test_cells_are_version_two() -> None:
    config = QuantizationConfig.from_dict(cells())
    assert config.format_version == 2
    assert config.to_dict() == cells()
    spec = WeightSpec("w", (1, 8), codebook="cells")
    assert QuantizationConfig(spec.bits, "cells", {"w": spec}).to_dict()["format_version"] == 2
    assert QuantizationConfig(spec.bits, "table", {"w": spec}).to_dict()["format_version"] == 2
    plain = WeightSpec("w", (1, 8))
    assert QuantizationConfig(plain.bits, "table", {"w": plain}).to_dict()["format_version"] == 1


@pytest.mark.parametrize("where", ["default", "weight"])
def test_cells_in_version_one_are_refused(where: str) -> None:
    found = {**cells(), "format_version": 1}
    if where == "default":
        found = {**good(), "codebook": "cells"}
    with pytest.raises(FormatError, match=r"format_version 1 arrived beside a codebook kind that came with .* 2"):
        QuantizationConfig.from_dict(found)


def test_version_two_without_cells_is_read() -> None:
    assert QuantizationConfig.from_dict({**good(), "format_version": 2}).to_dict() == {**good(), "format_version": 2}


def test_compact_is_version_three() -> None:
    spec = WeightSpec("w", (1, 8), codebook="compact")
    found = QuantizationConfig(spec.bits, "table", {"w": spec}).to_dict()
    assert found["format_version"] == 3
    assert QuantizationConfig.from_dict(found).to_dict() == found
    for version in (1, 2):
        with pytest.raises(FormatError, match=rf"format_version {version} arrived beside a codebook kind that .* 3"):
            QuantizationConfig.from_dict({**found, "format_version": version})


REFUSED: list[tuple[str, Any, str]] = [
    ("quant_method", "gptq", "quant_method 'gptq' arrived, expected 'everybit'"),
    ("format_version", 4, "this file needs a newer everybit, upgrade it with pip install --upgrade everybit"),
    ("format_version", 0, "format_version 0 arrived, expected an integer from 1 up"),
    ("format_version", "1", "format_version '1' arrived, expected an integer"),
    ("format_version", True, "format_version True arrived, expected an integer"),
    ("format_version", None, "format_version None arrived, expected an integer"),
    ("bits", [], r"bits \[\] arrived, expected a list of different integers"),
    ("bits", [4, 3], r"bits \[4, 3\] arrived"),
    ("bits", [2, 9], r"bits \[2, 9\] arrived"),
    ("bits", 4, "bits 4 arrived"),
    ("codebook", "nf4", "codebook 'nf4' is unknown, expected one of table, affine"),
    ("codebook", ["table"], "codebook .* is unknown"),
    ("weights", {}, "weights {} arrived, expected at least one name with its shape"),
    ("weights", [], "expected at least one name with its shape"),
    ("weights", {"w": 3}, r"weights\['w'\]: 3 arrived, expected an object with shape"),
    ("weights", {"": {"shape": [1, 8]}}, "weight name '' arrived"),
    ("weights", {"w": {}}, r"weights\['w'\]: shape None arrived"),
    ("weights", {"w": {"shape": [8]}}, r"shape \(8,\) arrived, expected \[N, K\] or \[E, N, K\]"),
    ("weights", {"w": {"shape": [4, -8]}}, "of positive integers"),
    ("weights", {"w": {"shape": [4, 8.0]}}, "of positive integers"),
    ("weights", {"w": {"shape": [4, 8], "bits": [1]}}, r"weights\['w'\]: bits \[1\] arrived"),
    ("weights", {"w": {"shape": [4, 8], "codebook": "x"}}, "codebook 'x' is unknown"),
    ("weights", {"w": {"shape": [4, 8], "codebook": 1}}, "codebook 1 arrived, expected one of table, affine"),
    ("weights", {"w": {"shape": [4, 8], "transposed": 1}}, "transposed 1 arrived, expected true or false"),
    ("weights", {"w": {"shape": [4, 8], "group": 4}}, "unknown key 'group', expected only shape, transposed, bits"),
    ("provenance", "me", "provenance 'me' arrived, expected an object"),
    ("group_size", 128, "unknown key 'group_size', expected only quant_method, format_version"),
]


@pytest.mark.parametrize(("key", "value", "message"), REFUSED)
def test_refusals(key: str, value: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        QuantizationConfig.from_dict({**good(), key: value}, "here.json")
    assert str(caught.value).startswith("here.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["bits", "codebook", "weights"])
def test_missing_keys(key: str) -> None:
    found = good()
    del found[key]
    with pytest.raises(FormatError, match=f"the key '{key}' is missing"):
        QuantizationConfig.from_dict(found)


def test_not_an_object() -> None:
    with pytest.raises(FormatError, match="quantization_config: 7 arrived, expected an object with the keys"):
        QuantizationConfig.from_dict(7)  # type: ignore[arg-type]


def test_weights_whose_tensors_share_a_name() -> None:
    found = good()
    found["weights"] = {"a": {"shape": [4, 8]}, "a_plane0": {"shape": [4, 8]}}
    with pytest.raises(FormatError, match="weights 'a_plane0' and 'a' both claim the tensor 'a_plane0'"):
        QuantizationConfig.from_dict(found)

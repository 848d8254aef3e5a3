"""compressed-tensors: packing against a stream of bits, lossless grids, refits and their stated loss, the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from everybit.engine.checkpoint import Checkpoint
from everybit.errors import FormatError, SourceError
from everybit.formats import CODEBOOKS, OverlayWriter, QuantizationConfig, TensorSpec, WeightSpec
from everybit.integrations.compressed_tensors import export_compressed_tensors
from everybit.integrations.uniform_groups import fit_groups, pack_int32, whole_grid
from everybit.kernels import pack_planes
from tests.unit import formats_tiny

ROWS, COLUMNS = 10, 64
EXACT, OTHER = "m.0.exact.weight", "m.0.other.weight"


def write_overlay(
    folder: Path, specs: list[WeightSpec], zeros: dict[str, Any], plain: dict[str, Any], **config: Any
) -> Path:
    """An overlay of random weights with `affine` codebooks: of one with a zero point in `zeros` this one at every
    precision, of one with None random whole ones, of any other random ones in between."""
    rng = np.random.default_rng(0)
    quantization = QuantizationConfig(specs[0].bits, "affine", {s.name: s for s in specs})
    layout = {name: TensorSpec("F32", array.shape) for name, array in plain.items()}
    for spec in specs:
        layout |= spec.tensors("F32")
    document = {"model_type": "llama", **config, "quantization_config": quantization.to_dict()}
    with OverlayWriter(folder, layout, document) as writer:
        for name, array in plain.items():
            writer.write(name, array)
        for spec in specs:
            codes = rng.integers(0, 1 << spec.planes, spec.shape, np.uint8)
            for k, plane in enumerate(pack_planes(codes, spec.planes)):
                writer.write(spec.plane_name(k), plane)
            for b in spec.bits:
                scale = rng.integers(1, 100, spec.rows).astype(np.float32) / 256 * 2.0 ** (8 - b)
                zero = rng.integers(0, 1 << b, spec.rows) + (0 if spec.name in zeros else 0.5)
                if (fixed := zeros.get(spec.name)) is not None:
                    zero = np.full(spec.rows, fixed)
                writer.write(f"{spec.name}_affine{b}", np.stack([scale, -zero * scale], axis=1).astype(np.float32))
        writer.finish()
    return folder


def affine_pair(
    folder: Path, bits: tuple[int, ...] = (3, 4), own: tuple[int, ...] | None = None, zero: int | None = None
) -> Path:
    """One weight on a grid with whole zero points at every precision, one with offsets in between."""
    specs = [
        WeightSpec(EXACT, (ROWS, COLUMNS), bits, "affine"),
        WeightSpec(OTHER, (ROWS, COLUMNS), own or bits, "affine"),
    ]
    return write_overlay(folder, specs, {EXACT: zero}, {"m.0.bias": np.ones(3, np.float32)})


def unpack(words: NDArray[np.int32], bits: int, count: int) -> NDArray[np.int64]:
    """Codes of a row from the number that its words spell, the low word first."""
    found = []
    for row in words:
        number = int.from_bytes(np.ascontiguousarray(row, "<i4").tobytes(), "little")
        found.append([number >> (bits * i) & ((1 << bits) - 1) for i in range(count)])
    return np.array(found)


def values(tensors: dict[str, Any], name: str, bits: int) -> NDArray[np.float32]:
    """A weight by the format's definition: scale * (code - zero), groups of neighbouring columns; zero is half of the
    codes where it is not stored."""
    rows, columns = tensors[f"{name}_shape"].tolist()
    scale = tensors[f"{name}_scale"]
    codes = unpack(tensors[f"{name}_packed"], bits, columns)
    zero = np.full(scale.shape, 1 << (bits - 1))
    if f"{name}_zero_point" in tensors:
        zero = unpack(tensors[f"{name}_zero_point"].T, bits, rows).T
    repeat = columns // scale.shape[1]
    steps = (codes - zero.repeat(repeat, 1)).astype(np.float32)
    return np.asarray(steps * scale.repeat(repeat, 1))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 31, 33, 64])
def test_packing_is_one_stream_of_bits(bits: int, columns: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, columns), np.uint8)
    packed = pack_int32(codes, bits)
    assert packed.shape == (3, -(-columns * bits // 32))
    assert np.array_equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_a_grid_with_whole_zero_points_is_exact(tmp_path: Path, bits: int) -> None:
    overlay = affine_pair(tmp_path / "overlay")
    report = export_compressed_tensors(overlay, tmp_path / "out", bits=bits, group_size=16)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    exact, other = report.losses
    assert (exact.how, exact.before == exact.after, other.how) == ("exact", True, "refit")
    with Checkpoint.open(overlay) as checkpoint:
        assert np.array_equal(values(tensors, EXACT, bits), checkpoint.dense(EXACT, bits))
        wanted = checkpoint.dense(OTHER, 4)
    # transformers reads one strategy for all: the exact weight's scale is repeated.
    assert tensors[f"{EXACT}_scale"].shape == tensors[f"{OTHER}_scale"].shape == (ROWS, 4)
    found = values(tensors, OTHER, bits)
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) == pytest.approx(other.after, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 8])
def test_float32_rounding_does_not_hide_a_grid(bits: int) -> None:
    rng = np.random.default_rng(0)
    scale = rng.random((500, 1)).astype(np.float32)
    zero = rng.integers(0, 1 << bits, (500, 1))
    affine = np.concatenate([scale, -scale * zero.astype(np.float32)], axis=1)
    table = CODEBOOKS["affine"].expand({f"affine{bits}": affine}, bits)
    found = whole_grid(table)
    assert found is not None
    np.testing.assert_allclose(found[0], scale, rtol=1e-6)
    assert np.array_equal(found[1], zero)
    table[7] += scale[7] / 50  # of one row, a fiftieth of a step
    assert whole_grid(table) is None


def test_config_groups_name_the_modules_of_mixed_bits(tmp_path: Path) -> None:
    overlay = affine_pair(tmp_path / "overlay", bits=(2, 3), own=(5,), zero=2)
    report = export_compressed_tensors(overlay, tmp_path / "out", bits=2, group_size=32)
    assert [loss.how for loss in report.losses] == ["exact", "refit"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    groups = [
        (g["targets"], g["weights"]["num_bits"], g["weights"]["symmetric"]) for g in config["config_groups"].values()
    ]
    assert groups == [(["m.0.exact"], 2, True), (["m.0.other"], 5, True)]
    assert not config["dequantize"]  # with it, transformers takes the first group for every module
    assert config["ignore"] == ["lm_head"]


@pytest.mark.parametrize(
    # Of round-to-nearest on normal numbers in groups of 128: half a step is 1/sqrt(12) of a range of 5 to 6 deviations
    # over 2^b - 1 steps; clipping gains a little at few bits, and no code can be better than Lloyd-Max for all of them.
    ("bits", "least", "most"),
    [(2, 0.30, 0.40), (3, 0.15, 0.22), (4, 0.08, 0.11), (6, 0.018, 0.027), (8, 0.004, 0.0065)],
)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_refits_of_normal_weights_lose_what_theory_says(
    bits: int, least: float, most: float, dtype: str, symmetric: bool
) -> None:
    weights = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    weights[0, :128] = 0
    fitted = fit_groups(weights, bits, 128, dtype, symmetric)
    assert not symmetric or (fitted.zero[1:] == 1 << (bits - 1)).all()
    assert least < np.linalg.norm(fitted.values() - weights) / np.linalg.norm(weights) < most
    assert not fitted.values()[0, :128].any()
    assert int(fitted.zero.max()) < 1 << bits


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"'b\.experts' is fused experts, which compressed-tensors cannot hold"):
        export_compressed_tensors(formats_tiny.write(tmp_path / "experts"), tmp_path / "out", bits=3)
    overlay = affine_pair(tmp_path / "overlay")
    with pytest.raises(
        SourceError, match=r"--group-size 128: 'm\.0\.exact\.weight' has rows of 64 .* such as 64, or -1"
    ):
        export_compressed_tensors(overlay, tmp_path / "out", bits=3)
    with pytest.raises(SourceError, match=r"would have 20\.5 bits a weight with its scales, more than float16: choose"):
        export_compressed_tensors(overlay, tmp_path / "out", bits=3, group_size=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_package_decompresses_the_same_values(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig as Theirs

    overlay = affine_pair(tmp_path / "overlay", bits=(bits,))
    export_compressed_tensors(overlay, tmp_path / "out", group_size=16)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = Theirs.model_validate(config).config_groups
    for name in (EXACT, OTHER):
        state = {k.removeprefix("m.0.").partition(".")[2]: torch.tensor(v) for k, v in tensors.items() if name in k}
        found = PackedQuantizationCompressor.decompress(state, groups["group_0"])["weight"].numpy()
        assert np.array_equal(found, values(tensors, name, bits))


def llama_overlay(model: Path, folder: Path, own: tuple[int, ...]) -> Path:
    """An overlay of a Llama whose weights have one precision each, in turns; every other one is on a whole grid."""
    tensors = load_file(model / "model.safetensors")
    names = [name for name in tensors if "_proj" in name]
    specs = [WeightSpec(name, tensors[name].shape, (own[i % len(own)],), "affine") for i, name in enumerate(names)]
    zeros = {spec.name: 1 << (spec.bits[0] - 1) for spec in specs[::2]}
    plain = {name: array for name, array in tensors.items() if name not in names}
    return write_overlay(folder, specs, zeros, plain, **json.loads((model / "config.json").read_text()))


@pytest.mark.parametrize("own", [(4,), (2, 3, 8, 8)], ids=["one precision", "a mix"])
@pytest.mark.parametrize("group_size", [8, -1])
def test_transformers_computes_what_was_written(
    tiny_llama: Path, tmp_path: Path, own: tuple[int, ...], group_size: int
) -> None:
    pytest.importorskip("compressed_tensors")
    import torch
    from transformers import AutoModelForCausalLM

    overlay = llama_overlay(tiny_llama, tmp_path / "overlay", own)
    losses = export_compressed_tensors(overlay, tmp_path / "out", group_size=group_size).losses
    assert {loss.how for loss in losses} == {"exact", "refit"}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    served = {loss.name: loss.bits for loss in losses}
    with torch.no_grad(), Checkpoint.open(overlay) as checkpoint:
        for name, parameter in plain.named_parameters():
            if name in served:
                parameter.copy_(torch.tensor(values(tensors, name, served[name])))
            if {loss.name: loss.how for loss in losses}.get(name) == "exact":
                assert np.array_equal(parameter.numpy(), checkpoint.dense(name, checkpoint.bits[-1]))
        tokens = torch.arange(2, 40)[None]
        assert torch.equal(model(tokens).logits, plain(tokens).logits)

"""Writes an overlay of random planes and sensible random tables at a real model's shape, in seconds, without a solver.

    python benchmarks/peers/synthetic_overlay.py SHAPE FOLDER [--bits 2-8] [--codebook table]

Embeddings are f16, norms f32 ones, biases f32. A row's codebook holds the means of equal slices of a normal
distribution, times a scale of about 1 / sqrt(K), so that activations stay finite. The head is a quantized
`lm_head.weight` of its own in every shape. Qwen2.5-0.5B's is tied to the embedding, which would have to be quantized
with it, and `everybit quantize` leaves embeddings alone; the bytes a token reads are the same, because llama.cpp, too,
stores the tied tensor at the quantized type.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from protocol import SHAPES, Shape

from everybit.formats import CODEBOOKS, OverlayWriter, QuantizationConfig, TensorSpec, WeightSpec, check_bits

Array = np.ndarray[Any, Any]
POOL_BYTES = 1 << 26  # random bytes, of which every plane takes a piece of its own


def hf_config(shape: Shape) -> dict[str, Any]:
    """The model's config.json, as transformers reads it."""
    return {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[shape.family]],
        "model_type": shape.family,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float16",
    }


def matrices(shape: Shape) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every quantized weight in the model's order, the head last."""
    for layer in range(shape.layers):
        for name, size in shape.linears().items():
            yield f"model.layers.{layer}.{name}.weight", size
    yield "lm_head.weight", (shape.vocabulary, shape.hidden)


def plain(shape: Shape) -> dict[str, TensorSpec]:
    """Every tensor that stays a float."""
    found = {"model.embed_tokens.weight": TensorSpec("F16", (shape.vocabulary, shape.hidden))}
    for layer in range(shape.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{norm}.weight"] = TensorSpec("F32", (shape.hidden,))
        for name, (rows, _) in shape.linears().items():
            if shape.bias and name[-6] in "qkv" and name.startswith("self_attn"):
                found[f"model.layers.{layer}.{name}.bias"] = TensorSpec("F32", (rows,))
    found["model.norm.weight"] = TensorSpec("F32", (shape.hidden,))
    return found


def quantiles(count: int) -> Array:
    """The middles of `count` equally likely slices of a normal distribution, ascending."""
    return np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)], np.float32)


INT8_RANGE = 3.0  # of standard deviations in int8 numbers


def codebook(spec: TensorSpec, suffix: str, scales: Array) -> Array:
    """One codebook tensor of any kind, known by its suffix, dtype and width. Raises: SystemExit for one that is new."""
    rows, width = spec.shape
    if suffix.startswith("lut"):
        if spec.dtype == "I8":
            numbers = np.clip(np.rint(quantiles(width) * 127 / INT8_RANGE), -127, 127).astype(np.int8)
            return np.repeat(numbers[None], rows, axis=0)
        return (scales[:, None] * quantiles(width)).astype(spec.numpy)
    if suffix == "scale":
        return (scales[:, None] * np.float32(INT8_RANGE / 127)).astype(np.float32)
    if suffix.startswith("affine"):  # scale and offset of an even grid out to 2.5 sigma
        step = 5 / ((1 << int(suffix.removeprefix("affine"))) - 1)
        return np.stack([scales * step, scales * -2.5], axis=1).astype(np.float32)
    if suffix.startswith("cells") and width in (26, 44):  # 16 centres, 16 nibbles of ladder - 1 (0 to 7), a step
        ends = quantiles(256).reshape(16, 16)
        half = (ends[:, -1] - ends[:, 0]) / 2 * 16 / 15  # of a cell; value = centre + step * ladder * 16 at its edge
        step = half.max() / 128
        ladder = np.clip(np.rint(half / (16 * step)), 1, 8).astype(np.uint8) - 1
        record = np.empty((rows, width), np.uint8)
        centres, steps = ends.mean(axis=1), (scales * step).astype("<f4")[:, None].view(np.uint8)
        record[:, -12 if width == 44 else -10 : -4 if width == 44 else -2] = ladder[::2] | ladder[1::2] << 4
        if width == 44:
            record[:, :32] = (scales[:, None] * centres).astype("<f2").view(np.uint8)
            record[:, 40:] = steps
        else:
            record[:, :16] = np.rint(centres * 127 / INT8_RANGE).astype(np.int8).view(np.uint8)
            record[:, 24:] = steps[:, 2:]  # BF16: the upper half
        return record
    raise SystemExit(f"codebook tensor {suffix} {spec} is new here: add its bytes to codebook()")


def write(shape: Shape, folder: Path, bits: tuple[int, ...], kind: str) -> int:
    """Writes the overlay; returns its bytes."""
    rng = np.random.default_rng(0)
    specs = {name: WeightSpec(name, size, bits, kind) for name, size in matrices(shape)}
    floats = plain(shape)
    layout = floats | {name: tensor for spec in specs.values() for name, tensor in spec.tensors("F16").items()}
    quantization = QuantizationConfig(bits, kind, specs, {"solver": "none: random bytes for speed measurements"})
    pool = np.frombuffer(rng.bytes(POOL_BYTES), np.uint8)
    with OverlayWriter(folder, layout, hf_config(shape) | {"quantization_config": quantization.to_dict()}) as writer:
        if writer.complete:
            return sum(tensor.nbytes for tensor in layout.values())
        for name, tensor in floats.items():
            if len(tensor.shape) == 2:
                values = rng.standard_normal(tensor.shape, dtype=np.float32).astype(np.float16)
            else:
                values = np.full(tensor.shape, name.endswith("norm.weight"), np.float32)
            writer.write(name, values)
        for spec in specs.values():
            if spec.columns % 8:
                raise SystemExit(f"{spec.name} has {spec.columns} columns: expected a multiple of 8, padding must be 0")
            for k in range(spec.planes):
                start = int(rng.integers(POOL_BYTES))
                piece = np.resize(np.roll(pool, start) if spec.plane_bytes > POOL_BYTES - start else pool[start:],
                                  spec.plane_bytes)  # fmt: skip
                writer.write(spec.plane_name(k), piece.reshape(spec.plane_spec.shape))
            scales = (rng.uniform(0.8, 1.2, spec.rows) / math.sqrt(spec.columns)).astype(np.float32)
            for name, part in spec.codebook_parts().items():
                writer.write(name, codebook(layout[name], part.suffix, scales))
        writer.finish()
    return sum(tensor.nbytes for tensor in layout.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", default="2-8", help="a range such as 2-8, or a list such as 3,4 (default 2-8)")
    parser.add_argument("--codebook", choices=sorted(CODEBOOKS), default="table")
    args = parser.parse_args()
    first, dash, last = args.bits.partition("-")
    bits = check_bits(tuple(range(int(first), int(last) + 1) if dash else map(int, args.bits.split(","))))
    start = time.perf_counter()
    size_bytes = write(SHAPES[args.shape], args.folder, bits, args.codebook)
    print(json.dumps({"folder": str(args.folder), "bytes": size_bytes, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()

"""Peak memory and time to quantize a large random-weight model, layer by layer.

    python benchmarks/quantize_large.py [--shape tinyllama-1.1b] [--work DIR] [--keep]

Writes a bfloat16 model of that shape with random weights, runs `everybit quantize --calibration none` in a process of
its own, and prints its peak resident memory (the kernel's own count), time and weights per second, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

SHAPES = {
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    },
}
LLAMA_3_1_8B_PARAMETERS = 6_979_321_856  # its linear layers: 32 x (2 x 4096^2 + 2 x 4096 x 1024 + 3 x 4096 x 14336)


def write_model(folder: Path, shape: str) -> None:
    """One safetensors shard a layer, so that writing needs little memory too."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tensor.shape
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for file, tensors in shards.items():
        data = {n: (torch.randn(s, generator=generator) * 0.02).to(torch.bfloat16) for n, s in tensors.items()}
        save_file(data, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--work", type=Path, help="folder for the model and the overlay (default: a temporary one)")
    parser.add_argument("--solver", default="tree")
    parser.add_argument("--keep", action="store_true", help="leave the files in --work")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.work))
    try:
        (work / "model").mkdir()
        write_model(work / "model", args.shape)
        command = [sys.executable, "-m", "everybit.cli.main", "quantize", str(work / "model"), str(work / "overlay")]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "--solver", args.solver, "--json"], check=True, stdout=subprocess.PIPE, text=True
        )
        seconds = time.perf_counter() - start
        peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        report = json.loads(done.stdout)
    finally:
        if not args.keep:
            shutil.rmtree(work)
    parameters = report["quantized_parameters"]
    result = {
        "shape": args.shape,
        "solver": args.solver,
        "quantized_parameters": parameters,
        "seconds": round(seconds, 1),
        "weights_per_s": round(parameters / seconds),
        "peak_bytes": peak_bytes,
        "scaled_to_8b_s": round(seconds * LLAMA_3_1_8B_PARAMETERS / parameters),
        "stored_bpw": report["stored_bpw"],
        "machine": platform.processor() or platform.machine(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
    }
    print(
        f"{args.shape}, solver {args.solver}: {parameters:,} parameters in {seconds:.0f} s, "
        f"peak resident memory {peak_bytes / 1e9:.2f} GB"
    )
    print(f"scaled by parameters to the linear layers of Llama-3.1-8B: {result['scaled_to_8b_s'] / 60:.1f} min")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""llama.cpp as a peer: makes random-weight GGUF files and serves them on the line protocol of protocol.py.

    PEER make tinyllama-1.1b out.gguf --type Q4_K [--threads 2]
    PEER serve out.gguf --threads 2

PEER is `/path/to/peer/bin/python benchmarks/peers/llama_cpp_peer.py`, with llama-cpp-python and gguf installed there,
not in everybit's environment. `make` writes `SHAPE-f16.gguf` beside the output (kept for the next type) and quantizes
it with `pure`: every matrix, embedding and head included, has the one type, where its columns allow (K-quants need
multiples of 256 and fall back on simpler types; `info` counts the types). Random weights take as long as trained ones.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from protocol import CONTEXT, PROMPT, SHAPES, Shape, serve, token

FILE_TYPES = {
    "Q2_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
    "Q3_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q5_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the file in llama.cpp's names; those of one dimension are norms and biases."""
    yield "token_embd.weight", (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        yield f"blk.{layer}.attn_norm.weight", (shape.hidden,)
        yield f"blk.{layer}.ffn_norm.weight", (shape.hidden,)
        for name, (rows, columns) in shape.linears().items():
            yield f"blk.{layer}.{NAMES[name]}.weight", (rows, columns)
            if shape.bias and NAMES[name] in ("attn_q", "attn_k", "attn_v"):
                yield f"blk.{layer}.{NAMES[name]}.bias", (rows,)
    yield "output_norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "output.weight", (shape.vocabulary, shape.hidden)


def write_float(shape: Shape, path: Path) -> None:
    """The f16 model: pieces of one pool of normal numbers, scaled to 1 / sqrt(K)."""
    writer = gguf.GGUFWriter(path, shape.family)
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")  # dummy tokens: the benchmark speaks in numbers
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, size in tensors(shape):
        dtype = np.dtype(np.float16 if len(size) == 2 else np.float32)
        writer.add_tensor_info(name, size, dtype, int(np.prod(size)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(1 << 24, dtype=np.float32)
    for name, size in tensors(shape):
        if len(size) == 1:
            writer.write_tensor_data(np.full(size, name.endswith("weight"), np.float32))
            continue
        scaled = (pool * size[1] ** -0.5).astype(np.float16)
        start, total = int(rng.integers(pool.size)), size[0] * size[1]
        writer.write_tensor_data(np.resize(np.roll(scaled, start), total).reshape(size))
    writer.close()


def make(shape: str, out: Path, kind: str, threads: int) -> None:
    """Writes `out`, and the f16 file beside it where it is not there yet."""
    source = out.parent / f"{shape}-f16.gguf"
    out.parent.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        part = source.with_suffix(".part")
        write_float(SHAPES[shape], part)
        part.rename(source)
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = threads, FILE_TYPES[kind], True
    part = out.with_suffix(".part")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), params):
        raise SystemExit(f"llama.cpp could not quantize {source} to {kind}: see its messages above")
    part.rename(out)


class Peer:
    """A loaded model, and a context for each number of sequences asked for."""

    def __init__(self, path: Path, threads: int, flash: int = -1, repack: bool = True) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers, params.use_extra_bufts = 0, repack
        self.path, self.threads, self.flash = path, threads, flash
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp could not load {path}: make it again with the make command")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.contexts: dict[int, object] = {}

    def empty(self, sequences: int) -> object:
        """A context of `sequences` with an empty cache."""
        if sequences not in self.contexts:
            params = llama_cpp.llama_context_default_params()  # f16 cache, micro-batches of 512
            params.n_ctx, params.n_batch, params.n_seq_max = CONTEXT * sequences, CONTEXT, sequences
            params.n_threads = params.n_threads_batch = self.threads
            params.flash_attn_type = self.flash
            self.contexts[sequences] = llama_cpp.llama_init_from_model(self.model, params)
        context = self.contexts[sequences]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        return context

    def run(self, context: object, cells: list[tuple[int, int]], every: bool) -> float:
        """Seconds from tokens to logits in memory, for (sequence, position) cells; logits of all or of the last."""
        batch = llama_cpp.llama_batch_init(len(cells), 0, 1)
        batch.n_tokens = len(cells)
        for i, (sequence, position) in enumerate(cells):
            batch.token[i] = token(position, sequence, self.vocabulary)
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = position, 1, sequence
            batch.logits[i] = every or i == len(cells) - 1
        start = time.perf_counter()
        failed = llama_cpp.llama_decode(context, batch)
        found = llama_cpp.llama_get_logits_ith(context, -1)
        seconds = time.perf_counter() - start
        llama_cpp.llama_batch_free(batch)
        if failed or not np.isfinite(np.ctypeslib.as_array(found, (self.vocabulary,))).all():
            raise ValueError(f"llama_decode of {len(cells)} tokens gave {failed} or logits that are not finite")
        return seconds

    def decode(self, steps: int, sequences: int) -> list[float]:
        """Seconds of each step after a short prompt and one step that is not counted."""
        context = self.empty(sequences)
        for sequence in range(sequences):
            self.run(context, [(sequence, position) for position in range(PROMPT)], False)
        places = range(PROMPT, PROMPT + steps + 1)
        return [self.run(context, [(s, place) for s in range(sequences)], True) for place in places][1:]

    def prefill(self, tokens: int) -> list[float]:
        """Seconds of one prompt into an empty cache."""
        return [self.run(self.empty(1), [(0, position) for position in range(tokens)], False)]

    def info(self) -> dict[str, object]:
        """Sizes; `bpw` and `read_bytes` are of what a token reads: not the embedding, unless it is the head as well."""
        found = gguf.GGUFReader(self.path).tensors
        tied = not any(t.name == "output.weight" for t in found)
        read = [t for t in found if tied or t.name != "token_embd.weight"]
        matrices = [t for t in read if len(t.shape) == 2]
        bits = 8 * sum(int(t.n_bytes) for t in matrices)
        return {
            "bytes": llama_cpp.llama_model_size(self.model),
            "n_params": llama_cpp.llama_model_n_params(self.model),
            "bpw": bits / sum(int(t.n_elements) for t in matrices),
            "read_bytes": sum(int(t.n_bytes) for t in read),
            "types": Counter(t.tensor_type.name for t in matrices),
            "version": llama_cpp.__version__,
            "system": llama_cpp.llama_print_system_info().decode(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("make")
    one.add_argument("shape", choices=SHAPES)
    one.add_argument("out", type=Path)
    one.add_argument("--type", choices=FILE_TYPES, required=True)
    one.add_argument("--threads", type=int, default=2)
    two = commands.add_parser("serve")
    two.add_argument("file", type=Path)
    two.add_argument("--threads", type=int, default=2)
    two.add_argument("--flash", type=int, default=-1, help="-1 llama.cpp's own choice (default), 0 off, 1 on")
    two.add_argument("--no-repack", action="store_true", help="keep the file's layout: sometimes faster in prefill")
    args = parser.parse_args()
    llama_cpp.llama_backend_init()
    if args.command == "make":
        make(args.shape, args.out, args.type, args.threads)
        return
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    peer = Peer(args.file, args.threads, args.flash, not args.no_repack)
    serve({"decode": peer.decode, "prefill": peer.prefill, "info": peer.info})


if __name__ == "__main__":
    sys.exit(main())

"""Train the small demo model that the repository ships: a Llama decoder on public-domain English prose.

    python scripts/train_demo_model.py --data DIR --out DIR [--minutes 100] [--hidden 384 --layers 6]

DATA holds `train.txt` or `train.txt.xz` and `valid.txt`, documents ending with a line `<|endoftext|>`.
The tokenizer is a byte-level BPE trained on the same text. Hidden matrices are trained with Muon, the
rest with AdamW; the learning rate is constant and then falls linearly to zero over the last third of the
time budget. A checkpoint is written every few minutes; the same command resumes after a kill.
OUT receives a Hugging Face folder (fp16 safetensors, tokenizer, model card).

Source: Muon is torch.optim.Muon (Jordan et al. 2024); trapezoid schedule as in Haegele et al. 2024 (2405.18392).
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"


def read_documents(path: Path) -> list[str]:
    raw = path.read_bytes()
    text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    return [doc.strip("\n") for doc in text.split(f"\n{END}\n") if doc.strip()]


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    paragraphs = (line for doc in documents for line in doc.split("\n\n"))
    tokenizer.train_from_iterator(paragraphs, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """All documents as one uint16 stream, each opened by the END token."""
    return np.concatenate([np.asarray(tokenizer.encode(doc).ids, dtype=np.uint16) for doc in documents])


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, stream: np.ndarray, text_bytes: int, context: int, share: float) -> float:
    """Bits per byte on the first `share` of `stream`, in windows of `context` tokens that overlap by one."""
    model.eval()
    count = int(len(stream) * share)
    total, scored = 0.0, 0
    for start in range(0, count - 1, context):
        ids = torch.from_numpy(stream[start : start + context + 1].astype(np.int64))[None]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1]).logits
        total += torch.nn.functional.cross_entropy(logits[0].float(), ids[0, 1:], reduction="sum").item()
        scored += ids.shape[1] - 1
    model.train()
    return total / math.log(2) / (scored / len(stream) * text_bytes)


def learning_rate_scale(progress: float) -> float:
    """Trapezoid: 2 % warm-up, flat, linear to zero over the last third."""
    return min(1.0, progress / 0.02, max(0.0, (1.0 - progress) * 3.0))


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path, record: dict[str, object], corpus: str) -> None:
    frozen = LlamaForCausalLM(model.config)
    frozen.load_state_dict(model.state_dict())
    frozen.half().save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=model.config.max_position_embeddings
    ).save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    parameters = sum(p.numel() for p in model.parameters())
    (out / "README.md").write_text(
        f"""---
license: cc0-1.0
language: en
library_name: transformers
---
# A {parameters / 1e6:.1f} M parameter Llama trained on public-domain prose

Made by `scripts/train_demo_model.py` as the demo model of everybit; good for showing how quality falls with
bit-width, not for writing. fp16, {model.config.num_hidden_layers} layers, hidden {model.config.hidden_size},
feed-forward {model.config.intermediate_size},
{model.config.num_attention_heads}/{model.config.num_key_value_heads} heads,
vocabulary {model.config.vocab_size} (byte-level BPE), context {model.config.max_position_embeddings}, tied head.

| | |
|---|---|
| data | {corpus} |
| steps x tokens | {record["step"]} x {record["batch_tokens"]} = {record["tokens"]:,} tokens |
| time | {record["minutes"]:.0f} minutes on {record["machine"]} |
| held-out bits per byte | {record["bits_per_byte"]:.4f} (whole validation split: books not in train) |
| weights licence | CC0 1.0 |
"""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=100.0, help="training time, over all resumed runs")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--lr-muon", type=float, default=0.02)
    parser.add_argument("--lr-adam", type=float, default=0.004)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", default="2 CPU cores")
    parser.add_argument("--corpus", default="Standard Ebooks prose (public domain / CC0), 72 books, 42 MB")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    work = args.out / "work"
    work.mkdir(exist_ok=True)
    packed = args.data / "train.txt.xz"
    train_documents = read_documents(packed if packed.exists() else args.data / "train.txt")
    valid_documents = read_documents(args.data / "valid.txt")
    valid_bytes = sum(len(doc.encode()) for doc in valid_documents)
    tokenizer_file = work / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(train_documents, args.vocab).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    if not (work / "train.npy").exists():
        np.save(work / "train.npy", encode(tokenizer, train_documents))
    train = np.load(work / "train.npy")
    valid = encode(tokenizer, valid_documents)
    print(f"train {len(train):,} tokens, valid {len(valid):,} tokens ({valid_bytes / len(valid):.2f} bytes each)")

    torch.manual_seed(args.seed)
    end = tokenizer.token_to_id(END)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=args.hidden,
            intermediate_size=args.ffn,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64,
            num_key_value_heads=args.hidden // 128,
            head_dim=64,
            vocab_size=args.vocab,
            max_position_embeddings=args.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
        )
    )
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=args.lr_muon, momentum=0.95, weight_decay=0.01)
    adam = torch.optim.AdamW(others, lr=args.lr_adam, betas=(0.9, 0.95), weight_decay=0.0)
    step, spent_s = 0, 0.0
    state_file = work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        step, spent_s = state["step"], state["spent_s"]

    budget_s = args.minutes * 60
    began = last_saved = time.monotonic() - spent_s
    order = np.random.default_rng(args.seed)
    starts_per_epoch = (len(train) - 1) // args.context
    order_epoch, permutation = -1, np.empty(0, np.int64)
    running = float("nan")
    while (spent_s := time.monotonic() - began) < budget_s:
        scale = learning_rate_scale(spent_s / budget_s)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = args.lr_muon * scale, args.lr_adam * scale
        rows = []
        for i in range(step * args.batch, (step + 1) * args.batch):
            epoch, place = divmod(i, starts_per_epoch)
            while order_epoch < epoch:
                permutation, shift = order.permutation(starts_per_epoch), int(order.integers(args.context))
                order_epoch += 1
            start = min(int(permutation[place]) * args.context + shift, len(train) - args.context - 1)
            rows.append(train[start : start + args.context + 1].astype(np.int64))
        ids = torch.from_numpy(np.stack(rows))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        if step % 20 == 0:
            now = time.monotonic() - began
            rate = step * args.batch * args.context / now
            print(f"step {step}  {now / 60:.1f} min  loss {running:.3f}  lr x{scale:.2f}  {rate:.0f} tok/s", flush=True)
        if time.monotonic() - last_saved > 300:
            last_saved = time.monotonic()
            temporary = work / "state.tmp"
            state = {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict()}
            torch.save({**state, "step": step, "spent_s": time.monotonic() - began}, temporary)
            temporary.rename(state_file)
            quick = bits_per_byte(model, valid, valid_bytes, args.context, 0.05)
            print(f"  held-out bits per byte (first 5 %): {quick:.4f}")

    tokens = step * args.batch * args.context
    record = {
        "step": step,
        "batch_tokens": args.batch * args.context,
        "tokens": tokens,
        "minutes": spent_s / 60,
        "bits_per_byte": bits_per_byte(model, valid, valid_bytes, args.context, 1.0),
        "machine": args.machine,
        "arguments": {k: str(v) for k, v in vars(args).items() if k not in ("data", "out")},
    }
    export(model, tokenizer, args.out, record, args.corpus)
    print(json.dumps(record))


if __name__ == "__main__":
    main()

"""A tokenizer for models of random weights: a token for each byte, and made-up words up to the vocabulary's size.

python benchmarks/peers/words.py FOLDER VOCABULARY     # writes FOLDER/tokenizer.json and tokenizer_config.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

END = "</s>"


def alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE (GPT-2), in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def tokens(vocabulary: int) -> list[str]:
    found = ["<s>", END, *alphabet(), "~~"]
    return [*found, *(f"Ġw{i}" for i in range(vocabulary - len(found)))]


def write(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {token: i for i, token in enumerate(tokens(vocabulary))}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[("~", "~")]))
    tokenizer.add_special_tokens(["<s>", END])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": END}))


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))

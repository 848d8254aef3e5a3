"""A tokenizer.json as GGUF's tokenizer keys.

    gpt2     byte-level BPE: tokens, merges, and the name by which llama.cpp knows how text is split before it
    llama    SentencePiece BPE: pieces with scores; a piece is merged the earlier, the higher its score

Source: gguf.constants (Keys.Tokenizer); llama.cpp, src/llama-vocab.cpp (names of the splits, ignore_merges).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from everybit.errors import SourceError
from everybit.formats.files import read_inside
from everybit.formats.jsontext import parse_object
from everybit.formats.tensors import is_text, show
from everybit.tokenizer import Tokenizer

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_REST_CASED = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)

# (the regex of the split, whether a word that is a token is taken whole) -> llama.cpp's name
SPLITS = {
    (f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}{_REST}", True): "llama-bpe",
    (f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}{_REST}", False): "dbrx",
    (f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{_REST}", False): "qwen2",
    (f"{_CASED % ('', '')}|\\p{{N}}{_REST_CASED}", True): "tekken",
    (f"{_CASED % ((_CONTRACTIONS + '?',) * 2)}|\\p{{N}}{{1,3}}{_REST_CASED}", False): "gpt-4o",
    ("gpt-2", False): "gpt-2",
    ("digits gpt-2", False): "smollm",
}
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_UNUSED = -1e6  # the score of a piece that no merge makes


def add_vocabulary(writer: Any, folder: Path, rows: int) -> None:
    """Adds the tokenizer in `folder` for a model with `rows` embeddings.

    Raises: SourceError where there is none, or one that llama.cpp has not; FormatError
    """
    tokenizer = Tokenizer.open(folder)
    where = f"{folder}/tokenizer.json"
    description = json.loads(tokenizer.to_json())
    model = description["model"]
    if model.get("type") != "BPE":
        raise _unfit(where, f"a {model.get('type')} tokenizer", "BPE")
    spaces = json.dumps(description["normalizer"], ensure_ascii=False)
    pieces = bool(model.get("byte_fallback")) or "\u2581" in spaces
    ids = dict(model["vocab"])
    added = {token["content"]: token for token in description["added_tokens"]}
    ids |= {content: token["id"] for content, token in added.items()}
    if max(ids.values(), default=0) >= rows:
        raise SourceError(
            f"{where}: token id {max(ids.values())} arrived, the model has {rows} embeddings: "
            "copy the tokenizer that belongs to the model"
        )
    tokens, types = _tokens(ids, added, rows, model.get("unk_token") if pieces else None, pieces)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges and not pieces:
        raise _unfit(where, "a byte-level tokenizer without merges", "those with one or more")
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else _split_name(description, where))
    writer.add_token_list(tokens)
    if pieces:
        _check_pieces(description, tokens, where)
        writer.add_token_scores(_scores(tokens, types, merges))
        writer.add_add_space_prefix(_adds_space(description))
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    _add_special(writer, tokenizer, description, folder, ids, where)


def _tokens(
    ids: dict[str, int], added: dict[str, Any], rows: int, unknown: str | None, pieces: bool
) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for content, number in ids.items():
        kind = TokenType.NORMAL
        if content == unknown:
            kind = TokenType.UNKNOWN
        elif content in added:
            kind = TokenType.CONTROL if added[content]["special"] else TokenType.USER_DEFINED
        elif pieces and _BYTE.fullmatch(content):
            kind = TokenType.BYTE
        tokens[number], types[number] = content, int(kind)
    return tokens, types


def _scores(tokens: list[str], types: list[int], merges: list[str]) -> list[float]:
    """The earlier the first merge that makes a piece, the higher; pieces that none makes are never merged."""
    from gguf import TokenType

    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        rank.setdefault(left + right, number)
    normal = int(TokenType.NORMAL)
    return [
        (-float(rank[t]) if t in rank else _UNUSED) if kind == normal else 0.0
        for t, kind in zip(tokens, types, strict=True)
    ]


def _check_pieces(description: dict[str, Any], tokens: list[str], where: str) -> None:
    known = set(tokens)
    if missing := [byte for byte in range(256) if f"<0x{byte:02X}>" not in known]:
        raise _unfit(where, f"no token for byte {missing[0]}", "SentencePiece tokenizers with all 256")
    for step in _steps(description["normalizer"]):
        replaces = step == {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        if not replaces and step != {"type": "Prepend", "prepend": "\u2581"}:
            raise _unfit(where, f"the normalizer {show(step)}", "those of Llama and Gemma")


def _adds_space(description: dict[str, Any]) -> bool:
    """Whether a text begins as if a space stood before it."""
    for step in (*_steps(description["normalizer"]), *_steps(description["pre_tokenizer"])):
        if step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never"):
            return True
    return False


def _split_name(description: dict[str, Any], where: str) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text into words."""
    if any(step["type"] != "NFC" for step in _steps(description["normalizer"])):
        raise _unfit(
            where, f"the normalizer {show(description['normalizer'])}", "byte-level tokenizers with none or NFC"
        )
    steps = _steps(description["pre_tokenizer"])
    rule, bytes_seen = "", False
    for step in steps:
        if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            rule += step["pattern"].get("Regex", "")
        elif step["type"] == "Digits" and step.get("individual_digits"):
            rule += "digits "
        elif step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            bytes_seen = True
            rule += "gpt-2" if step.get("use_regex", True) else ""
        else:
            rule += "?"
    name = SPLITS.get((rule, bool(description["model"].get("ignore_merges"))))
    if name is None or not bytes_seen:
        raise _unfit(where, f"the pre-tokenizer {show(description['pre_tokenizer'])}", ", ".join(SPLITS.values()))
    return name


def _add_special(
    writer: Any, tokenizer: Tokenizer, description: dict[str, Any], folder: Path, ids: dict[str, int], where: str
) -> None:
    settings = {
        name: parse_object(read_inside(folder, name), str(folder / name)) if (folder / name).is_file() else {}
        for name in ("special_tokens_map.json", "tokenizer_config.json")
    }
    named = {**settings["special_tokens_map.json"], **settings["tokenizer_config.json"]}

    def number(key: str) -> int | None:
        token = named.get(key)
        return ids.get(token["content"] if isinstance(token, dict) else token) if token else None

    before, after = _template(description, where)
    eos, ends = number("eos_token"), sorted(tokenizer.eos_ids)
    if ends and eos not in ends:
        eos = ends[0]
    if after not in (None, eos):
        raise _unfit(where, f"token {after} after every text", f"the end of a text, {eos}, there or nothing")
    ends = [one for one in (eos, *ends) if one is not None]
    special = {
        "bos": number("bos_token") if before is None else before,
        **dict(zip(("eos", "eot", "eom"), dict.fromkeys(ends), strict=False)),
        "unk": number("unk_token"),
        "pad": number("pad_token"),
    }
    for key, found in special.items():
        if found is not None:
            getattr(writer, f"add_{key}_token_id")(found)
    writer.add_add_bos_token(before is not None)
    writer.add_add_eos_token(after is not None)
    if template := _chat_template(folder, named):
        writer.add_chat_template(template)


def _template(description: dict[str, Any], where: str) -> tuple[int | None, int | None]:
    """The special tokens that begin and end every text, where there are such."""
    for step in _steps(description["post_processor"]):
        if step["type"] == "ByteLevel":
            continue
        parts = step.get("single", [])
        middle = next((i for i, part in enumerate(parts) if "Sequence" in part), -1)
        if step["type"] != "TemplateProcessing" or middle not in (0, 1) or len(parts) > middle + 2:
            raise _unfit(where, f"the post-processor {show(step)}", "at most one token before and one after a text")
        ids = {name: token["ids"] for name, token in step["special_tokens"].items()}
        named = [
            [part.get("SpecialToken", {}).get("id") for part in one] for one in (parts[:middle], parts[middle + 1 :])
        ]
        if any(len(ids.get(name, ())) != 1 for one in named for name in one):
            raise _unfit(where, f"the post-processor {show(step)}", "special tokens that stand for one id")
        begin, end = (ids[one[0]][0] if one else None for one in named)
        return begin, end
    return None, None


def _chat_template(folder: Path, named: dict[str, Any]) -> str | list[Any] | None:
    if (folder / "chat_template.jinja").is_file():
        return read_inside(folder, "chat_template.jinja").decode(errors="replace")
    found = named.get("chat_template")
    listed = [{"name": "default", "template": found}] if isinstance(found, str) else found or []
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        listed = [{}]
    if not all(isinstance(one.get(key), str) and is_text(one[key]) for one in listed for key in ("name", "template")):
        raise SourceError(
            f"{folder}/tokenizer_config.json: chat_template {show(found)} arrived, expected text or a list of names "
            "and templates: correct it, or drop it"
        )
    return found or None


def _steps(found: Any) -> list[dict[str, Any]]:
    """The parts of a Sequence, or the one step that it is, or none."""
    if not found:
        return []
    if found["type"] != "Sequence":
        return [found]
    inner = next(value for name, value in found.items() if name != "type")
    return [step for one in inner for step in _steps(one)]


def _unfit(where: str, what: str, has: str) -> SourceError:
    return SourceError(f"{where}: {what} arrived, GGUF export has {has}: export to safetensors instead")

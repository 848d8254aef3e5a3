"""Text to token ids and back, from a model folder's tokenizer.json; the same ids as transformers' AutoTokenizer.

    tokenizer = Tokenizer.open("overlay")
    ids = tokenizer.encode("Once upon a time")
    stream = tokenizer.stream(ids)
    for token in ...: print(stream.add(token), end="")

As in transformers 5, whether a BOS or EOS is added is the post-processor's business alone: `add_bos_token` and
`add_eos_token` of tokenizer_config.json count for nothing beside a tokenizer.json. Special tokens that only the
configuration knows are added to the vocabulary; truncation and padding are switched off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from everybit.errors import FormatError, SourceError, reason
from everybit.formats.files import read_inside
from everybit.formats.jsontext import parse_object

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED = ("extra_special_tokens", "additional_special_tokens")
_UNDECODABLE = "\ufffd"
_MOST_WAITING = 32  # tokens


class Tokenizer:
    """The tokenizer of a model folder. Make one with `Tokenizer.open`.

    `eos_ids`: the tokens that end a text, by generation_config.json, or else config.json. `vocabulary`: how many tokens
    it knows (a model may have more rows than that).
    """

    def __init__(self, backend: Backend, eos_ids: frozenset[int] = frozenset()) -> None:
        self._backend = backend
        self.eos_ids = eos_ids
        self.vocabulary: int = backend.get_vocab_size()

    @classmethod
    def open(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer in `folder`; reads JSON files only, and runs no code from them.

        Raises: SourceError (no tokenizer.json, or one that cannot be used), FormatError (another file is broken)
        """
        folder = Path(folder).expanduser()
        if not (folder / "tokenizer.json").is_file():
            raise SourceError(
                f"{folder} has no tokenizer.json: copy it from the original model, or make it from the model's own "
                "files with transformers: AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)"
            )
        try:
            backend = Backend.from_buffer(read_inside(folder, "tokenizer.json"))
        except FormatError as error:
            raise SourceError(str(error)) from None
        except BaseException as error:  # the library raises bare Exceptions, and panics that are not even those
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            raise SourceError(f"{folder}/tokenizer.json cannot be used ({reason(error)}): download it again") from None
        backend.no_truncation()
        backend.no_padding()
        settings = {
            name: parse_object(read_inside(folder, file), str(folder / file)) if (folder / file).is_file() else {}
            for name, file in (
                ("tokenizer", "tokenizer_config.json"),
                ("tokens", "special_tokens_map.json"),
                ("generation", "generation_config.json"),
                ("model", "config.json"),
            )
        }
        try:
            known = {str(token.content) for token in backend.get_added_tokens_decoder().values()}
            backend.add_tokens(list(_added(settings, known)))
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise FormatError(
                f"{folder}/tokenizer_config.json or special_tokens_map.json holds a token that is none "
                f"({reason(error)}): download it again"
            ) from None
        return cls(backend, _eos_ids(settings, folder))

    def longest(self) -> int:
        """Characters of the longest token; a token of a text has no more, but for what a normalizer takes away."""
        return max(map(len, self._backend.get_vocab()), default=1)

    def to_json(self) -> str:
        """As a tokenizer.json, with what other files add to it."""
        return str(self._backend.to_str())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, with the special tokens that the post-processor adds."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 come as U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """Decodes one token at a time what follows `context` (the prompt)."""
        return TextStream(self, context)


class TextStream:
    """Text of tokens as they come. Joined, the pieces are what decoding everything at once adds to the context's text.

    A piece ends where a character does: bytes of a character that is not complete yet are held back.

    Cost: two decodes of the tokens since the last piece but one, usually two or three of them.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # A decoder may strip the space before a text's first word, so a token is never decoded without one before it.
        self._before = list(context)  # already in the pieces (or the prompt)
        self._waiting: list[int] = []
        self._before_text = tokenizer.decode(self._before)

    def add(self, token: int) -> str:
        """The text that `token` completes, often of itself alone; empty while a character is incomplete."""
        self._waiting.append(token)
        text = self._tokenizer.decode(self._before + self._waiting)
        if text.endswith(_UNDECODABLE) or len(text) <= len(self._before_text):
            return self._undecodable(text) if len(self._waiting) > _MOST_WAITING else ""
        piece = text[len(self._before_text) :]
        self._before, self._waiting = self._waiting, []
        self._before_text = self._tokenizer.decode(self._before)
        return piece

    def _undecodable(self, text: str) -> str:
        """Of bytes that are no character for long, all but an end that may be one; else their number is squared."""
        left, right = self._waiting[:-4], self._waiting[-4:]
        piece = self._tokenizer.decode(self._before + left)[len(self._before_text) :]
        left_text = self._tokenizer.decode(left)
        rest = self._tokenizer.decode(left + right)[len(left_text) :]
        if not piece or self._before_text + piece + rest != text:
            return ""
        self._before, self._before_text, self._waiting = left, left_text, right
        return piece

    def finish(self) -> str:
        """What was held back, its undecodable bytes as U+FFFD."""
        text = self._tokenizer.decode(self._before + self._waiting)
        waiting, self._waiting = self._waiting, []
        if text.startswith(self._before_text):
            return text[len(self._before_text) :]
        return self._tokenizer.decode(waiting)  # a run of bytes that as a whole is no text any more


def _added(settings: Mapping[str, Mapping[str, Any]], known: set[str]) -> Iterator[AddedToken]:
    """What the configuration files add to the vocabulary, or change in it, in the order in which transformers does."""
    config = dict(settings["tokenizer"])
    if "added_tokens_decoder" in config:
        for _, value in sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0])):
            token = _token(value)
            known = known | {token.content}
            yield token
    else:
        config |= settings["tokens"]
    named = [config[key] for key in _NAMED if config.get(key)]
    own = [value for key, value in config.items() if key.endswith("_token") and key not in _NAMED and _is_token(value)]
    listed: Any = next((config[key] for key in _LISTED if config.get(key)), [])
    for value in [*named, *own, *(listed.values() if isinstance(listed, dict) else listed)]:
        token = _token(value, special=True)
        if token.content not in known:
            yield token


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "content" in value)


def _token(value: Any, special: bool = False) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=special)
    fields = {key: value[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in value}
    token = AddedToken(value["content"], **fields)
    token.special = special or token.special
    return token


def _eos_ids(settings: Mapping[str, Mapping[str, Any]], folder: Path) -> frozenset[int]:
    text_config = settings["model"].get("text_config")
    for found in (
        settings["generation"].get("eos_token_id"),
        settings["model"].get("eos_token_id"),
        text_config.get("eos_token_id") if isinstance(text_config, Mapping) else None,
    ):
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(one) is int and one >= 0 for one in ids):
            raise FormatError(f"{folder}: eos_token_id is {found!r}, expected token ids: correct it in its config")
        return frozenset(ids)
    return frozenset()

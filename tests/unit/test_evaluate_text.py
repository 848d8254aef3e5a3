"""The window protocol: documents, cuts, what is scored, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from everybit.errors import SourceError
from everybit.evaluate import context_length, read_documents, split_documents, windows


class Bytes:
    """A tokenizer of one token per byte after a BOS of 0."""

    def encode(self, text: str, /) -> list[int]:
        return [0, *(b + 1 for b in text.encode())]

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> str:
        return bytes(i - 1 for i in ids if i).decode("utf-8", errors="replace")


def text_of(ids: list[int]) -> str:
    return "".join(chr(i - 1) if i else "^" for i in ids)


def test_documents_end_at_separator_lines_only() -> None:
    text = "one\ntwo\n<|endoftext|>\n \n<|endoftext|>\r\nthree <|endoftext|> still\n"
    assert split_documents(text) == ["one\ntwo", "three <|endoftext|> still\n"]


def test_windows_do_not_overlap_and_score_all_but_their_first_token() -> None:
    cut = windows(Bytes(), ["abcdefg", "xy"], context=4)
    assert [text_of(w) for w in cut.ids] == ["^abc", "defg", "^xy"]
    assert (cut.tokens, cut.text_bytes) == (3 + 3 + 2, 3 + 3 + 2)


def test_truncate_keeps_the_first_window_of_each_document() -> None:
    assert [text_of(w) for w in windows(Bytes(), ["abcdefg", "xy"], context=4, truncate=True).ids] == ["^abc", "^xy"]


def test_a_last_window_of_one_token_is_dropped() -> None:
    assert [text_of(w) for w in windows(Bytes(), ["abcd"], context=4).ids] == ["^abc"]


@pytest.mark.parametrize("limit", range(1, 9))
def test_max_tokens_is_exact(limit: int) -> None:
    assert windows(Bytes(), ["abcdefg", "xy", "z"], context=4, max_tokens=limit).tokens == limit


def test_bytes_of_scored_text_are_utf8() -> None:
    assert windows(Bytes(), ["né"], context=9).text_bytes == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b" \n<|endoftext|>\n", "16 bytes and no text"),
        (b"ab\xffc", "byte 0xff at offset 2 is not UTF-8"),
        (b"\xef\xbb\xbfab\xe9", "byte 0xe9 at offset 5 is not UTF-8"),
        ("text".encode("utf-16"), "byte 0xff at offset 0 is not UTF-8"),
    ],
)
def test_files_that_are_no_text_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_documents(tmp_path / "t.txt")


def test_absent_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file; expected a UTF-8 text file"):
        read_documents(tmp_path / "absent")
    with pytest.raises(SourceError, match="a folder; expected"):
        read_documents(tmp_path)


def test_text_without_a_scorable_token_is_refused() -> None:
    with pytest.raises(SourceError, match="too short"):
        windows(SimpleBos(), ["a"], context=8)


class SimpleBos(Bytes):
    """Every text is one token."""

    def encode(self, text: str, /) -> list[int]:
        return [0]


def test_context_is_the_models_own_up_to_2048() -> None:
    assert context_length({"max_position_embeddings": 512}) == 512
    assert context_length({"n_positions": 512}) == 512  # GPT-2's word for it
    assert context_length({"text_config": {"max_position_embeddings": 512}}) == 512
    assert context_length({"max_position_embeddings": 131072}) == 2048
    assert context_length({}) == 2048
    assert context_length({"max_position_embeddings": 131072}, 4096) == 4096
    with pytest.raises(SourceError, match="beyond this model's 512"):
        context_length({"max_position_embeddings": 512}, 513)
    with pytest.raises(SourceError, match="nothing to score"):
        context_length({"max_position_embeddings": 512}, 1)

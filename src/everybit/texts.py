"""Text files: UTF-8, documents ended by lines equal to `<|endoftext|>`. Read the same way for every purpose."""

from __future__ import annotations

from pathlib import Path

from everybit.errors import SourceError

SEPARATOR = "<|endoftext|>"


def read_documents(path: str | Path) -> list[str]:
    """The documents of a UTF-8 text file, split at lines that are `<|endoftext|>`.

    Raises: SourceError when the file is absent, empty, blank or not UTF-8 (with the offset of the first bad byte)
    """
    path = Path(path)
    if not path.is_file():
        raise SourceError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; expected a UTF-8 text file")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        raise SourceError(
            f"{path}: byte 0x{raw[offset]:02x} at offset {offset} is not UTF-8 ({error.reason}); "
            "expected UTF-8 text: convert it first, for example with iconv -t UTF-8"
        ) from error
    documents = split_documents(text)
    if not documents:
        what = "an empty file" if not raw else f"{len(raw)} bytes and no text"
        raise SourceError(f"{path}: {what}; expected UTF-8 text")
    return documents


def split_documents(text: str) -> list[str]:
    """The documents of `text`, which lines equal to `<|endoftext|>` end; blank ones are dropped."""
    documents: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.removesuffix("\r") == SEPARATOR:
            documents.append([])
        else:
            documents[-1].append(line)
    joined = ("\n".join(lines) for lines in documents)
    return [document for document in joined if document.strip()]

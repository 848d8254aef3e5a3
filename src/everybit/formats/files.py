"""Opening files of a folder nobody vouches for: plain files, inside the folder, and nothing else.

A Hugging Face hub cache is the one exception: `snapshots/<revision>/<file>` links to `blobs/<hash>` two levels up.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from everybit.errors import FormatError
from everybit.formats.tensors import show

JSON_BYTES_LIMIT = 100_000_000  # the header limit of safetensors, kept for config.json and the index too


def open_inside(folder: Path, name: str) -> BinaryIO:
    """Opens `folder/name` for reading; `name` is one plain file name, and the file lies where the folder does.

    Raises: FormatError
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise FormatError(
            f"{folder}: the file name {show(name)} arrived, expected a plain name inside the folder: download it again"
        )
    path, home = folder / name, Path(os.path.realpath(folder))
    target = Path(os.path.realpath(path))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if target.parent != home and (blobs is None or target.parent != blobs):
        raise FormatError(f"{path} links to {target}, outside the folder: replace the link by the file itself")
    # O_NONBLOCK: a named pipe must not hang the reader before fstat can refuse it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(target, flags)
    except FileNotFoundError:
        raise FormatError(f"{path} is missing: download the folder again") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be opened ({error.strerror}): make it readable") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{path} is not a regular file: download it again")
    return os.fdopen(descriptor, "rb")


def read_inside(folder: Path, name: str) -> bytes:
    """The bytes of a small (JSON) file of the folder.

    Raises: FormatError
    """
    with open_inside(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > JSON_BYTES_LIMIT:
            raise FormatError(
                f"{folder / name} has {size} bytes, expected at most {JSON_BYTES_LIMIT}: download it again"
            )
        return file.read(JSON_BYTES_LIMIT)

"""The tensors of a file written by `torch.save`, read without torch and without running what a pickle asks for.

Such a file is a zip archive of one pickle and, beside it, the bytes of every storage. A pickle is a program; this one
may name what a dictionary of tensors needs, and nothing else: any other name ends the reading before anything of that
name is imported or called.
Source: Python's documentation of pickle, "Restricting Globals"; the layout as torch 2.13 writes it
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from everybit.errors import SourceError, reason
from everybit.formats import TensorSpec
from everybit.formats.files import JSON_BYTES_LIMIT, open_inside
from everybit.formats.tensors import show

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    numbers: int


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor lies: `offset` and `strides` count numbers of its storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape."""
        return TensorSpec(self.storage.dtype, self.shape)


class TorchFile:
    """An opened file of tensors. `tensors` by name, in the order of the file; the bytes are read by `read`.

    Raises: FormatError (no plain file of the folder), SourceError (not such a file, or one with anything but tensors)
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        self._file: BinaryIO = open_inside(folder, name)
        try:
            self._zip = self._open()
            self._members = self._list()
            self.tensors = self._load()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self._file)
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise SourceError(
                f"{self.path} is no zip archive ({reason(error)}), expected what torch.save writes from torch 1.6 on: "
                "download it again, or save it again with a newer torch"
            ) from None

    def _list(self) -> dict[str, zipfile.ZipInfo]:
        """The members by name, without the folder that all lie in. Raises: SourceError"""
        roots = {name.partition("/")[0] for name in self._zip.namelist()}
        if len(roots) != 1:
            raise SourceError(
                f"{self.path} holds {len(roots)} folders, expected that of one torch.save: download it again"
            )
        return {info.filename.partition("/")[2]: info for info in self._zip.infolist()}

    def _load(self) -> dict[str, TensorRef]:
        data = self._member("data.pkl")
        if "byteorder" in self._members and self._member("byteorder") != b"little":
            raise SourceError(f"{self.path} is not little-endian: save it again on another machine")
        try:
            found = _Unpickler(BytesIO(data)).load()
        except Exception as error:  # a broken pickle raises nearly anything
            raise SourceError(
                f"{self.path}: {reason(error)}; expected a dictionary of tensors and nothing else: nothing was run, do "
                "not open this file with other programs unless you trust it"
            ) from None
        if not isinstance(found, dict):
            raise SourceError(f"{self.path} holds a {type(found).__name__}, expected a dictionary of tensors")
        for name, tensor in found.items():
            if not isinstance(name, str) or not isinstance(tensor, TensorRef):
                raise SourceError(
                    f"{self.path}: {show(name)} is a {type(tensor).__name__}, expected a name with a tensor: save the "
                    "state_dict alone"
                )
            self._find(*_storage_member(tensor))
        return dict(found)

    def read(self, name: str) -> NDArray[Any]:
        """One tensor; BF16 comes as uint16. Cost: memory of its storage. Raises: SourceError"""
        ref = self.tensors[name]
        data = self._member(*_storage_member(ref))
        numbers = np.frombuffer(data, ref.spec.numpy)[ref.offset :]
        steps = [stride * ref.spec.itemsize for stride in ref.strides]
        return np.lib.stride_tricks.as_strided(numbers, ref.shape, steps, writeable=False)

    def _member(self, name: str, nbytes: int | None = None) -> bytes:
        """The bytes of a member. Raises: SourceError"""
        info = self._find(name, nbytes)
        try:
            return self._zip.read(info)
        except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, EOFError) as error:
            raise SourceError(
                f"{self.path}: {show(name)} cannot be read ({reason(error)}): download it again"
            ) from None

    def _find(self, name: str, nbytes: int | None = None) -> zipfile.ZipInfo:
        """A member of `nbytes`, or of as many as a config.json may have. Raises: SourceError"""
        info = self._members.get(name)
        most = JSON_BYTES_LIMIT if nbytes is None else nbytes
        found = -1 if info is None or info.compress_type != zipfile.ZIP_STORED else info.file_size
        if info is None or not (most if nbytes is not None else 0) <= found <= most:
            raise SourceError(
                f"{self.path}: {show(name)} has {'no' if found < 0 else found} plain bytes, expected "
                f"{'at most ' * (nbytes is None)}{most}: download it again"
            )
        return info

    def close(self) -> None:
        """Closes the file."""
        self._zip.close()
        self._file.close()

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Rebuild:
    """A view on a storage. Without attributes, for a pickle may set them."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorRef:
        whole = all(_is_count(one) for one in (offset, *shape, *strides))
        if not isinstance(storage, _Storage) or not whole or len(shape) != len(strides):
            raise SourceError(f"its pickle makes a tensor of shape {show(shape)} and strides {show(strides)}")
        TensorSpec(storage.dtype, tuple(shape))  # refuses shapes that no file can hold
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if max(last + 1, math.prod(shape)) > storage.numbers:  # the product: strides of 0 repeat without end
            raise SourceError(f"a tensor {show(shape)}, strides {show(strides)}, passes its {storage.numbers} numbers")
        return TensorRef(storage, offset, tuple(shape), tuple(strides))


class _Unpickler(pickle._Unpickler):  # the one in Python: the one in C sizes its memo by the largest number it is given
    """Knows dictionaries, storages and tensors; of those only where they lie."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise SourceError(f"its pickle asks for {show(module)} {show(name)}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numbers = pid
        if kind != "storage" or dtype not in STORAGES.values() or not _is_count(numbers):
            raise SourceError(f"its pickle refers to {show(pid)}")
        return _Storage(dtype, str(key), numbers)


def _storage_member(ref: TensorRef) -> tuple[str, int]:
    return f"data/{ref.storage.key}", ref.storage.numbers * ref.spec.itemsize


def _is_count(number: object) -> bool:
    return type(number) is int and number >= 0

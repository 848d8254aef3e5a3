"""The tensors of a file written by `torch.save`, read without torch and without running what a pickle asks for.

Such a file is a zip archive of one pickle and, beside it, the bytes of every storage. A pickle is a program; of its
language this reader has what `torch.save` writes for a dictionary of tensors, and nothing else: no other name, no other
call, no attribute set, no list, no key but text. The first other instruction ends the reading.
Source: Python's pickletools (the instructions); the layout as torch 2.13 writes it
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
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
DTYPES = frozenset(STORAGES.values())


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    numbers: int


@dataclass(frozen=True, slots=True)
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
            found = _load_pickle(data)
        except Exception as error:  # a broken pickle raises nearly anything
            raise SourceError(
                f"{self.path}: {reason(error)}; expected a dictionary of tensors and nothing else: nothing was run, do "
                "not open this file with other programs unless you trust it"
            ) from None
        if not isinstance(found, dict):
            raise SourceError(f"{self.path} holds a {type(found).__name__}, expected a dictionary of tensors")
        for name, tensor in found.items():
            if not isinstance(tensor, TensorRef):
                raise SourceError(
                    f"{self.path}: {show(name)} is a {type(tensor).__name__}, expected a tensor: save the state_dict "
                    "alone"
                )
            self._find(*_storage_member(tensor))
        return dict(found)

    def read(self, name: str) -> NDArray[Any]:
        """One tensor; BF16 comes as uint16. Cost: memory of its storage. Raises: SourceError"""
        ref = self.tensors[name]
        _require_inside(ref)  # as_strided checks nothing
        data = self._member(*_storage_member(ref))
        numbers = np.frombuffer(data, ref.spec.numpy)[ref.offset :]
        # A stride beyond the storage is that of a size of 0 or 1, never taken, and may be more than numpy can hold.
        steps = [min(stride, ref.storage.numbers) * ref.spec.itemsize for stride in ref.strides]
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


def _load_pickle(data: bytes) -> Any:
    """What the program in `data` leaves: dictionaries, text, whole numbers, tuples and tensors. Hashes text alone.

    Raises: SourceError for an instruction that torch.save does not use here; nearly anything for a broken program
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def taken(begin: int) -> tuple[Any, ...]:
        if len(stack) + min(begin, 0) < 0:
            raise SourceError("its pickle takes more than it has")
        found = tuple(stack[begin:])
        del stack[begin:]
        return found

    program: Iterator[tuple[pickletools.OpcodeInfo, Any, Any]] = pickletools.genops(data)
    for instruction, argument, _ in program:
        name = instruction.name
        if name in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"):
            stack.append(argument)
        elif name in ("NEWTRUE", "NEWFALSE"):
            stack.append(name == "NEWTRUE")
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(taken(-int(name[-1])))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(taken(marks.pop()))
        elif name in ("SETITEM", "SETITEMS"):
            items = taken(-2 if name == "SETITEM" else marks.pop())
            _set_items(stack[-1], items)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_find_global(argument))
        elif name == "BINPERSID":
            stack.append(_storage(*taken(-1)))
        elif name == "REDUCE":
            stack.append(_call(*taken(-2)))
        elif name == "BUILD":  # of a state_dict's _metadata, which is dropped
            taken(-1)
            if type(stack[-1]) is not dict:
                raise SourceError(f"its pickle sets attributes of a {type(stack[-1]).__name__}")
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise SourceError(f"its pickle has the instruction {name}")
    raise SourceError("its pickle has no end")


def _find_global(name: str) -> Any:
    """`name` is the module and the name in it, a space between."""
    if name == "collections OrderedDict":
        return dict
    if name == "torch._utils _rebuild_tensor_v2":
        return _rebuild
    module, _, kind = name.partition(" ")
    if module == "torch" and kind in STORAGES:
        return STORAGES[kind]
    raise SourceError(f"its pickle asks for {show(name)}")


def _call(function: Any, arguments: Any) -> Any:
    if function is dict and arguments == ():
        return {}
    if function is _rebuild and type(arguments) is tuple and len(arguments) >= 4:
        return _rebuild(*arguments[:4])
    raise SourceError(f"its pickle calls a {type(function).__name__} with a {type(arguments).__name__}")


def _set_items(target: Any, items: tuple[Any, ...]) -> None:
    """`items` alternates keys and values."""
    if type(target) is not dict or len(items) % 2 or any(type(key) is not str for key in items[::2]):
        raise SourceError("its pickle sets what is no item of a dictionary named by text")
    target.update(zip(items[::2], items[1::2], strict=True))


def _storage(pid: Any) -> _Storage:
    kinds = [type(one) for one in pid] if type(pid) is tuple else []
    if kinds != [str, str, str, str, int] or pid[0] != "storage" or pid[1] not in DTYPES or pid[4] < 0:
        raise SourceError(f"its pickle refers to {show(pid)}")
    return _Storage(pid[1], pid[2], pid[4])


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any) -> TensorRef:
    flat = type(shape) is type(strides) is tuple and all(_is_count(one) for one in (offset, *shape, *strides))
    if not isinstance(storage, _Storage) or not flat or len(shape) != len(strides):
        raise SourceError(f"its pickle makes a tensor of shape {show(shape)} and strides {show(strides)}")
    TensorSpec(storage.dtype, shape)  # refuses shapes that no file can hold
    ref = TensorRef(storage, offset, shape, strides)
    _require_inside(ref)
    return ref


def _require_inside(ref: TensorRef) -> None:
    """Refuses a tensor that passes its storage. Raises: SourceError"""
    last = ref.offset + sum((size - 1) * stride for size, stride in zip(ref.shape, ref.strides, strict=True))
    numbers = ref.storage.numbers
    if max(last + 1, math.prod(ref.shape)) > numbers:  # the product: strides of 0 repeat without end
        raise SourceError(f"a tensor {show(ref.shape)}, strides {show(ref.strides)}, passes its {numbers} numbers")


def _storage_member(ref: TensorRef) -> tuple[str, int]:
    return f"data/{ref.storage.key}", ref.storage.numbers * ref.spec.itemsize


def _is_count(number: object) -> bool:
    return type(number) is int and number >= 0

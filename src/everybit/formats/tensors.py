"""What a stored tensor is: its dtype, shape and size. The dtypes are those of safetensors in whole bytes."""

from __future__ import annotations

import math
import reprlib
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# safetensors dtype -> the little-endian numpy dtype of a view. Those numpy lacks come as unsigned integers.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}

MAX_DIMS = 32  # numpy 1.x holds no more
MAX_BYTES = 2**63 - 1  # what a file offset can address


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's safetensors dtype name and shape.

    Raises: ValueError for an unknown dtype or a shape no file can hold (readers catch it and name the tensor)
    """

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {show(self.dtype)} is unknown, expected one of {', '.join(DTYPES)}")
        if len(self.shape) > MAX_DIMS:
            raise ValueError(f"the shape has {len(self.shape)} dimensions, expected at most {MAX_DIMS}")
        if any(size < 0 for size in self.shape):
            raise ValueError(f"shape {show(list(self.shape))} has a negative size")
        # Zero-sized dimensions are left out of the product: numpy refuses [0, 2^62, 2^62] although it holds nothing.
        if math.prod(size for size in self.shape if size) * self.itemsize > MAX_BYTES:
            raise ValueError(f"shape {show(list(self.shape))} of {self.dtype} overflows 2^63 bytes")

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype of a view on this tensor (BF16 is uint16)."""
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def from_bf16(stored: NDArray[np.uint16]) -> NDArray[np.float32]:
    """BF16, the upper half of a float32, as float32."""
    return (stored.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The nearest BF16 (ties to even) of finite numbers, little-endian; beyond the largest, the largest."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(rounded & 0x7F80 == 0x7F80, rounded - 1, rounded).astype("<u2")


def is_tensor_name(name: str) -> bool:
    """Whether a file can hold a tensor of that name: Unicode text, and not the key of the metadata."""
    return bool(name) and name != "__metadata__" and is_text(name)


def is_text(text: str) -> bool:
    """Whether a string can be encoded: JSON escapes may hold half a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def show(value: object, limit: int = 80) -> str:
    """`value` as one short printable line, for error messages about hostile input. Of what nests deeper or has more
    parts than fit anyway, the rest is left out: shared parts could make it endless."""
    try:
        text = _SHORT.repr(value).encode("ascii", "backslashreplace").decode()
    except (ValueError, RecursionError):  # integers past Python's digit limit
        return f"<{type(value).__name__} too large to print>"
    return text if len(text) <= limit else f"{text[: limit - 20]}... ({len(text)} characters)"


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 4
_SHORT.maxtuple = _SHORT.maxlist = _SHORT.maxdict = _SHORT.maxset = 12
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = sys.maxsize

"""A quantized weight: which tensors it consists of and how many bytes each precision reads."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from everybit.errors import FormatError, PrecisionError, ShapeError
from everybit.formats.codebook import MAX_BITS, MIN_BITS, Codebook, Part
from everybit.formats.codebooks import CODEBOOKS
from everybit.formats.tensors import MAX_BYTES, TensorSpec, is_tensor_name, show

ALL_BITS = tuple(range(MIN_BITS, MAX_BITS + 1))


@dataclass(frozen=True)
class WeightSpec:
    """One quantized parameter of the model, stored output-first.

    Shapes: shape [N, K] or [E, N, K]; `transposed` says the model's own parameter has the last two axes swapped
    Raises: ShapeError, PrecisionError, FormatError (codebook kind)
    """

    name: str
    shape: tuple[int, ...]
    bits: tuple[int, ...] = ALL_BITS
    codebook: str = "table"
    transposed: bool = False

    def __post_init__(self) -> None:
        if not is_tensor_name(self.name):
            raise FormatError(f"weight name {show(self.name)} arrived, expected the parameter's name in the model")
        if len(self.shape) not in (2, 3) or not all(type(size) is int and size > 0 for size in self.shape):
            raise ShapeError(
                f"weight {show(self.name)}: shape {show(self.shape)} arrived, "
                "expected [N, K] or [E, N, K] of positive integers"
            )
        if math.prod(self.shape) > MAX_BYTES:
            raise ShapeError(f"weight {show(self.name)}: shape {show(self.shape)} is larger than any file can hold")
        check_bits(self.bits, f"weight {show(self.name)}: bits")
        if self.codebook not in CODEBOOKS:
            raise FormatError(
                f"weight {show(self.name)}: codebook {show(self.codebook)} is unknown, "
                f"expected one of {', '.join(CODEBOOKS)}: upgrade everybit or fix the name"
            )

    @property
    def planes(self) -> int:
        """Stored bit-planes: as many as the highest precision has bits."""
        return self.bits[-1]

    @property
    def rows(self) -> int:
        """E * N."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """K."""
        return self.shape[-1]

    @property
    def parameters(self) -> int:
        """E * N * K."""
        return math.prod(self.shape)

    @property
    def book(self) -> Codebook:
        """The codebook kind."""
        return CODEBOOKS[self.codebook]

    @property
    def plane_spec(self) -> TensorSpec:
        """What one stored plane is: eight weights a byte, rows padded to whole bytes."""
        return TensorSpec("U8", (*self.shape[:-1], -(-self.columns // 8)))

    @property
    def plane_bytes(self) -> int:
        """Bytes of one plane."""
        return self.plane_spec.nbytes

    def plane_name(self, plane: int) -> str:
        """The tensor of plane `plane`, 0 the most significant."""
        return f"{self.name}_plane{plane}"

    def codebook_name(self, part: Part) -> str:
        """The tensor of one part of the codebook."""
        return f"{self.name}_{part.suffix}"

    def codebook_names(self, bits: int) -> dict[str, str]:
        """The tensors of the codebook that precision `bits` reads: suffix -> name."""
        return {part.suffix: self.codebook_name(part) for part in self.book.parts(bits)}

    def codebook_parts(self) -> dict[str, Part]:
        """Every tensor of the codebook by name, from the fewest bits; one that precisions share is there once."""
        return {self.codebook_name(part): part for bits in self.bits for part in self.book.parts(bits)}

    def tensors(self, lut_dtype: str = "F16") -> dict[str, TensorSpec]:
        """Every tensor of this weight: planes from the most significant, then codebooks from the fewest bits.

        `lut_dtype` is used where the codebook kind leaves a choice (tables: F16 or F32).
        """
        found = {self.plane_name(plane): self.plane_spec for plane in range(self.planes)}
        for name, part in self.codebook_parts().items():
            dtype = lut_dtype if lut_dtype in part.dtypes else part.dtypes[0]
            found[name] = TensorSpec(dtype, (*self.shape[:-1], part.width))
        return found

    def served_bits(self, bits: int) -> int:
        """The precision at which a `bits`-bit deployment reads this weight.

        The highest of its own not above `bits`; where all are above (a layer kept at 8 bits), its lowest.
        """
        return max((own for own in self.bits if own <= bits), default=self.bits[0])


def check_bits(bits: object, what: str = "bits") -> tuple[int, ...]:
    """`bits` as a tuple, if it is a list of precisions an overlay can hold.

    Raises: PrecisionError
    """
    listed = tuple(bits) if isinstance(bits, (tuple, list)) else ()
    whole = all(type(one) is int and MIN_BITS <= one <= MAX_BITS for one in listed)
    if not listed or not whole or any(low >= high for low, high in itertools.pairwise(listed)):
        raise PrecisionError(
            f"{what} {show(bits)} arrived, expected a list of different integers from {MIN_BITS} to {MAX_BITS}, "
            "ascending, such as [2, 3, 4]"
        )
    return listed


def require_bits(bits: object, there: tuple[int, ...], where: str) -> None:
    """Refuses a precision that is not among `there`, listing those that are.

    Raises: PrecisionError
    """
    if type(bits) is int and bits in there:
        return
    has = ", ".join(map(str, there))
    if type(bits) is int and MIN_BITS <= bits <= MAX_BITS:
        again = f"or quantize again with --bits {min(bits, there[0])}-{max(bits, there[-1])}"
        raise PrecisionError(f"bits {bits} asked, {where} has {has}: pass one of these {again}")
    raise PrecisionError(f"bits {show(bits)} asked, {where} has {has}: pass one of these")

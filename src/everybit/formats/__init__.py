"""Number formats, codebooks and the on-disk container (docs/spec.md). numpy only."""

from everybit.formats.codebook import MAX_BITS, MIN_BITS, Codebook
from everybit.formats.codebooks import CODEBOOKS
from everybit.formats.compact import Compact
from everybit.formats.config import FORMAT_VERSION, QUANT_METHOD, QuantizationConfig
from everybit.formats.overlay import Overlay
from everybit.formats.tensors import DTYPES, TensorSpec
from everybit.formats.weights import ALL_BITS, WeightSpec, check_bits
from everybit.formats.writer import OverlayWriter

__all__ = [
    "ALL_BITS",
    "CODEBOOKS",
    "DTYPES",
    "FORMAT_VERSION",
    "MAX_BITS",
    "MIN_BITS",
    "QUANT_METHOD",
    "Codebook",
    "Compact",
    "Overlay",
    "OverlayWriter",
    "QuantizationConfig",
    "TensorSpec",
    "WeightSpec",
    "check_bits",
]

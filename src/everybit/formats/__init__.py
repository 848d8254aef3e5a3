"""Number formats, codebooks and the on-disk container (docs/spec.md). numpy only."""

from everybit.formats.codebooks import CODEBOOKS, Codebook
from everybit.formats.config import FORMAT_VERSION, QUANT_METHOD, QuantizationConfig
from everybit.formats.overlay import Overlay
from everybit.formats.tensors import DTYPES, TensorSpec
from everybit.formats.weights import ALL_BITS, MAX_BITS, MIN_BITS, WeightSpec, check_bits
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
    "Overlay",
    "OverlayWriter",
    "QuantizationConfig",
    "TensorSpec",
    "WeightSpec",
    "check_bits",
]

"""Public operations on planes: pack, unpack, dequantize. `reference.py` holds the plain numpy versions."""

from everybit.kernels.planes import dequantize, pack_planes, unpack_codes

__all__ = ["dequantize", "pack_planes", "unpack_codes"]

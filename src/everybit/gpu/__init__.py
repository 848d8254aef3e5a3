"""Overlays on NVIDIA GPUs: kernels that multiply by bit-planes, as torch operators.

weight = TiledWeight.of(overlay, "model.layers.0.mlp.up_proj.weight", torch.float16, "cuda")
y = weight.times(x, bits=3)                 # any precision of the overlay, from the same planes
y = weight.times_mixed(x, chosen)           # a precision for each token, chosen on the device
"""

from everybit.gpu.weight import TiledWeight

__all__ = ["TiledWeight"]

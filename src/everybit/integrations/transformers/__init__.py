"""Overlays in Hugging Face transformers. Importing this package registers the format."""

from everybit.integrations.transformers.loading import load
from everybit.integrations.transformers.model import OverlayModel
from everybit.integrations.transformers.quantizer import OverlayConfig, OverlayQuantizer

__all__ = ["OverlayConfig", "OverlayModel", "OverlayQuantizer", "load"]

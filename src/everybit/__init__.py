"""everybit: one set of weights, every bit-width.

    import everybit

    everybit.quantize("path/to/model", "overlay", calibration="text.txt")
    model = everybit.load("overlay", bits=4)
    model.set_precision(3)

Importing everybit is cheap (no torch, no transformers) and makes `AutoModelForCausalLM.from_pretrained` understand
overlays: the format registers itself as soon as transformers' quantizers are imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everybit.integrations.transformers.loading import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load", "quantize"]

_HOST = "transformers.quantizers.auto"  # where transformers keeps its formats
_FORMAT = "everybit.integrations.transformers.quantizer"  # registers ours when imported


def __getattr__(name: str) -> Any:
    if name == "quantize":  # the package is callable, see everybit/quantize/__init__.py
        return importlib.import_module("everybit.quantize")
    if name == "load":
        return importlib.import_module("everybit.integrations.transformers").load
    raise AttributeError(f"module 'everybit' has no attribute {name!r}")


class _RegisterWithTransformers(importlib.abc.MetaPathFinder):
    """Imports our format once `_HOST` has been imported: transformers itself discovers no plug-ins, and without the
    registration it would fill an overlay's layers with random numbers."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _HOST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(_FORMAT)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _HOST in sys.modules:
    importlib.import_module(_FORMAT)
else:
    sys.meta_path.insert(0, _RegisterWithTransformers())

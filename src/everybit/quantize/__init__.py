"""From a float model to an overlay. The package is callable: `everybit.quantize(model, out)` is `build.quantize`.

The room carries the name of its one public function, so the module object itself answers the call (Python allows a
module's class to be changed; see "Customizing module attribute access" in its data model).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from everybit.quantize.build import quantize

        return quantize(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

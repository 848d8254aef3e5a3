"""Every method by name."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from everybit.errors import SourceError
from everybit.quantize.peers import ggml, nested
from everybit.quantize.peers.gptq import gptq
from everybit.quantize.peers.hqq import hqq
from everybit.quantize.peers.method import Method, Quantize
from everybit.quantize.peers.nf4 import nf4
from everybit.quantize.peers.rtn import rtn


def _of(function: Quantize, **options: Any) -> Any:
    return lambda: functools.partial(function, **options)


_ALL = [
    Method("rtn", _of(rtn)),
    Method("rtn-g128", _of(rtn, group=128)),
    Method("rtn-g64", _of(rtn, group=64)),
    Method("gptq", _of(gptq), needs=("hessian",)),
    Method("gptq-g128", _of(gptq, group=128), needs=("hessian",)),
    Method("gptq-g128-noact", _of(gptq, group=128, act_order=False), needs=("hessian",)),
    Method("hqq", _of(hqq)),
    Method("nf4", _of(nf4), bits=(4,)),
    Method("upscale", _of(nested.upscale), needs=("sensitivity",), seeded=True),
    Method("squeezellm", _of(nested.squeezellm), needs=("sensitivity",), seeded=True),
    Method("lnq", _of(nested.lnq), bits=(2, 3, 4), needs=("sensitivity", "guided")),
    *(
        Method(f"gguf:{kind}", functools.partial(ggml.load, kind), bits=(bits,))
        for kind, bits in (ggml.PLAIN | ggml.K_QUANTS).items()
    ),
    *(
        Method(f"gguf-imatrix:{kind}", functools.partial(ggml.load, kind, True), bits=(bits,), needs=("hessian",))
        for kind, bits in ggml.K_QUANTS.items()
    ),
]
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
# gptq-g128-noact is there for checks against other people's figures
DEFAULT = tuple(name for name in METHODS if name != "gptq-g128-noact")


def find(names: Sequence[str]) -> list[Method]:
    """The methods that `names` name, in their order, each once; `gguf` is all of its types.

    Raises: SourceError, listing them all
    """
    found: dict[str, Method] = {}
    for name in names:
        family = {key: method for key, method in METHODS.items() if key.startswith(f"{name}:")}
        if name not in METHODS and not family:
            known = ", ".join(key for key in METHODS if ":" not in key)
            types = ", ".join(ggml.PLAIN | ggml.K_QUANTS)
            raise SourceError(
                f"unknown method {name!r}: expected some of {known}, gguf:TYPE and gguf-imatrix:TYPE "
                f"(types {types}; gguf or gguf-imatrix alone means all it has)"
            )
        found |= family or {name: METHODS[name]}
    return list(found.values())

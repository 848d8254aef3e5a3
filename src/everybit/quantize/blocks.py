"""The float model as a chain of decoder blocks, of which one at a time is in memory.

What stands before, between and after the blocks (embeddings, positions, masks, the last norm, the head) is the model's
own code: its forward pass runs with the blocks' places taken by functions that note what they are called with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from everybit.errors import reason
from everybit.quantize.source import Source

Values = Mapping[str, torch.Tensor]


def find_blocks(model: Any) -> list[str]:
    """The names of the decoder's blocks with a dot behind each (`model.layers.0.`), in order; none where unknown."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    inside = {id(module) for module in decoder.modules()}
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    for name, module in model.named_modules():  # an outer list comes before the lists within its blocks
        if isinstance(module, nn.ModuleList) and id(module) in inside and len(module) == count > 0:
            return [f"{name}.{i}." for i in range(count)]
    return []


class Blocks:
    """The blocks of a source, their weights read when asked for and held by the caller alone.

    Hidden states are f32[n, T, D]: n sequences of T tokens, those beyond a sequence's end do not matter (causal).
    Cost: memory of everything but the blocks, in float32. Mutates: the first run fills the buffers of `source.model`
    (rotary frequencies and the like) that no file holds.
    """

    def __init__(self, source: Source) -> None:
        self._source, self._model = source, source.model.eval()
        self.names = find_blocks(source.model)
        self._modules = [self._model.get_submodule(name[:-1]) for name in self.names]
        self._calls: dict[tuple[int, int], list[tuple[Any, ...]]] = {}

    def why_not(self) -> str | None:
        """None where the blocks can run apart from the model. Cost: no weights are read"""
        if not self.names:
            return "its decoder blocks are not to be found"
        outside = {n: _marked(self._source.shapes[n]) for n in self._outside_names()}
        try:
            first, second = (self._noted(outside, torch.tensor(ids)) for ids in ([[1, 2]], [[2, 1]]))
        except Exception as error:  # whatever an unknown architecture does with hidden states of its own
            return f"its decoder blocks cannot be run one by one ({reason(error)})"
        for calls in (first, second):
            if len(calls) < len(self.names) or any(hidden is not calls[0][0] for hidden, _, _ in calls):
                return "its decoder blocks are not a chain"
        if not _same([call[1:] for call in first], [call[1:] for call in second]):
            return "its decoder blocks are told which tokens they see"
        return None

    def read(self, index: int) -> dict[str, torch.Tensor]:
        """The float32 parameters of a block, by full name."""
        return _floats(self._source.parameters(self.names[index]))

    def enter(self, ids: torch.Tensor, replaced: Values) -> torch.Tensor:
        """The hidden states that the first block gets. Shapes: ids i64[n, T] -> f32[n, T, D]"""
        hidden: torch.Tensor = self._noted({**self._outside, **replaced}, ids)[0][0]
        return hidden

    def run(self, index: int, parameters: Values, hidden: torch.Tensor) -> torch.Tensor:
        """What a block with these parameters (full names) makes of hidden states. Shapes: f32[n, T, D] -> the same"""
        args, kwargs = self._calls_of(hidden)[index]
        own = {n.removeprefix(self.names[index]): value for n, value in parameters.items()}
        found: torch.Tensor = functional_call(self._modules[index], own, (hidden, *args), kwargs)
        return found

    def logits(self, hidden: torch.Tensor, replaced: Values) -> torch.Tensor:
        """What the model says where the last block said `hidden`. Shapes: f32[n, T, D] -> f32[n, T, vocabulary]"""

        def end(index: int, before: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return hidden if index + 1 == len(self.names) else before

        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
        found: torch.Tensor = self._run({**self._outside, **replaced}, ids, end).logits
        return found.float()

    @cached_property
    def _filled(self) -> Any:
        _fill_buffers(self._model)
        return self._model

    @cached_property
    def _outside(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name in self._outside_names():
            found |= _floats(self._source.parameters(name))
        return found

    def _outside_names(self) -> list[str]:
        return [name for name in self._source.shapes if not name.startswith(tuple(self.names))]

    def _calls_of(self, hidden: torch.Tensor) -> list[tuple[Any, ...]]:
        """The further arguments of every block for hidden states of this shape: positions, masks."""
        n, length = hidden.shape[:2]
        if (n, length) not in self._calls:
            noted = self._noted(self._outside, torch.zeros(n, length, dtype=torch.int64))
            self._calls[n, length] = [call[1:] for call in noted]
        return self._calls[n, length]

    def _noted(self, parameters: Values, ids: torch.Tensor) -> list[tuple[Any, Any, Any]]:
        """(hidden states, arguments, keywords) that every block is called with where blocks do nothing."""
        calls: list[tuple[Any, Any, Any]] = []

        def note(_: int, hidden: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append((hidden, args, kwargs))
            if len(calls) == len(self.names):
                raise _EnoughError
            return hidden

        with torch.no_grad(), suppress(_EnoughError):
            self._run(parameters, ids, note)
        return calls

    def _run(self, parameters: Values, ids: torch.Tensor, instead: Callable[..., Any]) -> Any:
        with _replaced(self._modules, instead):
            return functional_call(self._filled, dict(parameters), (), {"input_ids": ids, "use_cache": False})


class _EnoughError(Exception):
    """Ends a forward pass whose rest is of no interest."""


@contextmanager
def _replaced(modules: list[nn.Module], instead: Callable[..., Any]) -> Iterator[None]:
    for index, module in enumerate(modules):
        module.forward = partial(instead, index)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _floats(parameters: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: t.float() if t.is_floating_point() else t for name, t in parameters}


def _marked(shape: Sequence[int]) -> torch.Tensor:
    """A parameter whose rows differ in sign, so that different tokens look different; takes the memory of a column."""
    if len(shape) < 2:
        return torch.ones(()).expand(shape)
    rows = (1 - 2 * (torch.arange(shape[0]) % 2)).float()
    return rows.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


def _same(a: Any, b: Any) -> bool:
    """Whether arguments are equal as far as there are tensors in them."""
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, dict):
        return all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return True


@torch.no_grad()
def _fill_buffers(model: Any) -> None:
    """Buffers that no file holds get their values from the initialization of the model that they belong to."""
    owners = {name: m for name, m in model.named_modules() if hasattr(m, "_init_weights")}
    for path, module in model.named_modules():
        own = [n for n in module._non_persistent_buffers_set if getattr(module, n, None) is not None]
        for name in own:
            setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
        if own:
            around = (name for name in owners if not name or path == name or path.startswith(f"{name}."))
            owners[max(around, key=len)]._init_weights(module)

"""One model that is served: its weights, its batcher, its words, and the names it answers to."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from everybit.batching.batcher import Batcher
from everybit.batching.fluidity import Target
from everybit.batching.precision import Auto
from everybit.engine.generate import choose_bits
from everybit.engine.plan import Plan, Precision, identity
from everybit.engine.runtime import Backend, Runtime
from everybit.errors import ContextError, ModelError, PrecisionError, RequestError, SourceError
from everybit.server.grammar import Grammars
from everybit.server.problems import Problem
from everybit.server.template import ChatTemplate
from everybit.server.tools import ToolFormat
from everybit.tokenizer import Tokenizer

_ALIAS = re.compile(r"(.+)@(?:([0-9])bit|(auto)|(.+))")
MOST_NAME = 200


class Served:
    """Made with `Served.open`. `default` is the precision of requests that name none."""

    def __init__(
        self,
        name: str,
        runtime: Runtime,
        batcher: Batcher,
        tokenizer: Tokenizer,
        plans: dict[str, Plan],
        default: str,
        arithmetic: str = "",
    ) -> None:
        self.name, self.runtime, self.batcher, self.tokenizer, self.plans = name, runtime, batcher, tokenizer, plans
        folder = runtime.checkpoint.folder
        self.template = ChatTemplate.open(folder)
        self.tokenizer_json = tokenizer.to_json()
        self._longest = tokenizer.longest()
        self._lock = threading.Lock()
        self.created = int(time.time())
        self.fingerprint = f"everybit-{_weights(runtime)[:12]}"
        self._arithmetic = arithmetic
        self.default: Precision | Auto = self._default(default)

    @classmethod
    def open(
        cls,
        name: str,
        folder: Path,
        *,
        bits: str,
        plans: dict[str, Path],
        threads: int,
        mode: str,
        context: int | None,
        sequences: int,
        kv_dtype: str,
        budget: int,
        queue: int,
        target: Target,
        speculate: bool,
        backend: Callable[..., Backend] | None = None,
        adapter: Path | None = None,
    ) -> Served:
        """Opens a folder and makes the default precision ready, of `auto` its highest; the batcher makes the others.

        `sequences`: the KV cache has room for so many sequences of a full context, shared by all.
        Raises: FormatError, ModelError, SourceError, PrecisionError
        """
        if not 0 < len(name) <= MOST_NAME or "@" in name:
            raise SourceError(f"{name!r} is no name for a model: expected 1 to {MOST_NAME} characters without @")
        runtime = Runtime.open(
            folder,
            threads=threads,
            mode=mode,
            context=context,
            sequences=sequences,
            kv_dtype=kv_dtype,
            most_tokens=budget,
            backend=backend,
            adapter=adapter,
        )
        try:
            batcher = Batcher(
                runtime, budget=budget, most=min(64, budget), queue=queue, target=target, speculate=speculate
            )
            known = {key: Plan.open(path, runtime.checkpoint.overlay) for key, path in plans.items()}
            arithmetic = f"{runtime.isa if backend else mode}-{kv_dtype}"
            served = cls(name, runtime, batcher, Tokenizer.open(folder), known, bits, arithmetic)
            highest, *others = reversed(served.needed(served.default))
            runtime.native.prepare(highest)
            batcher.prepare_later(others)
        except BaseException:
            runtime.close()
            raise
        return served

    @cached_property
    def grammars(self) -> Grammars:
        """Made at their first use, half a second for 50 thousand tokens. Any thread may ask. Raises: SourceError"""
        with self._lock:
            found: Grammars | None = self.__dict__.get("grammars")
            return found or Grammars(self.tokenizer_json, self.runtime.vocabulary, self.tokenizer.eos_ids)

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model writes calls of tools. Raises: RequestError (it has no way to)"""
        if self.template is None:
            raise RequestError("tools", "cannot be given to this model: it has no chat template")
        return ToolFormat.detect(self.template.source, self.tokenizer_json)

    def needed(self, bits: Precision | Auto) -> Sequence[Precision]:
        """The precisions that a request at `bits` may run at."""
        if isinstance(bits, Auto):
            return [b for b in self.runtime.bits if bits.floor <= b <= bits.ceiling]
        return [bits]

    def _default(self, text: str) -> Precision | Auto:
        """Of the operator's `auto`, `auto:3-6`, `4` or a plan's name. Raises: PrecisionError"""
        if not self.runtime.bits:
            return 0
        if text.startswith("auto"):
            bounds = re.fullmatch(r"auto(?::([0-9])-([0-9]))?", text)
            if bounds is None:
                raise PrecisionError(f"bits {text!r} arrived, expected auto or auto:LOW-HIGH such as auto:3-8")
            low, high = (
                (int(bounds[1]), int(bounds[2])) if bounds[1] else (min(self.runtime.bits), max(self.runtime.bits))
            )
            return self.precision("auto", low, high)
        return self.precision(text)

    def precision(
        self, asked: int | str | None, floor: int | None = None, ceiling: int | None = None
    ) -> Precision | Auto:
        """What a request means by `precision` and its bounds; None is the default.

        Raises: PrecisionError, RequestError
        """
        if asked is None and (floor is None and ceiling is None):
            return self.default
        if isinstance(asked, str) and asked.isdecimal() and len(asked) == 1:
            asked = int(asked)
        if asked is None or asked == "auto":
            if not self.runtime.bits:
                raise PrecisionError(f"{self.name} has float weights and one precision: leave precision out")
            base = self.default if asked is None and isinstance(self.default, Auto) else None
            low, high = (base.floor, base.ceiling) if base else (min(self.runtime.bits), max(self.runtime.bits))
            auto = Auto(low if floor is None else floor, high if ceiling is None else ceiling)
            if not self.needed(auto):
                raise PrecisionError(
                    f"auto from {auto.floor} to {auto.ceiling} bits arrived, {self.name} has "
                    f"{', '.join(map(str, self.runtime.bits))}: widen the bounds"
                )
            return auto
        if floor is not None or ceiling is not None:
            raise RequestError("precision_floor" if floor is not None else "precision_ceiling", "goes with auto only")
        if isinstance(asked, str):
            if asked not in self.plans:
                known = ", ".join(["auto", *map(str, self.runtime.bits), *self.plans])
                raise PrecisionError(f"precision {asked[:40]!r} arrived, {self.name} has {known}")
            return self.plans[asked]
        return choose_bits(self.runtime, asked)

    def tokens(self, given: Sequence[int], parameter: str) -> list[int]:
        """Token ids that a client sent. Raises: RequestError"""
        try:
            return [int(token) for token in self.runtime.check_tokens(given)] if given else []
        except ModelError as error:
            raise RequestError(parameter, f"holds a token that is none: {error}") from None

    def require_room(self, characters: int) -> None:
        """A text is refused before it is cut into tokens where it has more than the context's tokens can have.

        Raises: ContextError
        """
        most = self.runtime.context * self._longest
        if characters > most:
            raise ContextError(
                f"a text of {characters} characters arrived, {self.runtime.context} tokens are the context, which "
                f"{most} characters fill at the least: shorten it"
            )

    def token_text(self, token: int) -> str:
        """A token by itself, special ones too; U+FFFD for bytes that are no character alone."""
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def label(self, bits: Any) -> int | str:
        """How a precision is called in answers: its number, or its plan's name; 0 for float weights."""
        if isinstance(bits, Plan):
            return next((name for name, plan in self.plans.items() if plan is bits), "plan")
        return int(bits)

    def system_fingerprint(self, bits: Precision | Auto) -> str:
        """Same fingerprint, seed and request: same text. An `auto` request has none of its own before it has run."""
        at = "auto" if isinstance(bits, Auto) else f"{bits}bit" if isinstance(bits, int) else self.label(bits)
        return f"{self.fingerprint}-{at if bits else 'float'}-{self.runtime.isa}-{self._arithmetic}"

    def cards(self) -> list[dict[str, Any]]:
        """The entries of /v1/models: the model itself, then one for each precision and plan."""
        about = {
            "bits": list(self.runtime.bits),
            "plans": list(self.plans),
            "context": self.runtime.context,
            "chat": self.template is not None,
        }
        aliases = [f"{b}bit" for b in self.runtime.bits] + list(self.plans)
        names: list[tuple[str, str | None]] = [(self.name, None)]
        names += [(f"{self.name}@{alias}", self.name) for alias in aliases]
        return [
            {
                "id": id,
                "object": "model",
                "created": self.created,
                "owned_by": "everybit",
                "everybit": {**about, "alias_of": of},
            }
            for id, of in names
        ]


def _weights(runtime: Runtime) -> str:
    """A name for the weights: of an overlay its checksums', of float models their files' sizes and times; and of an
    adapter its checksum."""
    overlay, folder = runtime.checkpoint.overlay, runtime.checkpoint.folder
    if overlay is not None:
        found = identity(overlay).removeprefix("sha256:")
    else:
        paths = sorted(folder.glob("*.safetensors"))
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        found = hashlib.sha256(repr(files).encode()).hexdigest()
    return hashlib.sha256(f"{found} {runtime.adapter.checksum}".encode()).hexdigest() if runtime.adapter else found


def find(models: dict[str, Served], asked: str) -> tuple[Served, int | str | None]:
    """The model of a request, and the precision in its name (NAME@3bit, NAME@auto, NAME@PLAN). Raises: Problem"""
    if asked in models:
        return models[asked], None
    match = _ALIAS.fullmatch(asked)
    if match and match[1] in models:
        served = models[match[1]]
        precision = int(match[2]) if match[2] else match[3] or match[4]
        if precision in (*served.runtime.bits, *served.plans, "auto"):
            return served, precision
    raise Problem(
        404,
        f"the model {asked[:100]!r} is not served here, expected one of {', '.join(models)}, or one of them with a "
        "precision: see /v1/models",
        param="model",
        code="model_not_found",
    )

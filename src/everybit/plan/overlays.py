"""What each linear of an everybit overlay costs at a precision or under a bit plan, from the container's own sizes."""

from __future__ import annotations

import os
from collections import defaultdict
from math import prod
from pathlib import Path

from everybit.errors import ModelError, SourceError
from everybit.formats import Overlay
from everybit.formats.files import read_inside
from everybit.formats.jsontext import parse_object
from everybit.formats.tensors import show
from everybit.formats.weights import require_bits
from everybit.plan.fields import printable

Place = tuple[str, int | None]  # name of the linear, layer (None: outside)

# Linear -> the last parts of the names of its parameters. Of _SHARED, the parts before tell which linear.
_LEAVES = {
    "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "query", "key", "value", "W_pack"),
    "o": ("o_proj",), "q_a": ("q_a_proj",), "q_b": ("q_b_proj",), "kv_a": ("kv_a_proj_with_mqa",),
    "kv_b": ("kv_b_proj",), "index_q": ("wq_b",), "index_k": ("wk", "weights_proj"),
    "up": ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1", "c_fc", "fc_in", "dense_h_to_4h"),
    "down": ("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h"),
    "state_in": ("in_proj", "in_proj_qkvz", "in_proj_qkv", "in_proj_z", "in_proj_ba", "in_proj_b", "in_proj_a"),
    "latent_in": ("fc1_latent_proj",), "latent_out": ("fc2_latent_proj",), "x": ("x_proj",), "dt": ("dt_proj",),
    "head": ("lm_head", "embed_out"),
    "embedding": ("embed_tokens", "wte", "word_embeddings", "embed_in", "embeddings"),
}  # fmt: skip
_LINEARS = {leaf: name for name, leaves in _LEAVES.items() for leaf in leaves}
_SHARED = ("out_proj", "dense", "c_proj")


class OverlayBits:
    """Stored bits a weight, by linear. `asked`: a precision, the path of a plan of everybit allocate, None (highest).

    Raises: FormatError, PrecisionError, SourceError
    """

    def __init__(self, folder: Path, asked: object) -> None:
        self._bytes: defaultdict[Place, int] = defaultdict(int)
        self._weights: defaultdict[Place, int] = defaultdict(int)
        self._quantized: set[Place] = set()
        self._used: set[Place] = set()
        self.left: list[str] = []
        with Overlay.open(folder, verify=False) as overlay:
            for name, own in _precisions(overlay, asked).items():
                spec = overlay.weights[name]
                codebook = sum(overlay.spec_of(part).nbytes for part in spec.codebook_names(own).values())
                place = self._add(name, spec.parameters, own * spec.plane_bytes + codebook)
                self._quantized |= {place} if place else set()
                self.left += [] if place else [name]
            for name in overlay.plain_names():
                tensor = overlay.spec_of(name)
                if len(tensor.shape) > 1:
                    self._add(name, prod(tensor.shape), tensor.nbytes)

    def _add(self, name: str, weights: int, nbytes: int) -> Place | None:
        place = place_of(name)
        if place:
            self._weights[place] += weights
            self._bytes[place] += nbytes
        return place

    def __call__(self, name: str, layer: int | None, out: int, into: int) -> float:
        """Raises: ModelError (weights of another size than the config says, or none)"""
        place = name, layer
        if place not in self._weights:  # a tied head; queries of an MLA that has no latent for them
            place = {"head": ("embedding", None), "q_b": ("qkv", layer)}.get(name, place)
        if place not in self._weights:
            if name in ("router", "shared_gate", "scan"):  # never quantized, and named in many ways
                return 16.0
            raise ModelError(f"the overlay has no weights of {name!r}{_of(layer)}, expected {out} x {into}: check it")
        found = self._weights[place]
        if found % (out * into) or (found > out * into and not name.startswith("expert_")):
            raise ModelError(
                f"the overlay has {found} weights of {name!r}{_of(layer)}, expected {out} x {into}: check its config"
            )
        self._used.add(place)
        return self._bytes[place] * 8 / found

    def unused(self) -> list[str]:
        """Quantized weights that no linear of the model was found for."""
        places = self._quantized - self._used
        return sorted([*self.left, *(f"{name}{_of(layer)}" for name, layer in places)])


def _of(layer: int | None) -> str:
    return "" if layer is None else f" of layer {layer}"


def place_of(parameter: str) -> Place | None:
    """The linear that a parameter belongs to, by its name in the usual families; None where it is in no list."""
    parts = parameter.removesuffix(".weight").split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    layer, inside, leaf = None if number is None else int(parts[number]), parts[:-1], parts[-1]
    name = _LINEARS.get(leaf)
    if leaf in _SHARED:
        attends = any("attn" in part or part == "attention" for part in inside) or "mlp" not in inside
        name = "o" if attends else "down"
        if "mixer" in inside or "linear_attn" in inside or "mamba" in inside:
            name = "state_out"
    if name is None or (layer is None) != (name in ("head", "embedding")):
        return None
    if "experts" in inside:
        return f"expert_{name}", layer
    if any(part.startswith("shared_expert") for part in inside):
        return f"shared_{name}", layer
    return name, layer


def _precisions(overlay: Overlay, asked: object) -> dict[str, int]:
    """Which of its own precisions each weight is read at."""
    if isinstance(asked, str | os.PathLike):
        return _plan(overlay, Path(asked))
    bits = overlay.bits[-1] if asked is None else asked
    require_bits(bits, overlay.bits, "the overlay")
    assert isinstance(bits, int)
    return {name: spec.served_bits(bits) for name, spec in overlay.weights.items()}


def _plan(overlay: Overlay, path: Path) -> dict[str, int]:
    if not path.is_file():
        raise SourceError(
            f"weight_bits {show(str(path))} arrived for an overlay, expected one of its bits "
            f"{', '.join(map(str, overlay.bits))} or a plan file of everybit allocate: pass one"
        )
    where = printable(str(path))
    found = parse_object(read_inside(path.parent, path.name), where, "run everybit allocate again").get("bits")
    if not isinstance(found, dict) or set(found) != set(overlay.weights):
        raise SourceError(
            f"{where} does not name the {len(overlay.weights)} quantized weights of "
            f"{printable(str(overlay.folder))}, expected its own plan: run everybit allocate on this overlay"
        )
    for name, bits in found.items():
        require_bits(bits, overlay.weights[name].bits, f"weight {show(name)}")
    return found

"""A config.json, an overlay or a name -> the model as the planner sees it, with the bits of each of its weights."""

from __future__ import annotations

import difflib
import functools
import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from everybit.errors import ModelError, SourceError
from everybit.formats.files import read_inside
from everybit.formats.jsontext import parse_object
from everybit.formats.tensors import show
from everybit.plan.families import ENCODERS, T5, BitsOf, hidden_size, read_layers
from everybit.plan.fields import LONGEST, Fields, printable, shown
from everybit.plan.operators import Layer, Linear, Model
from everybit.plan.overlays import OverlayBits
from everybit.plan.stored import Scheme, WeightBits, asked_bits, check_width, read_scheme

_TEXT = ("text_config", "llm_config", "language_config")
_TYPES = (
    "auto", "bfloat16", "float16", "half", "float32", "float", "float64", "double", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip
_ENDLESS = 1 << 20  # context of models that state no limit: states, relative positions

# Linear -> its kind, and its modules in a layer as configs of quantized checkpoints name them.
_ATTENTION = {
    "qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "q_a": ("q_a_proj",), "q_b": ("q_b_proj", "q_proj"),
    "kv_a": ("kv_a_proj_with_mqa",), "kv_b": ("kv_b_proj",), "index_q": ("indexer.wq_b",), "index_k": ("indexer.wk",),
}  # fmt: skip
_STATE = {"state_in": "in_proj", "state_out": "out_proj", "x": "x_proj", "dt": "dt_proj"}
_FEED = {"up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


def read_model(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    weight_bits: WeightBits | os.PathLike[str] | None = None,
    kv_bits: float | None = None,
    activation_bits: float | None = None,
    name: str | None = None,
) -> Model:
    """The model of a Hugging Face folder or config.json, of a config as a mapping, or of a name in `models()`.

    Widths that are None are the checkpoint's own (its quantization_config), 16 where it says nothing. `weight_bits`:
    a number, a format of `stored.FORMATS` or `everybit2` to `everybit8`, or these by kind (`stored.asked_bits`); the
    checkpoint's width of activations does not hold then. Of an everybit overlay: one of its precisions, or the path of
    a plan of everybit allocate; None: its highest.
    Raises: SourceError, ModelError, and of overlays FormatError, PrecisionError
    """
    config, where, found_name, folder = _load(source)
    fields, notes, quantization = _text_fields(config, where)
    scheme = Scheme(())
    overlay: OverlayBits | None = None
    if isinstance(quantization, Mapping) and quantization.get("quant_method") == "everybit":
        if folder is None:
            raise ModelError(f"{where}: the config of an overlay arrived alone: pass the folder that holds it")
        overlay = OverlayBits(folder, weight_bits)
    elif quantization:
        scheme = read_scheme(quantization, f"{where}: quantization_config")
    bits = overlay or _bits_of(scheme, weight_bits)
    if weight_bits is not None:
        scheme = Scheme((), kv_bits=scheme.kv_bits)

    vocabulary, width = fields.whole("vocab_size"), hidden_size(fields)
    encoder = fields.family in ENCODERS
    _check_one_stack(fields)
    layers = read_layers(fields, bits)
    context = _context(fields, layers)
    rows = vocabulary
    if encoder and fields.has("type_vocab_size"):
        rows += context + fields.whole("type_vocab_size")  # BERT: positions and segments are learned
    outer = fields.whole("word_embed_proj_dim", "embedding_size", default=width)
    embedding = Linear("embedding", rows, outer, bits("embedding", None, rows, outer), "column")
    head = None if encoder else Linear("head", vocabulary, outer, bits("head", None, vocabulary, outer), "column")
    tied = fields.flag("tie_word_embeddings", False)
    if fields.family not in _families():
        notes.append(f"model_type {show(fields.family)} (read as Llama-like)")
    return Model(
        name=name or found_name,
        hidden=width,
        vocabulary=vocabulary,
        context=context,
        layers=layers,
        embedding=embedding,
        head=head,
        tied=tied,
        kv_bits=scheme.kv_bits if kv_bits is None else check_width("kv_bits", kv_bits),
        activation_bits=scheme.activation_bits
        if activation_bits is None
        else check_width("activation_bits", activation_bits),
        unknown=(*notes, *fields.unknown(), *(overlay.unused() if overlay else ())),
    )


def models() -> list[str]:
    """The names of the offline set, sorted."""
    return sorted(_offline(), key=str.lower)


def distinct_experts(count: int, chosen: int, tokens: float) -> float:
    """How many of `count` experts a batch of `tokens` wakes, each token taking `chosen` of them at random.

    Raises: SourceError
    """
    if not 0 <= chosen <= count or count < 1 or tokens < 0:
        raise SourceError(
            f"{chosen} of {count} experts for {tokens} tokens arrived, expected at most all of them and no negatives: "
            "fix the numbers"
        )
    return count * (1 - float((1 - chosen / count) ** tokens))


def active_parameters(model: Model) -> int:
    """Weights that one token is multiplied with: its experts alone, the head, not the embedding (one row is read)."""
    dense = sum(linear.weights * count for linear, count in model.linears)
    return dense + sum(
        sum(one.weights for one in layer.experts.linears) * layer.experts.chosen * layer.count
        for layer in model.layers
        if layer.experts
    )


def describe(model: Model) -> dict[str, Any]:
    """The model as JSON: totals, then each group of equal layers."""
    per_token = sum(one.count * one.attention.cache_numbers for one in model.layers if one.attention)
    return {
        "name": model.name,
        "parameters": model.parameters,
        "active_parameters": active_parameters(model),
        "hidden": model.hidden,
        "vocabulary": model.vocabulary,
        "context": model.context,
        "weight_bytes": model.weight_bytes,
        "bits_per_weight": 8 * model.weight_bytes / model.parameters,
        "kv_bits": model.kv_bits,
        "activation_bits": model.activation_bits,
        "cache_bytes_per_token": per_token * model.kv_bits / 8,
        "state_bytes_per_sequence": model.cache_bytes(0),
        "tied": model.tied,
        "layers": [_layer(layer) for layer in model.layers],
        "unknown": list(model.unknown),
    }


def _layer(layer: Layer) -> dict[str, Any]:
    attention, experts, state = layer.attention, layer.experts, layer.state
    return {
        "count": layer.count,
        "linears": [_linear(one) for one in layer.linears],
        "attention": {key: getattr(attention, key) for key in attention.__slots__} if attention else None,
        "experts": {
            "count": experts.count,
            "chosen": experts.chosen,
            "linears": [_linear(one) for one in experts.linears],
        }
        if experts
        else None,
        "state": {"numbers": state.numbers, "bytes_each": state.bytes_each} if state else None,
    }


def _linear(one: Linear) -> dict[str, Any]:
    return {"name": one.name, "out": one.out, "into": one.into, "bits": one.bits, "split": one.split}


# --- where a config comes from
def _load(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[Mapping[str, Any], str, str, Path | None]:
    """The config, its name in errors, the model's name, the folder if there is one."""
    if isinstance(source, Mapping):
        own = source.get("_name_or_path") or source.get("model_type")
        return source, "config", own[:200] if isinstance(own, str) and own.isprintable() else "model", None
    path = Path(source)
    if path.is_dir() or path.is_file():
        folder, file = (path, "config.json") if path.is_dir() else (path.parent, path.name)
        where = printable(str(folder / file))
        if not (folder / file).is_file():
            raise SourceError(
                f"{printable(str(folder))} has no config.json, expected a model folder: download the model again"
            )
        config = dict(parse_object(read_inside(folder, file), where))
        beside = folder / "hf_quant_config.json"  # NVIDIA's checkpoints say it in a file of their own
        if "quantization_config" not in config and beside.is_file():
            config["quantization_config"] = parse_object(read_inside(folder, beside.name), printable(str(beside))).get(
                "quantization"
            )
        return config, where, printable(folder.resolve().name), folder if file == "config.json" else None
    name = _offline_name(str(source))
    return _offline_config(name), name, name, None


def _offline() -> dict[str, dict[str, Any]]:
    return _shipped("models.json")


def _families() -> dict[str, dict[str, Any]]:
    """Model types that the planner knows, each with the fields that its configs may leave out."""
    return _shipped("families.json")


@functools.cache
def _shipped(name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((files("everybit.plan") / "configs" / name).read_text("utf-8"))
    return found


def _offline_name(asked: str) -> str:
    """A name with or without its owner, in any case."""
    low = asked.lower()
    fits = [name for name in _offline() if low in (name.lower(), name.lower().partition("/")[2])]
    if len(fits) == 1:
        return fits[0]
    near = ", ".join(fits or difflib.get_close_matches(asked, models(), 3, 0.5))
    raise SourceError(
        f"{show(asked)} is neither a path nor {'one' if fits else 'a'} model of the offline set"
        f"{f' (nearest: {near})' if near else ''}: pass a folder with config.json, or a name that models() lists"
    )


def _offline_config(name: str) -> dict[str, Any]:
    own = _offline()[name]
    base = _offline_config(own["same_as"]) if "same_as" in own else {}
    return {**base, **{key: value for key, value in own.items() if key != "same_as"}}


def _text_fields(config: Mapping[str, Any], where: str) -> tuple[Fields, list[str], Any]:
    """The fields of the language model, what is beside it, and the quantization_config."""
    inner = next((key for key in _TEXT if isinstance(config.get(key), Mapping)), None)
    for one in (config, config[inner] if inner else {}):
        _check_type(one, where)
    beside = [key for key in config if key.endswith("_config") and key not in (*_TEXT, "quantization_config")]
    notes = [f"{shown(key)} (not counted)" for key in sorted(beside) if isinstance(config[key], Mapping)]
    text: dict[str, Any] = {key: value for key, value in config.items() if key not in beside}
    if inner:
        names = ("tie_word_embeddings", "quantization_config", "is_encoder_decoder")
        shared = {key: config[key] for key in names if key in config}
        text = {**shared, **config[inner]}
        text.setdefault("model_type", f"{config.get('model_type', '')}_text")
    quantization = text.pop("quantization_config", None)
    family = text.get("model_type")
    defaults = _families().get(family, {}) if isinstance(family, str) else {}
    return Fields({**defaults, **text}, where), notes, quantization


def _check_one_stack(f: Fields) -> None:
    """Cross-attention, and an encoder that runs once a prompt, are not planned.

    Raises: ModelError
    """
    architectures = f.config.get("architectures") or [""]
    alone = isinstance(architectures, list) and all(str(one).endswith("EncoderModel") for one in architectures)
    if f.family in T5 and alone:
        f.has("num_decoder_layers", "is_encoder_decoder")
        return
    both = f.flag("is_encoder_decoder", f.family in T5) or f.has("num_decoder_layers", "decoder_layers")
    if both or (f.family in ENCODERS and f.flag("is_decoder", False)):
        raise ModelError(
            f"{f.where}: an encoder-decoder arrived, whose decoder the planner does not count, expected a decoder, or "
            'an encoder alone (of T5: architectures ["T5EncoderModel"]): pass another'
        )


def _check_type(config: Mapping[str, Any], where: str) -> None:
    """Weights are planned at 16 bits or the asked ones whatever the type is, but no unknown type is let through.

    Raises: ModelError
    """
    for name in ("dtype", "torch_dtype"):
        found = config.get(name)
        if found is not None and not (isinstance(found, str) and found.removeprefix("torch.") in _TYPES):
            raise ModelError(f"{where}: {name} {show(found)} arrived, expected one of {', '.join(_TYPES)}: fix it")


def _context(f: Fields, layers: tuple[Layer, ...]) -> int:
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "n_ctx")
    endless = "relative_attention_num_buckets" in f.config or not any(layer.attention for layer in layers)
    return f.whole(*names, default=_ENDLESS if endless else None, most=LONGEST)


# --- bits
def _bits_of(scheme: Scheme, asked: WeightBits | os.PathLike[str] | None) -> BitsOf:
    if isinstance(asked, os.PathLike):
        raise SourceError(
            f"the plan {show(str(asked))} arrived for a model that is no overlay: pass the overlay's folder"
        )
    chosen = None if asked is None else asked_bits(asked)

    def bits(name: str, layer: int | None, out: int, into: int) -> float:
        if name == "scan":  # convolutions and decays are too few and too delicate to be quantized
            return 16.0
        kind, modules = _modules(name, layer)
        return scheme.bits(kind, modules) if chosen is None else chosen(kind, into)

    return bits


def _modules(name: str, layer: int | None) -> tuple[str, tuple[str, ...]]:
    """The kind of a linear, and the full names of its modules."""
    if layer is None:
        return name, ("lm_head",) if name == "head" else ("model.embed_tokens",)
    begin = f"model.layers.{layer}"
    if name in _ATTENTION:
        return "attention", tuple(f"{begin}.self_attn.{one}" for one in _ATTENTION[name])
    if name in _STATE:
        return "state", tuple(f"{begin}.{place}.{_STATE[name]}" for place in ("linear_attn", "mixer", "mamba"))
    if name in ("router", "shared_gate"):
        return "router", (f"{begin}.mlp.gate",)
    owner, _, own = name.rpartition("_")
    places = {"": ("mlp",), "expert": ("mlp.experts", "mlp.experts.0"), "shared": ("mlp.shared_experts",)}
    kind = "experts" if owner == "expert" else "mlp"
    leaves = _FEED.get(own, (name,))
    return kind, tuple(f"{begin}.{place}.{leaf}" for place in places.get(owner, ("mlp",)) for leaf in leaves)

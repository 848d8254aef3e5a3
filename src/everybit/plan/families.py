"""From the fields of a config to layers: what each family of models has in a layer, as linears with shapes.

Shapes follow the published definitions: MLA (DeepSeek-V2, section 2.1), Mamba (section 3), Mamba-2 (section 7), gated
delta networks (Yang et al. 2024) and the families' own configs. Linears that engines run as one product are one here
(queries, keys and values; gate and up). Norms and biases are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice

from everybit.errors import ModelError
from everybit.formats.tensors import show
from everybit.plan.fields import DEEPEST, LONGEST, Fields
from everybit.plan.operators import Attention, Experts, Layer, Linear, State

Part = tuple[str, int, int, str]  # name, out, into, split
BitsOf = Callable[[str, int | None, int, int], float]  # name, layer (None: outside), out, into -> stored bits a weight

T5 = frozenset(("t5", "mt5", "umt5"))
ENCODERS = T5 | {"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra"}
_UNGATED = ENCODERS | {
    "gpt2", "gpt_neox", "gpt_neo", "gptj", "gpt_bigcode", "opt", "falcon", "bloom", "mpt", "phi", "starcoder2",
    "nemotron", "nemotron_h",
}  # fmt: skip
# What transformers 5 keeps in one module, as engines do; and routers that are linears there, not bare parameters.
_ONE_QKV = ("gpt2", "gpt_bigcode", "gpt_neox", "falcon", "bloom", "mpt", "phi3", "baichuan", "internlm2")
_ONE_GATE_UP = ("phi3", "glm", "glm4")
_LINEAR_ROUTERS = ("llama4_text", "phimoe")
_STATE_INS = {"qwen3_next": 2, "qwen3_5_text": 4, "qwen3_5_moe_text": 4}


@dataclass(frozen=True)
class Mixer:
    """What mixes tokens in a layer."""

    parts: tuple[Part, ...]
    attention: Attention | None = None
    state: State | None = None


@dataclass(frozen=True)
class Feed:
    """What follows: an MLP, or experts beside a router and shared experts."""

    parts: tuple[Part, ...]
    experts: tuple[Part, ...] = ()
    count: int = 0
    chosen: int = 0


def _layer_count(f: Fields) -> int:
    listed = f.listed("layers_block_type")
    count = len(listed) if listed else None
    return f.whole("num_hidden_layers", "n_layer", "num_layers", "n_layers", default=count, most=DEEPEST)


def hidden_size(f: Fields) -> int:
    return f.whole("hidden_size", "n_embd", "d_model", "dim")


def read_layers(f: Fields, bits: BitsOf) -> tuple[Layer, ...]:
    """The layers, equal ones together, in the order of their first. Raises: ModelError"""
    found: Counter[Layer] = Counter()
    for i, (mixer, feed) in enumerate(zip(_mixers(f), _feeds(f), strict=True)):
        parts = (mixer.parts if mixer else ()) + (feed.parts if feed else ())
        experts = None
        if feed and feed.count:
            experts = Experts(_linears(f, feed.experts, i, bits), feed.count, feed.chosen)
        attention, state = (mixer.attention, mixer.state) if mixer else (None, None)
        found[Layer(1, _linears(f, parts, i, bits), attention, experts, state)] += 1
    return tuple(Layer(n, one.linears, one.attention, one.experts, one.state) for one, n in found.items())


def _linears(f: Fields, parts: tuple[Part, ...], layer: int, bits: BitsOf) -> tuple[Linear, ...]:
    return tuple(
        Linear(name, out, into, bits(name, layer, out, into), split, _modules(f, name))
        for name, out, into, split in parts
    )


def _modules(f: Fields, name: str) -> int:
    """Of a linear (`Linear.modules`). Experts are a parameter for up and one for down: an adapter each."""
    match name:
        case "qkv":
            return 1 if f.family in _ONE_QKV else 3
        case "up" | "shared_up":
            return 2 if _gated(f) and f.family not in _ONE_GATE_UP else 1
        case "state_in":
            return _STATE_INS.get(f.family, 1)
        case "index_k":
            return 2
        case "router":
            return int(f.family in _LINEAR_ROUTERS)
    return 0 if name == "scan" else 1


# --- which layer has what
_SSM = {"mamba": "mamba", "falcon_mamba": "mamba", "mamba2": "mamba2", "jamba": "mamba"}
_NEMOTRON = {"M": "mamba2", "*": "full", "-": "mlp", "E": "moe"}
_TYPES = {  # "": the kind of state that the family has
    "full_attention": "full", "attention": "full", "indexed_attention": "full", "sliding_attention": "window",
    "chunked_attention": "window", "linear_attention": "", "mamba": "", "mlp": "mlp", "moe": "moe",
}  # fmt: skip


def _kinds(f: Fields) -> list[str]:
    """Of each layer: full, window, delta, mamba, mamba2; where a layer is a feed alone: mlp or moe."""
    count = _layer_count(f)
    if f.has("hybrid_override_pattern"):
        pattern = f.text("hybrid_override_pattern", "").replace("|", "")
        if len(pattern) != count or set(pattern) - set(_NEMOTRON):
            raise ModelError(
                f"{f.where}: hybrid_override_pattern {show(pattern)} arrived, expected {count} of the letters "
                f"{' '.join(_NEMOTRON)}: fix it"
            )
        return [_NEMOTRON[letter] for letter in pattern]
    listed = f.listed("layer_types", "layers_block_type", length=count)
    if listed is not None:
        if bad := [one for one in listed if not isinstance(one, str) or one not in _TYPES]:
            raise ModelError(
                f"{f.where}: the layer type {show(bad[0])} is unknown, expected one of {', '.join(_TYPES)}: "
                "the planner has no such layer yet"
            )
        state = "delta" if f.has("linear_conv_kernel_dim") else _SSM.get(f.family, "mamba2")
        return [_TYPES[one] or state for one in listed]
    if f.has("attn_layer_period"):
        period, offset = f.whole("attn_layer_period"), f.whole("attn_layer_offset", default=0, least=0)
        return ["full" if i % period == offset else "mamba" for i in range(count)]
    if f.family in _SSM:
        return [_SSM[f.family]] * count
    if f.has("full_attention_interval"):
        return _every(f.whole("full_attention_interval"), "full", "delta", count)
    if f.has("attention_chunk_size"):
        return _every(f.whole("no_rope_layer_interval"), "full", "window", count)
    if not f.has("sliding_window") or not f.flag("use_sliding_window", not f.family.startswith("qwen")):
        return ["full"] * count
    if f.has("sliding_window_pattern", "_sliding_window_pattern"):
        return _every(f.whole("sliding_window_pattern", "_sliding_window_pattern"), "full", "window", count)
    if f.family.startswith("qwen"):
        first = f.whole("max_window_layers", default=0, least=0)
        return ["window" if i >= first else "full" for i in range(count)]
    return ["window"] * count


def _every(period: int, last: str, others: str, count: int) -> list[str]:
    return list(islice(cycle([others] * (period - 1) + [last]), count))


def _mixers(f: Fields) -> list[Mixer | None]:
    kinds = _kinds(f)
    window = f.whole("attention_chunk_size", "sliding_window", most=LONGEST) if "window" in kinds else None
    per_layer = f.listed("num_key_value_heads_per_layer", length=len(kinds))
    if per_layer is not None:
        found = zip(per_layer, kinds, strict=True)
        return [_attention(f, window if kind == "window" else None, kv) for kv, kind in found]
    attend = _latent_attention if f.has("kv_lora_rank") else _attention
    made: dict[str, Mixer | None] = {"mlp": None, "moe": None}
    make: dict[str, Callable[[], Mixer]] = {
        "full": lambda: attend(f, None),
        "window": lambda: attend(f, window),
        "delta": lambda: _delta(f),
        "mamba": lambda: _mamba(f),
        "mamba2": lambda: _mamba2(f),
    }
    return [made[kind] if kind in made else made.setdefault(kind, make[kind]()) for kind in kinds]


def _feeds(f: Fields) -> list[Feed | None]:
    kinds, count = _kinds(f), _layer_count(f)
    if f.family in ("mamba", "mamba2", "falcon_mamba"):
        return [None] * count
    alone = {"mlp", "moe"} & set(kinds)  # Nemotron-H: a layer is a mixer or a feed
    if alone:
        dense = _mlp(f, f.whole("intermediate_size")) if "mlp" in alone else None
        routed = _experts(f, f.whole("n_routed_experts", "num_experts")) if "moe" in alone else None
        return [{"mlp": dense, "moe": routed}.get(kind) for kind in kinds]
    experts = f.whole("n_routed_experts", "num_local_experts", "num_experts", default=0, least=0)
    sparse = _sparse(f, count) if experts > 1 else [False] * count
    routed = _experts(f, experts) if any(sparse) else None
    dense = None if all(sparse) else _mlp(f, _width(f))
    return [routed if one else dense for one in sparse]


def _sparse(f: Fields, count: int) -> list[bool]:
    """Which layers have experts."""
    listed = f.listed("mlp_layer_types", length=count)
    if listed is not None:
        return [one == "sparse" for one in listed]
    if isinstance(f.config.get("moe_layer_freq"), list):
        return [one == 1 for one in f.listed("moe_layer_freq", length=count) or ()]
    if (chosen := f.listed("moe_layers")) is not None:
        return [i in chosen for i in range(count)]
    if f.has("expert_layer_period"):
        period, offset = f.whole("expert_layer_period"), f.whole("expert_layer_offset", default=0, least=0)
        return [i % period == offset for i in range(count)]
    first = f.whole("first_k_dense_replace", default=0, least=0)
    step = f.whole("decoder_sparse_step", "interleave_moe_layer_step", default=1)
    frequency = f.whole("moe_layer_freq", default=1)
    dense = f.listed("mlp_only_layers") or []
    return [i >= first and (i + 1) % step == 0 and i % frequency == 0 and i not in dense for i in range(count)]


# --- attention
def _attention(f: Fields, window: int | None, kv_heads: object = None) -> Mixer:
    hidden, heads = hidden_size(f), f.whole("num_attention_heads", "n_head", "num_heads", "n_heads", most=DEEPEST)
    kv = _kv_heads(f, heads, kv_heads)
    name = f.has("head_dim", "d_kv")
    if name is None and hidden % heads:
        raise ModelError(
            f"{f.where}: {heads} attention heads do not divide hidden_size {hidden}, expected head_dim: add the field"
        )
    size = f.whole(name) if name else hidden // heads
    gated = f.flag("attn_output_gate", f.family in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"))
    queries = heads * size * (2 if gated else 1)
    parts = (("qkv", queries + 2 * kv * size, hidden, "column"), ("o", hidden, heads * size, "row"))
    cached = 0 if f.family in ENCODERS else 2 * kv * size
    return Mixer(parts, Attention(heads, kv, size, size, cached, window))


def _kv_heads(f: Fields, heads: int, own: object) -> int:
    """`own`: what a list of the config says of this layer."""
    if f.family == "gpt_bigcode" or (f.family == "falcon" and not f.flag("new_decoder_architecture", False)):
        return 1 if f.flag("multi_query", True) else heads
    kv = f.whole("num_key_value_heads", "num_kv_heads", default=heads, most=DEEPEST) if own is None else own
    if type(kv) is not int or kv < 1 or heads % kv:
        raise ModelError(
            f"{f.where}: {show(kv)} key-value heads arrived for {heads} heads, expected a divisor of them: fix it"
        )
    return kv


def _latent_attention(f: Fields, window: int | None) -> Mixer:
    """MLA as decoding runs it, the up-projection of keys and values absorbed: all heads read one latent."""
    hidden, heads = hidden_size(f), f.whole("num_attention_heads", most=DEEPEST)
    rank, rope = f.whole("kv_lora_rank"), f.whole("qk_rope_head_dim")
    nope, value = f.whole("qk_nope_head_dim"), f.whole("v_head_dim")
    parts: list[Part] = []
    latent = f.whole("q_lora_rank") if f.has("q_lora_rank") else 0
    if latent:
        parts += [("q_a", latent, hidden, "none")]
    parts += [
        ("q_b", heads * (nope + rope), latent or hidden, "column"),
        ("kv_a", rank + rope, hidden, "none"),
        ("kv_b", heads * (nope + value), rank, "column"),
        ("o", hidden, heads * value, "row"),
    ]
    indexed = 0
    if f.has("index_n_heads"):  # DeepSeek-V3.2: a small attention that chooses, with one key a token of its own
        lanes, indexed = f.whole("index_n_heads"), f.whole("index_head_dim")
        parts += [("index_q", lanes * indexed, latent or hidden, "none"), ("index_k", indexed + lanes, hidden, "none")]
    return Mixer(tuple(parts), Attention(heads, 1, rank + rope, rank, rank + rope + indexed, window))


# --- constant states
def _mamba(f: Fields) -> Mixer:
    hidden, states = hidden_size(f), f.whole("state_size", "mamba_d_state", default=16)
    kernel = f.whole("conv_kernel", "mamba_d_conv", default=4)
    inner = hidden * f.whole("expand", "mamba_expand", default=2)
    if f.family != "jamba":  # whose intermediate_size is that of its MLPs
        inner = f.whole("intermediate_size", default=inner)
    rank_name = f.has("time_step_rank", "mamba_dt_rank")
    automatic = rank_name is None or f.config[rank_name] == "auto"
    rank = -(-hidden // 16) if automatic or rank_name is None else f.whole(rank_name)
    parts = (
        ("state_in", 2 * inner, hidden, "column"),
        ("scan", inner, kernel + states, "column"),
        ("x", rank + 2 * states, inner, "row"),
        ("dt", inner, rank, "column"),
        ("state_out", hidden, inner, "row"),
    )
    return Mixer(parts, state=State(inner * (states + kernel), _state_bytes(f)))


def _mamba2(f: Fields) -> Mixer:
    hidden, states = hidden_size(f), f.whole("state_size", "ssm_state_size", "mamba_d_state")
    mixed = f.family != "mamba2"  # there head_dim and num_heads belong to attention
    heads = f.whole("mamba_num_heads", "mamba_n_heads") if mixed else f.whole("num_heads")
    size = f.whole("mamba_head_dim", "mamba_d_head") if mixed else f.whole("head_dim")
    groups, kernel = f.whole("n_groups", "mamba_n_groups"), f.whole("conv_kernel", "mamba_d_conv", default=4)
    f.has("expand", "mamba_expand")  # says the same as heads * size
    inner = heads * size
    mixed_width = inner + 2 * groups * states
    parts = (
        ("state_in", inner + mixed_width + heads, hidden, "column"),
        ("scan", mixed_width, kernel, "column"),
        ("state_out", hidden, inner, "row"),
    )
    return Mixer(parts, state=State(inner * states + mixed_width * kernel, _state_bytes(f)))


def _delta(f: Fields) -> Mixer:
    hidden, kernel = hidden_size(f), f.whole("linear_conv_kernel_dim")
    key, value = f.whole("linear_key_head_dim"), f.whole("linear_value_head_dim")
    keys, values = f.whole("linear_num_key_heads") * key, f.whole("linear_num_value_heads") * value
    heads = values // value
    parts = (
        ("state_in", 2 * keys + 2 * values + 2 * heads, hidden, "column"),
        ("scan", 2 * keys + values, kernel, "column"),
        ("state_out", hidden, values, "row"),
    )
    return Mixer(parts, state=State(heads * key * value + (2 * keys + values) * kernel, _state_bytes(f)))


def _state_bytes(f: Fields) -> float:
    name = f.has("mamba_ssm_cache_dtype", "mamba_ssm_dtype")
    return 2.0 if name and f.config[name] in ("float16", "bfloat16") else 4.0


# --- feeds
def _width(f: Fields) -> int:
    if f.family == "llama4_text":
        return f.whole("intermediate_size_mlp")
    if f.family in ("gpt2", "falcon", "bloom", "mpt", "gptj", "gpt_neo", "gpt_bigcode"):
        names, default = ("n_inner", "ffn_hidden_size", "intermediate_size"), 4 * hidden_size(f)
        return f.whole(*names, default=default)
    return f.whole("intermediate_size", "ffn_dim", "d_ff", "hidden_dim")


def _mlp(f: Fields, width: int, name: str = "", into: int | None = None) -> Feed:
    outer = into or hidden_size(f)
    return Feed(((f"{name}up", width * (2 if _gated(f) else 1), outer, "column"), (f"{name}down", outer, width, "row")))


def _gated(f: Fields) -> bool:
    if f.family not in T5:
        return f.family not in _UNGATED
    f.has("feed_forward_proj", "is_gated_act", "dense_act_fn")
    return f.text("feed_forward_proj", "relu").startswith("gated")


def _experts(f: Fields, count: int) -> Feed:
    hidden = hidden_size(f)
    width = f.whole("moe_intermediate_size", "intermediate_size")
    chosen = f.whole("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_top_k", most=count)
    parts: tuple[Part, ...] = (("router", count, hidden, "none"),)
    if f.has("shared_expert_intermediate_size"):
        parts += _mlp(f, f.whole("shared_expert_intermediate_size"), "shared_").parts
        parts += (("shared_gate", 1, hidden, "none"),)
    elif f.family == "llama4_text":
        parts += _mlp(f, width, "shared_").parts
    elif shared := f.whole("n_shared_experts", "num_shared_experts", default=0, least=0):
        each = f.whole("moe_shared_expert_intermediate_size", default=width)
        parts += _mlp(f, shared * each, "shared_").parts
    latent = f.whole("moe_latent_size", default=0)  # Nemotron 3: experts work on fewer numbers than the layer
    if latent:
        parts += (("latent_in", latent, hidden, "none"), ("latent_out", hidden, latent, "none"))
    return Feed(parts, _mlp(f, width, "expert_", latent or None).parts, count, chosen)

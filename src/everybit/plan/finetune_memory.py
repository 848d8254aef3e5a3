"""Memory of a fine-tune: what a device keeps whatever the batch, and what each sequence adds.

Sources: states and ZeRO stages, Rajbhandari et al. 2020 (arXiv 1910.02054); activations, Korthikanti et al. 2022 (arXiv
2205.05198); LoRA, Hu et al. 2021 (arXiv 2106.09685); QLoRA, Dettmers et al. 2023 (arXiv 2305.14314).
"""

from __future__ import annotations

from dataclasses import dataclass

from everybit.plan.operators import Layer, Linear, Model

METHODS = ("full", "lora", "qlora")
RECOMPUTES = ("none", "selective", "full")
# Bytes a trained weight, its master copy in fp32 included. 8-bit Adam: two states of a byte (Dettmers et al. 2022).
OPTIMIZERS = {"adamw": 12.0, "adam8bit": 6.0, "sgd": 8.0}
NF4_BITS = 4.127  # with doubly quantized constants, QLoRA section 3


@dataclass(frozen=True, slots=True)
class Offload:
    """Where states lie that leave the device: `bytes` of room and speed for each device's share (host memory or NVMe).

    `weights`: the 16-bit weights go too, not only the optimizer's states. `link_bytes_per_s`: device to host and back.
    `hidden`: the part of the optimizer's update that runs beside the passes: 0 in ZeRO-Infinity, between in Deep
    Optimizer States, 1 in Fuyou.
    """

    bytes: float
    bytes_per_s: float
    link_bytes_per_s: float
    weights: bool = False
    hidden: float = 0.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. `zero`: stage 0 to 3. `batch`: sequences a device takes at once; None: as many as fit.
    `accumulate`: such batches before an update. `rank`: of adapters; `experts`: they are beside routed experts, too
    (target_parameters of PEFT). `base_bits`: of frozen weights; None: 16, or NF4's for qlora."""

    method: str
    sequence: int
    batch: int | None = None
    accumulate: int = 1
    optimizer: str = "adamw"
    zero: int = 0
    recompute: str = "none"
    rank: int = 16
    experts: bool = False
    base_bits: float | None = None
    offload: Offload | None = None

    def __str__(self) -> str:
        batch = "" if self.batch is None else f", batch {self.batch}"
        return f"{self.method}, ZeRO {self.zero}, recompute {self.recompute}{batch}"


@dataclass(frozen=True, slots=True)
class Parts:
    """Bytes of one device, `offloaded` ones apart. `working`: weights gathered or unpacked while a layer runs."""

    weights: float
    gradients: float
    optimizer: float
    working: float
    reserve: float
    activations: float
    offloaded: float

    @property
    def fixed(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.working + self.reserve

    @property
    def total(self) -> float:
        return self.fixed + self.activations


def trained_weights(model: Model, recipe: Recipe) -> int:
    return model.parameters if recipe.method == "full" else adapter_weights(model, recipe)


def adapter_weights(model: Model, recipe: Recipe, token: bool = False) -> int:
    """Adapters as PEFT's "all-linear" puts them: beside each linear module of the layers as transformers has them,
    which is not beside experts. `token`: those alone that one token meets."""
    total = 0
    for layer in model.layers:
        met = active(layer) if token else every(layer)
        adapted = met if recipe.experts else met[: len(layer.linears)]
        total += layer.count * sum(n * (one.out + one.modules * one.into) for one, n in adapted if one.modules)
    return recipe.rank * total


def active_weights(model: Model) -> int:
    """Weights that one token is multiplied by: of experts the chosen ones, the head, no table of embeddings."""
    layers = sum(times * layer.count * linear.weights for layer in model.layers for linear, times in active(layer))
    return layers + (model.head.weights if model.head else 0)


def state_parts(model: Model, recipe: Recipe, count: int) -> Parts:
    """What one of `count` devices keeps whatever the batch: 2 + 2 + 12 bytes a weight with AdamW, before ZeRO."""
    trained, full = trained_weights(model, recipe), recipe.method == "full"
    base = 0.0 if full else base_bytes(model, recipe)
    weights = (base + 2.0 * trained) / (count if recipe.zero == 3 else 1)
    gradients = 2.0 * trained / (count if recipe.zero >= 2 else 1)
    optimizer = OPTIMIZERS[recipe.optimizer] * trained / (count if recipe.zero >= 1 else 1)
    away = recipe.offload
    gone = (optimizer if away else 0.0) + (weights if away and away.weights else 0.0)
    packed = not full and _base_bits(recipe) < 16
    largest = max(sum(times * linear.weights for linear, times in every(layer)) for layer in model.layers)
    gathers = recipe.zero == 3 or (away is not None and away.weights)
    one = max(linear.weights for layer in model.layers for linear, _ in every(layer))
    return Parts(
        weights=0.0 if away and away.weights else weights,
        gradients=gradients,
        optimizer=0.0 if away else optimizer,
        working=2.0 * largest if gathers else 2.0 * one if packed else 0.0,
        reserve=0.0,
        activations=0.0,
        offloaded=gone,
    )


def activation_bytes(model: Model, sequence: int, recompute: str) -> float:
    """Of one sequence, 16-bit activations and 8-bit dropout masks, Korthikanti et al. 2022, sections 4 and 5.

    A GPT block comes to sequence * hidden * (34 + 5 * heads * sequence / hidden). Written over linears it holds for
    gated MLPs, grouped heads and experts too: outputs of column-split linears and inputs of row-split ones are kept (20
    of the 34), and 14 for norms, inputs and masks. `selective` drops the scores (as FlashAttention does); `full` keeps
    the input of each layer, and one layer as `selective` has it. The head's input and its logits in fp32 come on top.
    """
    layers = [(layer.count, _layer_bytes(model, layer, sequence, recompute)) for layer in model.layers]
    head = 4.0 * sequence * (model.hidden + model.vocabulary)
    if recompute == "full":
        return head + 2.0 * sequence * model.hidden * sum(n for n, _ in layers) + max(one for _, one in layers)
    return head + sum(n * one for n, one in layers)


def _layer_bytes(model: Model, layer: Layer, sequence: int, recompute: str) -> float:
    kept = sum(times * (linear.into if linear.split == "row" else linear.out) for linear, times in active(layer))
    scores = 0.0
    if layer.attention and recompute == "none":
        seen = min(sequence, layer.attention.window or sequence)
        scores = 5.0 * layer.attention.heads * sequence * seen
    return sequence * (2.0 * kept + 10.0 * model.hidden) + scores


def every(layer: Layer) -> list[tuple[Linear, int]]:
    """Each linear of one layer and how often it is there, those of experts last."""
    routed = [(linear, layer.experts.count) for linear in layer.experts.linears] if layer.experts else []
    return [(linear, 1) for linear in layer.linears] + routed


def active(layer: Layer) -> list[tuple[Linear, int]]:
    """The same as one token meets it."""
    routed = [(linear, layer.experts.chosen) for linear in layer.experts.linears] if layer.experts else []
    return [(linear, 1) for linear in layer.linears] + routed


def _base_bits(recipe: Recipe) -> float:
    return recipe.base_bits or (NF4_BITS if recipe.method == "qlora" else 16.0)


def base_bytes(model: Model, recipe: Recipe) -> float:
    """Frozen weights: those of layers in `base_bits`, embeddings and head in 16."""
    packed = sum(times * layer.count * linear.weights for layer in model.layers for linear, times in every(layer))
    return packed * _base_bits(recipe) / 8 + (model.parameters - packed) * 2.0

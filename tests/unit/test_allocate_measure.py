"""What a plan is chosen by: KL of plans, costs kept in a file, units, texts and times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everybit
from everybit import evaluate
from everybit.allocate import divergence as divergence_module
from everybit.allocate import latency, sensitivities, texts
from everybit.allocate.budget import price_bytes, price_ms
from everybit.allocate.divergence import Divergence, divergences
from everybit.allocate.sensitivities import Store, measure
from everybit.allocate.units import Unit, assignment, find_units
from everybit.engine.plan import Plan, identity
from everybit.engine.runtime import Runtime
from everybit.errors import FormatError, OutputError, SourceError
from everybit.formats import Overlay, WeightSpec
from everybit.tokenizer import Tokenizer

WINDOWS = [[1, *range(40, 70)], [1, *range(100, 120)], [1, 5]]


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("measure") / "overlay"
    everybit.quantize(tiny_llama, out, bits=(2, 4, 8), override={"layers.0.mlp.down_proj": (3,)}, progress=False)
    return out


@pytest.fixture(scope="module")
def runtime(folder: Path) -> Runtime:
    return Runtime.open(folder, threads=2)


def exact_kl(logits: Any, others: Any) -> Any:
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (logits, others))
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1)


@pytest.mark.parametrize("noise", [1e-3, 1e-2, 1.0, 30.0, 200.0])
def test_kl_in_float32_is_that_in_float64(noise: float) -> None:
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (50, 300)).astype(np.float32)
    others = logits + random.normal(2, noise, logits.shape).astype(np.float32)  # a shift by 2 is no difference
    p = np.empty_like(logits)
    divergence_module._softmax(logits, p)
    wanted = exact_kl(logits.astype(np.float64), others.astype(np.float64))
    # c carries the rounding of a difference of about 2, 1.2e-7: of a c of 1e-3 that is 1e-4, and of its square, the KL,
    # twice as much.
    np.testing.assert_allclose(divergences(logits, p, others), wanted, rtol=1e-3)


def test_kl_of_precisions_is_what_evaluate_says(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = evaluate.EngineModel(runtime), evaluate.EngineModel(runtime)
    windows = evaluate.Windows(WINDOWS, 1)
    report = evaluate.evaluate(
        model, (2, 4, 8), windows, reference, set_precision=model.set_precision, progress=False, threads=2
    )
    found = Divergence(runtime, WINDOWS, 8).of([2, 4, 8])
    assert found == pytest.approx([row.kl_mean for row in report.rows], rel=1e-4)
    assert found[0] > found[1] > found[2] == 0
    monkeypatch.setattr(divergence_module, "HELD_BYTES", 25 * 8 * runtime.vocabulary)  # windows one by one
    monkeypatch.setattr(divergence_module, "SLICE_BYTES", 4 * runtime.vocabulary)  # rows one by one
    pieces = Divergence(runtime, WINDOWS, 8)
    assert len(pieces._chunks) == 2
    assert pieces.of([2, 4, 8]) == pytest.approx(found, rel=1e-6)


def test_units(folder: Path) -> None:
    with Overlay.open(folder) as overlay:
        single, layers = find_units(overlay), find_units(overlay, "layer")
        assert [unit.name for unit in single] == list(overlay.weights)
        assert [unit.name for unit in layers] == ["model.layers.0", "model.layers.1"]
        fixed = next(unit for unit in single if unit.name == "model.layers.0.mlp.down_proj.weight")
        assert fixed.choices == (3,)
        assert {unit.choices for unit in single if unit is not fixed} == {(2, 4, 8)}
        assert [unit.choices for unit in layers] == [(2, 4, 8), (2, 4, 8)]  # at 3 it would be as at 2
        for units in (single, layers):
            for bits in overlay.bits:
                whole = assignment(
                    units, {unit.name: unit.choices[0] if len(unit.choices) == 1 else bits for unit in units}
                )
                assert whole == {name: spec.served_bits(bits) for name, spec in overlay.weights.items()}
                for kind in ("bpw", "bytes"):
                    prices = price_bytes(overlay, units, kind)
                    total = sum(of.get(bits, next(iter(of.values()))) for of in prices.of.values())
                    size = overlay.sizes().rows[bits]
                    wanted = size.bpw if kind == "bpw" else size.bytes
                    assert total * prices.scale + prices.fixed == pytest.approx(wanted)


class Counting(Divergence):
    """Remembers how many candidates it was asked for; stops after `most`."""

    asked = 0
    most = 1000

    def of(self, candidates: Any) -> list[float]:
        if self.asked + len(candidates) > self.most:
            raise KeyboardInterrupt
        Counting.asked += len(candidates)
        return super().of(candidates)


def test_costs_are_kept_and_a_killed_run_goes_on(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = runtime.checkpoint.overlay
    assert overlay is not None
    units, name, path = find_units(overlay), identity(overlay), tmp_path / "s.json"
    monkeypatch.setattr(sensitivities, "SAVE_S", 0.0)
    monkeypatch.setattr(sensitivities, "BATCH", 4)
    monkeypatch.setattr(Counting, "asked", 0)

    def costs(settings: dict[str, Any]) -> Any:
        store = Store.open(path, settings)
        return measure(name, units, lambda top: Counting(runtime, WINDOWS, top), store, progress=False)

    monkeypatch.setattr(Counting, "most", 14)
    with pytest.raises(KeyboardInterrupt):
        costs({"text": "a"})
    assert Counting.asked == 12
    monkeypatch.setattr(Counting, "most", 1000)
    first = costs({"text": "a"})
    assert Counting.asked == 26  # 13 weights at 2 and 4 bits
    assert costs({"text": "a"}) == first
    assert Counting.asked == 26
    costs({"text": "b"})
    assert Counting.asked == 52
    assert costs({"text": "a"}) == first  # the other entry is still there
    assert list(tmp_path.iterdir()) == [path]
    for unit in units:
        assert tuple(first[unit.name]) == unit.choices
        assert first[unit.name][unit.choices[-1]] == 0
        if len(unit.choices) > 1:
            assert first[unit.name][2] > first[unit.name][4] > 0
    down = "model.layers.1.mlp.down_proj.weight"
    alone = Plan.of(overlay, {**{n: s.served_bits(8) for n, s in overlay.weights.items()}, down: 2})
    assert first[down][2] == pytest.approx(Divergence(runtime, WINDOWS, 8).of([alone])[0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(everybit_sensitivities=9),
        lambda d: d.update(entries=[]),
        lambda d: d.update(more=1),
        lambda d: next(iter(d["entries"].values())).pop("costs"),
        lambda d: next(iter(d["entries"].values()))["costs"].update(w=3),
        lambda d: next(iter(d["entries"].values()))["costs"].update(w={"x": 1.0}),
        lambda d: next(iter(d["entries"].values()))["costs"].update(w={"2": -1.0}),
        lambda d: next(iter(d["entries"].values()))["costs"].update(w={"2": float("nan")}),
        lambda d: next(iter(d["entries"].values()))["costs"].update(w={"2": None}),
        lambda d: d["entries"].update(dict.fromkeys(d["entries"], 3)),
    ],
)
def test_damaged_costs_are_refused(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "s.json"
    Store.open(path, {"a": 1}).save()
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(FormatError, match="remove"):
        Store.open(path, {"a": 1})


def test_a_place_that_cannot_be_written_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="--cache FILE"):
        Store.open(tmp_path / "absent" / "s.json", {}).save()


def test_windows_are_spread_over_the_text(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("<|endoftext|>\n".join(letter * 63 + "\n" for letter in "abcdefgh"))
    tokenizer = Tokenizer.open(folder)
    found = texts.from_file(text, tokenizer, 65, 130)
    assert [tokenizer.decode(window[1:3]) for window in found] == ["cc", "gg"]
    assert len(texts.from_file(text, tokenizer, 65, 10**6)) == 8
    assert [len(window) for window in texts.from_file(text, tokenizer, 65, 10)] == [11]


def test_the_models_own_text_is_seeded_and_as_long_as_asked(runtime: Runtime, folder: Path) -> None:
    tokenizer = Tokenizer.open(folder)
    first = texts.from_model(runtime, tokenizer, 20, 50)
    assert first == texts.from_model(runtime, tokenizer, 20, 50)
    assert sum(len(window) - 1 for window in first) in range(40, 51)
    assert len({tuple(window) for window in first}) == len(first) >= 3

    class Silent:
        eos_ids = frozenset(range(runtime.vocabulary))

        def encode(self, text: str) -> list[int]:
            return [0]

    with pytest.raises(SourceError, match="the model wrote 0 tokens in 64 texts, 5 are wanted"):
        texts.from_model(runtime, Silent(), 20, 5)  # type: ignore[arg-type]


def test_times_are_medians_in_turns(runtime: Runtime) -> None:
    now = [0.0]
    slow = {2: 0.001, 8: 0.004}
    decode = runtime.decode

    class Timed:
        context, vocabulary = runtime.context, runtime.vocabulary
        reset, prefill = runtime.reset, runtime.prefill
        calls: list[int] = []  # noqa: RUF012

        def decode(self, tokens: list[int], bits: int) -> Any:
            self.calls.append(bits)
            now[0] += slow[bits] if len(self.calls) % 7 else 1.0  # a hiccup now and then
            return decode(tokens, bits)

    timed = Timed()
    found = latency.measure_ms(timed, [2, 8], clock=lambda: now[0])  # type: ignore[arg-type]
    assert found == pytest.approx([1.0, 4.0])
    turns = [bits for bits, before in zip(timed.calls[1:], timed.calls, strict=False) if bits != before]
    assert len(turns) >= 2 * latency.ROUNDS - 1


def test_a_prediction_is_shares_of_a_table(runtime: Runtime) -> None:
    specs = [
        WeightSpec(name, (rows, 8), bits) for name, rows, bits in (("a", 30, (2, 4)), ("b", 10, (2, 4)), ("c", 9, (8,)))
    ]
    units = [Unit(spec.name, (spec,), spec.bits) for spec in specs]
    share = latency.shares(runtime, units)
    assert share == {"a": 0.75, "b": 0.25}
    table = {2: 10.0, 4: 20.0}
    assert latency.predict_ms(units, {"a": 2, "b": 4, "c": 8}, share, table) == 12.5
    prices = price_ms(units, share, table)
    assert prices.of == {"a": {2: 7.5, 4: 15.0}, "b": {2: 2.5, 4: 5.0}, "c": {8: 0.0}}
    outside = Unit("d", (WeightSpec("d", (10, 8), (2, 4, 7)),), (2, 4, 7))
    share = latency.shares(runtime, [outside])
    assert price_ms([outside], share, table).of == {"d": {2: 10.0, 4: 20.0}}  # nothing to measure 7 by
    assert latency.predict_ms([outside], {"d": 7}, share, table) is None

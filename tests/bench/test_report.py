"""The HTML report: what it says and escapes, as text; and how it behaves in a browser, opened from a file.

The browser tests need playwright and a Chromium (see scripts/screenshots.py). Where those are missing they skip, or
fail with EVERYBIT_REQUIRE_BROWSER=1.
"""

from __future__ import annotations

import copy
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from everybit.bench.fluidity import Deadlines
from everybit.bench.metrics import measure
from everybit.bench.records import MS, SECOND, Record
from everybit.bench.report import render, render_many, write_report
from everybit.bench.report.figures import duration, number, percent, share_figure
from everybit.bench.report.pareto import undominated
from everybit.bench.report.scale import Scale, around, from_zero
from everybit.bench.result import run_document, series_document, validity
from everybit.bench.targets import Targets, Window, parse_slo
from everybit.errors import OutputError, SourceError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = "</script><img src=x onerror=\"window.pwned=1\"><b>'bold'</b>&amp;\u202e\ud800\x00"
SLO = "ttft=200ms,tpot=40ms,share=0.99"


def one_record(number: int, dice: random.Random, rate: float, gap_ms: float, nasty: bool) -> Record:
    intended = int(number * SECOND / rate)
    sent = intended + dice.randrange(20_000, 400_000)
    prompt, tokens = dice.randrange(20, 900), dice.randrange(30, 90)
    record = Record(number, number, 0, 0, intended, sent, status=200, usage_prompt=prompt, source="usage")
    now = sent + int((90 + prompt / 20 + dice.expovariate(0.1)) * MS)
    bits = 8
    for token in range(tokens):
        record.times_ns.append(now)
        record.tokens.append(1)
        if nasty:
            bits = dice.choice((8, 8, 6, 4, 3)) if token % 12 == 0 else bits
            record.bits.append(bits)
        now += int(gap_ms * MS * dice.uniform(0.8, 1.2))
        if nasty and dice.random() < 0.006:
            now += dice.randrange(300, 2500) * MS
    record.end_ns = record.times_ns[-1] + MS // 4
    record.usage_output = record.counted = tokens
    if nasty and number % 13 == 5:
        record.error, record.status, record.detail = "busy", 429, HOSTILE
        record.times_ns, record.tokens, record.bits = [], [], []
        record.end_ns = sent + 30 * MS
    elif nasty and number % 31 == 7:
        record.error, record.detail = "cut", "the connection ended after 3 of 5 chunks"
    elif nasty and number % 17 == 3:
        record.counted, record.stalled = tokens // 2, True
    return record


def run_of(
    count: int = 120,
    rate: float = 20.0,
    gap_ms: float = 20.0,
    *,
    nasty: bool = False,
    model: str = "mill-1b",
    seed: int = 1,
) -> dict[str, Any]:
    dice = random.Random(seed)
    records = [one_record(number, dice, rate, gap_ms, nasty) for number in range(count)]
    window = Window(SECOND if nasty else 0, int(count / rate * SECOND))
    targets = Targets(Deadlines(300 * MS, 30 * MS), parse_slo(SLO))
    return run_document(
        command=["everybit", "bench", "http://127.0.0.1:8000", "--rate", f"{rate:g}"],
        created="2026-11-26T12:00:00+00:00",
        endpoint={"url": "http://127.0.0.1:8000/v1", "model": model, "api": "chat"},
        load={"kind": "open loop", "seed": seed, "starts": {"kind": "poisson", "rate": rate}, "notes": []},
        targets=targets,
        window=window,
        records=records,
        metrics=measure(records, window, targets),
        validity=validity(records, window, 150 * MS if nasty else 0),
        energy={
            "status": "measured",
            "sources": ["RAPL package-0"],
            "joules": 812.0,
            "joules_per_output_token": 0.4 * gap_ms,
        },
    )


def series(kind: str, block: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    return series_document(kind, command=["everybit", "bench", kind], created="2026-11-26", block=block, runs=runs)


def capacity_of() -> dict[str, Any]:
    shares = {5.0: 1.0, 10.0: 0.998, 14.0: 0.991, 16.0: 0.93, 20.0: 0.55}
    points = [
        {"rate": rate, "share": share, "interval": [max(0, share - 0.04), min(1, share + 0.005)], "runs": 1,
         "achieved_rate": min(rate, 15.5), "goodput": min(rate, 15.5) * share}
        for rate, share in shares.items()
    ]  # fmt: skip
    block = {"verdict": "found", "rate": 14.0, "bracket": [14.0, 16.0], "confidence": 0.97, "points": points}
    return series(
        "capacity", {**block, "reason": "the bracket is narrow enough"}, [run_of(60, r, 10 + r) for r in shares]
    )


def sweep_of() -> dict[str, Any]:
    models = [f"m@{bits}bit" for bits in (2, 3, 4, 6, 8)]
    runs = [run_of(60, 10, 8 + 4 * place, model=model) for place, model in enumerate(models)]
    document = series("sweep", {"over": "model", "values": models}, runs)
    losses = (5.9, 4.1, 3.66, 3.7, 3.61)
    document["quality"] = {
        model: {"value": loss, "unit": "nats/token", "lower_is_better": True}
        for model, loss in zip(models, losses, strict=True)
    }
    return document


def interval(low: float, value: float, high: float) -> dict[str, float]:
    return {"low": low, "value": value, "high": high}


def compare_of() -> dict[str, Any]:
    rows = [
        {"name": "ttft p50 ms", "a": 105.0, "b": 131.0, "ratio": interval(1.19, 1.25, 1.31), "verdict": "A is better"},
        {"name": "tpot p50 ms", "a": 20.1, "b": 20.0, "ratio": interval(0.97, 0.995, 1.02), "verdict": "faster"},
        {"name": "fluidity", "a": 0.98, "b": 0.97, "ratio": None, "difference": interval(-0.03, -0.01, 0.01)},
    ]
    runs = [run_of(40, seed=seed) for seed in range(4)]
    return series("compare", {"labels": ["ours", "theirs"], "rounds": 2, "rows": rows}, runs)


def sustain_of() -> dict[str, Any]:
    slices = [
        {"begin_s": i * 30, "end_s": i * 30 + 30, "tokens_per_s": 900 - 8 * i, "tpot_p50_ms": 20 + 0.2 * i}
        for i in range(20)
    ]
    return series("sustain", {"slices": slices, "decay": {"share": 0.17, "low": 0.15, "high": 0.19}}, [run_of(60)])


def audit_of() -> dict[str, Any]:
    verdicts = [
        {
            "claim": claim,
            "verdict": verdict,
            "confidence": 1.0,
            "distances": {name: {"rms": rms, "mean": rms, "max": 9.0} for name, rms in (("4", 0.001), ("8", 0.2))},
        }
        for claim, verdict in (("4", "confirmed"), ("8", "mismatch"))
    ]
    verdicts.append({**verdicts[0], "claim": "2", "verdict": "unknown", "distances": {}, "confidence": None})
    return series("audit", {"verdicts": verdicts, "lines": ["       4 m@4bit: confirmed"]}, [])


def selftest_of() -> dict[str, Any]:
    return series("selftest", {"rows": [{"what": "gaps", "error": 0.1}], "ok": False, "lines": ["gaps TOO FAR"]}, [])


ALL = {
    "run": run_of,
    "nasty": lambda: run_of(200, 20, 24, nasty=True, model=HOSTILE),
    "dense": lambda: run_of(500, 40, 24, nasty=True),
    "capacity": capacity_of,
    "sweep": sweep_of,
    "rates": lambda: series(
        "sweep", {"over": "rate", "values": [5, 10, 20]}, [run_of(60, r, r + 10) for r in (5, 10, 20)]
    ),
    "compare": compare_of,
    "sustain": sustain_of,
    "audit": audit_of,
    "selftest": selftest_of,
}


class Reader(HTMLParser):
    """The elements of a page, and whether each is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name != "meta":
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == name]


# --- the page as text
@pytest.mark.parametrize("kind", ALL)
def test_every_kind_is_well_formed_and_asks_for_nothing_outside(kind: str) -> None:
    page = Reader(render(ALL[kind]()))
    for name, attributes in page.elements:
        assert not {"src", "href", "style", "srcset", "action"} & set(attributes)
        assert not [key for key in attributes if key.startswith("on")]
        assert name not in ("img", "link", "iframe", "object")
    assert len(page.named("script")) == 2
    for path in page.named("path"):
        assert re.fullmatch(r"M-?[\d.]+ [-\d.MLVHZvhml e]*", str(path["d"])), path
    numbers = [value for _, attributes in page.elements for value in attributes.values() if value]
    assert not [value for value in numbers if re.search(r"\b(nan|inf|None)\b", value)]


def test_what_users_wrote_is_text() -> None:
    page = render(ALL["nasty"]())
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert "&lt;img src=x onerror=&quot;" in page
    assert not re.search("[\ud800-\udfff\u202e\x00]", page)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert data is not None
    assert json.loads(data[1])["endpoint"]["model"] == HOSTILE
    hostile = compare_of()
    hostile["compare"]["labels"][1] = hostile["compare"]["rows"][0]["name"] = HOSTILE
    assert "<img" not in render(hostile)
    assert "<img" not in render_many([run_of(), run_of()], [HOSTILE, "b"])


def test_the_verdict_is_the_heading() -> None:
    document = run_of()
    metrics = document["metrics"]
    first, pace = metrics["latency"]["ttft_ms"], metrics["latency"]["tpot_ms"]
    heading = f"20 requests/s for 6 s: first token {first['p50']:.0f} ms (p99 {first['p99']:.0f} ms), "
    heading += f"then {1000 / pace['p50']:.1f} tokens/s; 100 % kept the SLO; fluidity 1.00; no failures"
    assert f"<h1>{heading}</h1>" in render(document)


def test_doubts_come_before_figures() -> None:
    document = ALL["nasty"]()
    page = render(document)
    tiles = page.index('class="tiles"')
    for said in (
        *document["validity"]["reasons"],
        "TOKEN COUNTS DIFFER",
        "requests failed",
        "role=&quot;alert" and 'role="alert"',
    ):
        assert page.index(said) < tiles, said
    assert "role=" not in render(run_of()).split('class="tiles"')[0]


def test_a_run_without_a_complete_request_says_why() -> None:
    document = run_of(20)
    document["metrics"] = document["energy"] = None
    document["validity"] = {
        "valid": False,
        "reasons": ["nothing to measure: 20 requests, none complete: busy 20"],
        "warnings": [],
    }
    page = render(document)
    assert "<h1>Nothing was measured</h1>" in page
    assert "busy 20" in page
    assert 'class="tiles"' not in page


@pytest.mark.parametrize("kind", ["nasty", "capacity", "sweep", "compare", "sustain", "audit"])
def test_what_is_absent_is_left_out(kind: str) -> None:
    document = run_of(40, nasty=True) if kind == "nasty" else ALL[kind]()
    for name in set(document) - {"kind"}:
        assert render({key: value for key, value in document.items() if key != name}).endswith("</html>\n")
    if kind == "nasty":
        for name in ("goodput", "over_ideal", "precision", "stalls", "cached_share", "timeline", "latency"):
            shorter = copy.deepcopy(document)
            shorter["metrics"][name] = None
            assert render(shorter).endswith("</html>\n")
        for name in document["metrics"]["latency"]:
            shorter = copy.deepcopy(document)
            shorter["metrics"]["latency"][name] = None
            assert render(shorter).endswith("</html>\n")
    else:
        for name in document[kind]:
            shorter = copy.deepcopy(document)
            del shorter[kind][name]
            assert render(shorter).endswith("</html>\n")


def test_a_cdf_goes_through_its_percentiles() -> None:
    document = run_of()
    figure = re.search(r"<b>Time to the first token</b>.*?</figure>", render(document))
    assert figure is not None
    low, high, begin, end, log = map(float, re.findall(r'data-x="(.*?)"', figure[0])[0].split())
    floor, top = map(float, re.findall(r'data-y="0 100 (\S+) (\S+) 0"', figure[0])[0])
    path = re.findall(r'd="M([\d. L]+)" class="line s0', figure[0])[0]
    points = [tuple(map(float, pair.split())) for pair in path.split("L")]
    assert log == 0
    for q in (50, 90, 99):
        x, y = points[2 * q]
        assert y == pytest.approx(floor + (top - floor) * q / 100, abs=0.06)
        ms = low + (x - begin) / (end - begin) * (high - low)
        assert ms == pytest.approx(
            document["metrics"]["latency"]["ttft_ms"][f"p{q}"], abs=0.06 * (high - low) / (end - begin)
        )


def test_each_request_is_a_line_with_its_stalls_and_failures() -> None:
    document = run_of(100, 20, 24, nasty=True)
    page = Reader(render(document))
    rows = [one for one in page.named("g") if one.get("class") == "row"]
    assert len(rows) == 100
    columns = document["requests"]["columns"]
    table = [dict(zip(columns, row, strict=True)) for row in document["requests"]["rows"]]
    stalled = sum(bool(row["stalls"]) and not row["error"] for row in table)
    assert stalled > 5
    assert len([one for one in page.named("path") if one.get("class") == "stall"]) == stalled
    crosses = [one for one in page.named("path") if one.get("class") == "cross bad"]
    assert len(crosses) == sum(bool(row["error"]) for row in table) > 5


def test_large_runs_stay_small() -> None:
    document = run_of(1500, 100, 20, nasty=True)
    page = render(document)
    without = page[: page.index('<script type="application/json"')]
    assert len(without) < 1_000_000
    assert "Requests by what they wait for" in page
    document["load"]["notes"] = ["x" * 2_000_000]
    page = render(document)
    assert 'id="data"' not in page
    assert len(page) < 1_000_000


def test_comparisons_say_indistinguishable() -> None:
    page = Reader(render(compare_of()))
    assert "indistinguishable in 2 of 3 figures" in page.text
    assert page.texts.count("indistinguishable") == 3  # one in the chart and two in the table
    assert "faster" not in page.text


def test_the_front_joins_what_nothing_beats() -> None:
    assert undominated([(1, 9), (2, 5), (3, 6), (4, 1), (4, 2), (1, 9)]) == [0, 1, 3, 5]
    page = Reader(render(sweep_of()))
    dots = [one for one in page.named("g") if str(one.get("class")).startswith("dots")]
    assert [one["class"] for one in dots] == ["dots s0", "dots s0", "dots s0", "dots soft", "dots s0"]
    assert "m@4bit, 6.40 J/token" in page.text


def test_capacity_shows_its_curve() -> None:
    page = Reader(render(capacity_of()))
    assert "Capacity 14 requests/s; 16 is too much" in page.text
    assert len([one for one in page.named("path") if one.get("class") == "span s0"]) == 5
    assert "asked for: 99 %" in page.text


def test_side_by_side_has_a_column_for_each() -> None:
    page = Reader(render_many([run_of(), capacity_of()], ["one", "two"]))
    assert "2 results side by side" in page.text
    assert "two: run 5, 20 requests/s" in page.text
    with pytest.raises(SourceError, match="2 results and 1 names"):
        render_many([run_of(), run_of()], ["one"])


def test_side_by_side_every_result_says_what_it_found() -> None:
    documents = {kind: ALL[kind]() for kind in ("run", "capacity", "compare", "sweep", "sustain", "audit", "selftest")}
    page = Reader(render_many(list(documents.values()), [f"my {kind}" for kind in documents]))
    for said in (
        *("first token", "Capacity 14 requests/s", "indistinguishable in 2 of 3", "5 runs over model", "B over A"),
        *("confirmed: 1, mismatch: 1, unknown: 1", "own error: too large", "asked for: 99 %", "gaps TOO FAR"),
    ):
        assert said in page.text, said
    for kind in documents:
        assert page.texts.count(f"my {kind}") >= 2, kind  # in the table, and above its own part or its figures
    assert Reader(render_many([audit_of(), selftest_of()], ["a", "b"])).texts.count("mismatch") == 1


def test_an_audit_is_a_matrix() -> None:
    page = render(audit_of())
    assert re.findall(r'<th scope="col">(.*?)</th>', page) == ["claim", "verdict", "from 4", "from 8", "confidence"]
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', page)
    assert rows[1] == ("8", "<td>mismatch</td><td><b>0.001</b></td><td><span>0.2</span></td><td>100 %</td>")
    assert rows[2][1].count("\u2013") == 3  # its tokens were others: no distance


def test_runs_over_short_times_and_interrupted_ones_are_marked() -> None:
    document = series("sweep", {"over": "rate", "values": [40, 50]}, [run_of(20, 40.0), run_of(60, 50.0)])
    document["runs"][0]["validity"]["warnings"].append("interrupted: measured until then")
    page = Reader(render(document))
    assert "40 requests/s, interrupted" in page.texts
    assert "50 requests/s" in page.texts
    assert "<h1>20 requests in 0.500 s: " in render(document["runs"][0])
    assert "the measured time is 0.5 s: no rates" in page.text
    assert not {"Output", "Goodput"} & set(Reader(render(document["runs"][0])).texts)
    bounded = run_of(60)
    bounded["metrics"]["fluidity"] |= {
        "fluid_token_rate_per_s": None, "bounded_by": "first token", "least_gap_p99_ms": None,
    }  # fmt: skip
    assert "fluid token rate bounded by" in render(bounded)
    assert "Fluid token rate" not in render(bounded)


def test_a_trend_over_too_short_a_time_is_none() -> None:
    document = sustain_of()
    document["sustain"]["decay"] = {"per_hour": -0.02, "low": -0.05, "high": 0.01, "verdict": "no trend"}
    assert "<h1>Throughput changes by -2.0% an hour (-5.0% to +1.0%): no trend</h1>" in render(document)
    document["sustain"]["decay"] |= {"low": -350.9, "high": 437.3}
    assert "<h1>Throughput: too short to tell a trend</h1>" in render(document)
    assert "per hour" not in Reader(render(document)).text


def test_lines_of_one_colour_differ_in_the_legend() -> None:
    page = Reader(render_many([run_of(20, seed=i) for i in range(8)], [f"r{i}" for i in range(8)]))
    keys = [str(one["class"]) for one in page.named("li") if str(one.get("class")).startswith("key")]
    assert len(set(keys[:8])) == 8
    assert keys[0] == "key s0"
    assert keys[6] == "key s0 dashed"


def test_energy_and_carbon_have_their_intervals() -> None:
    document = run_of(20)
    document["energy"]["carbon"] = {"intensity": "350-450", "grams": (0.09, 0.0789, 0.1015), "grams_above_idle": None}
    assert "0.0900 (0.0789 to 0.102)" in render(document)
    document["energy"] = {"status": "unavailable", "reason": "RAPL is readable by root only"}
    assert "Unavailable: RAPL is readable by root only." in render(document)


def test_a_report_is_written_whole_or_not(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", audit_of())
    assert (tmp_path / "report.html").read_text(encoding="utf-8").endswith("</html>\n")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(tmp_path / "taken", audit_of())
    with pytest.raises(OutputError, match="No such file"):
        write_report(tmp_path / "absent" / "report.html", audit_of())
    assert sorted(one.name for one in tmp_path.iterdir()) == ["report.html", "taken"]


def test_numbers_have_sensible_digits() -> None:
    assert [number(one) for one in (0.0, 0.012345, 1.2345, 20.0, 123.45, 12345.6, 1.2e13)] == [
        "0", "0.0123", "1.23", "20", "123", "12,346", "1.20e+13",
    ]  # fmt: skip
    assert (duration(0.5), duration(112.3), duration(1050), duration(None)) == (
        "0.500 ms",
        "112 ms",
        "1.05 s",
        "\u2013",
    )
    assert [percent(one) for one in (1.0, 0.99999, 0.992, 0.00001, 0.0)] == [
        "100 %",
        "99.9 %",
        "99.2 %",
        "0.1 %",
        "0 %",
    ]
    assert (share_figure(1.0), share_figure(0.99999), share_figure(0.98)) == ("1.00", "0.999", "0.98")


def test_axes_hold_their_values_at_round_ticks() -> None:
    dice = random.Random(3)
    for _ in range(500):
        values = [10 ** dice.uniform(-3, 6) for _ in range(dice.randrange(1, 9))]
        for scale in (around(values), from_zero(values), around(values, log=False)):
            assert scale.low <= min(values) or scale.low == 0
            assert scale.high >= max(values) * (1 - 1e-9)
            ticks = scale.ticks()
            assert 1 <= len(ticks) <= 13, (values, scale)
            assert [float(text.replace(",", "")) for _, text in ticks] == pytest.approx([value for value, _ in ticks])
            assert len({text for _, text in ticks}) == len(ticks)
    assert Scale(1, 100, log=True).share(10) == pytest.approx(0.5)


# --- the page in a browser
class Opened:
    """A report opened from a file, and what must not happen in it."""

    def __init__(self, browser: Browser, file: Path, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.addresses: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.context.on("request", lambda request: self.addresses.append(request.url))
        self.page.goto(file.as_uri())

    def close(self, file: Path) -> None:
        assert self.complaints == []
        assert self.addresses == [file.as_uri()]
        self.context.close()


@pytest.mark.parametrize("kind", ["nasty", "dense", "capacity", "sweep", "compare", "sustain", "audit"])
def test_no_complaint_and_no_sideways_scroll(browser: Browser, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "report.html"
    write_report(file, ALL[kind]())
    for width, scheme in ((1180, "light"), (375, "dark")):
        opened = Opened(browser, file, viewport={"width": width, "height": 800}, color_scheme=scheme)
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        assert opened.page.evaluate("window.pwned") is None
        paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(252, 252, 251)" if scheme == "light" else "rgb(18, 20, 23)")
        opened.close(file)


def test_values_toggles_and_a_closer_look(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    document = ALL["nasty"]()
    write_report(file, document)
    opened = Opened(browser, file, viewport={"width": 1180, "height": 900})
    page = opened.page
    chart = page.locator("figure", has_text="Time to the first token").first
    chart.scroll_into_view_if_needed()
    box = chart.locator("svg").bounding_box()
    assert box is not None
    low, high = (float(one) for one in str(chart.locator("svg").get_attribute("data-y")).split()[2:4])
    middle = box["y"] + (low + high) / 2 * box["width"] / 470
    page.mouse.move(box["x"] + box["width"] * 0.9, middle)
    said = page.locator("#tip").inner_text()
    assert said.startswith("50")
    told = re.search(r"from the intended send: (\S+) ms", said)
    assert told is not None
    assert float(told[1]) == pytest.approx(document["metrics"]["latency"]["ttft_ms"]["p50"], rel=0.02)

    series = chart.locator('[data-series="from the actual send"]')
    chart.locator(".key", has_text="actual send").click()
    assert series.get_attribute("visibility") == "hidden"
    page.keyboard.press("Enter")
    assert series.get_attribute("visibility") == "visible"

    rows = page.locator("figure", has=page.locator(".row"))
    rows.locator(".row").first.locator("path").first.hover(force=True)
    assert page.locator("#tip").inner_text().startswith("request 0, due at 0 ms")
    before = rows.locator("svg").bounding_box()
    rows.locator("button").click()
    after = rows.locator("svg").bounding_box()
    assert before is not None
    assert after is not None
    assert after["width"] == pytest.approx(3.2 * before["width"], rel=0.01)

    with page.expect_download() as download:
        page.click("#save")
    assert json.loads(Path(download.value.path()).read_text(encoding="utf-8")) == document
    opened.complaints = [one for one in opened.complaints if one]
    opened.addresses = [one for one in opened.addresses if not one.startswith("blob:")]
    opened.close(file)


def test_it_reads_without_javascript_and_in_print(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    write_report(file, run_of())
    opened = Opened(browser, file, java_script_enabled=False, color_scheme="dark")
    page = opened.page
    assert page.locator("svg").count() == 8
    assert page.locator("svg .line").first.bounding_box() is not None
    assert not page.locator("#save").is_visible()
    page.emulate_media(media="print")
    assert page.locator("h1").is_visible()
    opened.close(file)

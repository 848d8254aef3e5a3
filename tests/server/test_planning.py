"""Plans over HTTP and the page at /plan: in the process, in a browser, and the page's files as text.

The browser tests need what tests/server/test_page.py says; EVERYBIT_PLAN_SHOTS=FOLDER keeps pictures.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn

from everybit.plan.hardware import cards
from everybit.server import planning
from everybit.server.app import Server, Settings
from everybit.server.keys import Key, Keys
from everybit.server.planning import Deadline, Desk
from everybit.server.problems import Problem

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

MODEL = "meta-llama/Llama-3.1-8B"
CONFIG = {
    "model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 8, "vocab_size": 32000, "intermediate_size": 2816,
    "max_position_embeddings": 4096, "num_attention_heads": 16, "num_key_value_heads": 4,
}  # fmt: skip
SLO = {"ttft_ms": 1000, "tpot_ms": 50}
ESTIMATE: dict[str, Any] = {"model": MODEL, "cards": ["h100-sxm", "a100-80-sxm"], "bits": ["own", "everybit3"]}
FLEET: dict[str, Any] = {
    **ESTIMATE, "slo": SLO,
    "demand": [
        {"prompt": 1000, "output": 200, "requests_per_s": 20},
        {"prompt": 4000, "output": 400, "requests_per_s": 5},
    ],
}  # fmt: skip
SIMULATE: dict[str, Any] = {"model": MODEL, "card": "h100-sxm", "bits": ["everybit4"], "rate": 4, "seconds": 10}
PATHS = {"/plan/estimate": ESTIMATE, "/plan/fleet": FLEET, "/plan/simulate": SIMULATE}
MOST_BYTES = 40_000


def call(server: Server, *calls: tuple[str, str, Any], headers: dict[str, str] | None = None) -> list[httpx.Response]:
    """Method, path and body, one after another; without the server's models, which plans do not touch."""

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
            return [await client.request(method, path, json=body) for method, path, body in calls]

    return asyncio.run(run())


@pytest.fixture(scope="module")
def alone() -> Server:
    return Server({}, Settings())


def post(server: Server, path: str, body: Any, status: int = 200) -> dict[str, Any]:
    (answer,) = call(server, ("POST", path, body))
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_choices_are_what_plans_take(alone: Server) -> None:
    found = call(alone, ("GET", "/plan/choices", None))[0].json()
    assert MODEL in found["models"]
    assert {"everybit2", "own", "int4"} <= set(found["bits"])
    assert "h100-sxm" in [one["card"] for one in found["cards"]]
    assert all(one["memory_bytes"] > 0 for one in found["cards"])


def test_estimates_say_how_much_how_sure_and_why(alone: Server) -> None:
    found = post(alone, "/plan/estimate", {**ESTIMATE, "users": 16, "slo": SLO, "prices": {"h100-sxm": 5}})
    assert found["impossible"] == []
    rows = {(one["card"], one["bits"]): one for one in found["estimates"]}
    assert len(rows) == 4
    for one in rows.values():
        for name in ("ttft_s", "tpot_s", "tokens_per_s", "usd_per_mtok", "joules_per_token"):
            assert 0 < one[name]["low"] < one[name]["value"] < one[name]["high"], name
        assert one["binding"]["decode"][0] in one["why"][0]
        assert "prior" in one["source"]
        assert one["known"] in ("vendor", "measured", "paper")
        assert one["keeps_slo"] is True
        assert {point["phase"] for point in one["roofline"]["points"]} == {"decode", "prefill"}
    own, few = rows["h100-sxm", "own"], rows["h100-sxm", "everybit3"]
    assert few["weight_bits"] < own["weight_bits"] == 16
    assert few["tpot_s"]["value"] < own["tpot_s"]["value"]
    assert own["usd_per_mtok"]["value"] == pytest.approx(5 / 3600 * 1e6 / own["tokens_per_s"]["value"])
    assert own["pareto"], "nothing else with 16 bits is both cheaper and faster"
    assert post(alone, "/plan/estimate", {**ESTIMATE, "slo": {"tpot_ms": 1}})["estimates"][0]["keeps_slo"] is False


def test_a_front_has_no_member_that_another_beats(alone: Server) -> None:
    bits = ["own", "everybit2", "everybit4", "everybit8"]
    rows = post(alone, "/plan/estimate", {**ESTIMATE, "bits": bits, "users": 64})["estimates"]

    def key(one: Any) -> tuple[float, ...]:
        return (-one["weight_bits"], one["usd_per_mtok"]["value"], one["tpot_s"]["value"])

    for one in rows:
        beaten = any(all(a <= b for a, b in zip(key(other), key(one), strict=True)) for other in rows if other != one)
        assert one["pareto"] is not beaten


def test_a_pasted_config_is_planned(alone: Server) -> None:
    found = post(alone, "/plan/estimate", {"config": {**CONFIG, "odd_field": 3}, "cards": ["l4"]})
    assert found["model"]["unknown"] == ["odd_field"]
    assert found["model"]["context"] == 4096
    too_long = post(alone, "/plan/estimate", {"config": CONFIG, "cards": ["l4"], "prompt": 5000})
    assert too_long["estimates"] == []
    assert "context of 4096" in too_long["impossible"][0]["why"]


def test_every_model_and_card_on_offer_is_answered(alone: Server) -> None:
    found = call(alone, ("GET", "/plan/choices", None))[0].json()
    names = [one["card"] for one in found["cards"]]
    load = {"prompt": 100, "output": 1, "users": 64}
    bodies = [{"model": model, "cards": ["h100-sxm", "l4"], **load} for model in found["models"]]
    bodies += [{"model": MODEL, "cards": names[at : at + 8], **load} for at in range(0, len(names), 8)]
    for body, answer in zip(bodies, call(alone, *(("POST", "/plan/estimate", one) for one in bodies)), strict=True):
        assert answer.status_code == 200, (body, answer.text)
        assert answer.json()["estimates"] + answer.json()["impossible"]


def test_a_fleet_serves_the_demand_within_its_limits(alone: Server) -> None:
    pytest.importorskip("scipy")
    found = post(alone, "/plan/fleet", FLEET)
    fleet, types = found["fleet"], {one["name"]: one for one in found["types"]}
    assert fleet["usd_per_h"] == pytest.approx(sum(n * types[name]["usd_per_h"] for name, n in fleet["counts"].items()))
    assert [sum(row.values()) for row in fleet["split"]] == pytest.approx([1, 1])
    for name, count in fleet["counts"].items():
        shares = zip(fleet["split"], found["demand"], types[name]["rates"], strict=True)
        busy = sum(row.get(name, 0) * bucket["requests_per_s"] / rate for row, bucket, rate in shares if rate)
        assert busy <= 0.8 * count + 1e-6
    assert set(found["rests_on"]) == set(types)
    assert found["simulated"] is False
    held = post(alone, "/plan/fleet", {**FLEET, "quotas": {"h100-sxm": 1}, "bits": ["own"]})["fleet"]
    assert sum(count for name, count in held["counts"].items() if "H100" in name) <= 1
    assert held["usd_per_h"] > fleet["usd_per_h"]
    assert held["binding"][0]["limit"] == "quota H100 SXM"
    message = post(alone, "/plan/fleet", {**FLEET, "power_w": 100}, 400)["error"]["message"]
    assert "power_w = 100; the nearest that works is" in message


def test_of_equal_bills_a_fleet_has_the_most_bits(alone: Server) -> None:
    pytest.importorskip("scipy")
    small = {**FLEET, "cards": ["h100-sxm"], "demand": [{"prompt": 500, "output": 100, "requests_per_s": 1}]}
    assert list(post(alone, "/plan/fleet", small)["fleet"]["counts"]) == ["1 x H100 SXM, own"]
    told = {"quality": {"own": 0.5, "everybit3": 0.9}}
    assert list(post(alone, "/plan/fleet", {**small, **told})["fleet"]["counts"]) == ["1 x H100 SXM, everybit3"]


def test_a_simulation_has_a_life_for_each_request(alone: Server) -> None:
    found = post(alone, "/plan/simulate", {**SIMULATE, "slo": SLO})
    assert found["metrics"]["requests"] == {"all": 40, "scored": 40, "complete": 40, "failed": 0}
    assert len(found["timeline"]) == 40
    for one in found["timeline"]:
        assert one["at_s"] <= one["begin_s"] < one["first_s"] < one["end_s"]
        assert 512 <= one["prompt_tokens"] <= 1536
        assert one["bits"] == 4
    assert found["bill"]["usd_per_h"] > 0
    assert post(alone, "/plan/simulate", {**SIMULATE, "slo": SLO}) == found


def test_the_ladder_gives_way_to_load(alone: Server) -> None:
    auto = {"card": "l4", "bits": ["everybit3", "everybit8"], "slo": {"tpot_ms": 30}, "output": 100, "prompt": 200}

    def mean_bits(rate: float, seconds: float) -> float:
        body = {**SIMULATE, **auto, "rate": rate, "seconds": seconds}
        found: float = post(alone, "/plan/simulate", body)["metrics"]["precision"]["mean_bits"]
        return found

    assert 3 <= mean_bits(5, 10) < mean_bits(0.1, 100) <= 8


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("/plan/estimate", {"model": None}, "model"),
    ("/plan/estimate", {"model": "."}, "model"),
    ("/plan/estimate", {"model": "/etc"}, "model"),
    ("/plan/estimate", {"config": CONFIG}, "model"),
    ("/plan/estimate", {"cards": []}, "cards"),
    ("/plan/estimate", {"cards": ["h100-sxm"] * 9}, "cards"),
    ("/plan/estimate", {"cards": ["l4", "l4"]}, "cards"),
    ("/plan/estimate", {"cards": ["/etc/card.toml"]}, "cards"),
    ("/plan/estimate", {"cards": ["../cards/l4"]}, "cards"),
    ("/plan/estimate", {"bits": ["own", "own"]}, "bits"),
    ("/plan/estimate", {"bits": ["plan.json"]}, "bits.0"),
    ("/plan/estimate", {"users": 0}, "users"),
    ("/plan/estimate", {"users": 4097}, "users"),
    ("/plan/estimate", {"users": "5"}, "users"),
    ("/plan/estimate", {"users": True}, "users"),
    ("/plan/estimate", {"prompt": 10**9}, "prompt"),
    ("/plan/estimate", {"output": 1.5}, "output"),
    ("/plan/estimate", {"tp": 65}, "tp"),
    ("/plan/estimate", {"prices": {"h100-sxm": -1}}, "prices.h100-sxm"),
    ("/plan/estimate", {"prices": {"l4": 1}}, "cards"),
    ("/plan/estimate", {"slo": {}}, "slo"),
    ("/plan/estimate", {"slo": {"ttft_ms": 0}}, "slo.ttft_ms"),
    ("/plan/estimate", {"slo": {"ttft": 1}}, "slo.ttft"),
    ("/plan/estimate", {"engine": "mine"}, "engine"),
    ("/plan/estimate", {"card": "l4"}, "card"),
    ("/plan/fleet", {"slo": None}, "slo"),
    ("/plan/fleet", {"demand": []}, "demand"),
    ("/plan/fleet", {"demand": [{"prompt": 1, "output": 1, "requests_per_s": 0}]}, "demand.0.requests_per_s"),
    ("/plan/fleet", {"demand": FLEET["demand"] * 5}, "demand"),
    ("/plan/fleet", {"tp": [1, 1]}, "tp"),
    ("/plan/fleet", {"cards": cards()[:8], "tp": [1, 2, 4], "bits": ["own", "int4"]}, "cards"),
    ("/plan/fleet", {"quality": {"own": 1}}, "quality"),
    ("/plan/fleet", {"utilisation": 1.1}, "utilisation"),
    ("/plan/fleet", {"quotas": {"h100-sxm": -1}}, "quotas.h100-sxm"),
    ("/plan/simulate", {"rate": 51}, "rate"),
    ("/plan/simulate", {"rate": 0.01}, "rate"),
    ("/plan/simulate", {"seconds": 3601}, "seconds"),
    ("/plan/simulate", {"prompt": 60000}, "prompt"),
    ("/plan/simulate", {"model": "openai-community/gpt2", "prompt": 1000}, "prompt"),
    ("/plan/simulate", {"bits": ["own", "everybit4"]}, "bits"),
    ("/plan/simulate", {"bits": ["everybit3", "everybit4"], "scheduler": "vllm"}, "scheduler"),
    ("/plan/simulate", {"model": "meta-llama/Llama-3.1-405B"}, "card"),
    ("/plan/simulate", {"replicas": 9}, "replicas"),
]


def test_what_is_wrong_is_named(alone: Server) -> None:
    answers = call(alone, *(("POST", path, {**PATHS[path], **change}) for path, change, _ in WRONG))
    for (path, change, param), answer in zip(WRONG, answers, strict=True):
        assert answer.status_code == 400, (path, change, answer.text)
        error = answer.json()["error"]
        assert error["param"] == param, (path, change, error)
        assert param.split(".")[0] in error["message"] or param in ("card", "scheduler"), (path, change, error)


WRONG_CONFIGS: list[dict[str, Any]] = [
    {},
    {"hidden_size": None},
    {"hidden_size": -1},
    {"hidden_size": 10**7},
    {"hidden_size": "1024"},
    {"num_hidden_layers": 257},
    {"num_hidden_layers": None, "layers_block_type": ["attention"] * 5000},
    {"vocab_size": {"a": 1}},
    {"model_type": ["llama"]},
    {"is_encoder_decoder": True},
    {"quantization_config": {"quant_method": "everybit"}},
    {"quantization_config": {"quant_method": "unheard"}},
    {"quantization_config": {"quant_method": "gptq", "bits": "many"}},
    {"quantization_config": {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["re:a*a*a*a*b"]}},
    {"quantization_config": {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["*a"] * 65}},
    {"text_config": {**CONFIG, "num_hidden_layers": 10**4}},
]


def test_hostile_configs_are_refused(alone: Server) -> None:
    bodies = [{"config": {**CONFIG, **change} if change else {}, "cards": ["l4"]} for change in WRONG_CONFIGS]
    for body, answer in zip(bodies, call(alone, *(("POST", "/plan/estimate", one) for one in bodies)), strict=True):
        assert answer.status_code == 400, (body, answer.text)
        assert answer.json()["error"]["param"] == "config"


def test_the_most_patterns_of_the_most_layers_are_read_in_time(alone: Server) -> None:
    ignored = [f"re:.*{i}.*Q" for i in range(60)] + [f"module{i}" for i in range(900)]
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ignored}
    began = time.monotonic()
    config = {**CONFIG, "num_hidden_layers": 256, "quantization_config": awq}
    post(alone, "/plan/estimate", {"config": config, "cards": ["l4"]})
    assert time.monotonic() - began < planning.LIMIT_S


def test_plans_are_made_one_at_a_time_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        desk, go = Desk(limit_s=0.2), threading.Event()

        def stuck(deadline: Deadline) -> dict[str, Any]:
            go.wait(20)
            return {}

        def endless(deadline: Deadline) -> dict[str, Any]:
            while True:
                time.sleep(0.01)
                deadline.check()

        async def status(work: Any) -> int:
            try:
                return (await desk.plan(work)).status_code
            except Problem as problem:
                return problem.status

        first = asyncio.create_task(status(stuck))
        await asyncio.sleep(0.05)
        assert await status(lambda _: {}) == 429
        assert await first == 504
        assert await status(lambda _: {}) == 429, "it still runs"
        go.set()
        await asyncio.sleep(0.1)
        assert await status(endless) == 504
        assert await status(lambda _: {}) == 200

    monkeypatch.setattr(planning, "_LATE_S", 0.1)
    asyncio.run(run())


def test_the_server_answers_while_a_plan_is_made(alone: Server) -> None:
    long = {**SIMULATE, "rate": 20, "seconds": 10, "prompt": 200, "output": 150}

    async def run() -> tuple[int, int, float]:
        transport = httpx.ASGITransport(app=alone.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            planned = asyncio.create_task(client.post("/plan/simulate", json=long))
            waits = []
            while not planned.done():
                began = time.monotonic()
                assert (await client.get("/health")).status_code == 200
                waits.append(time.monotonic() - began)
                await asyncio.sleep(0.02)
            return (await planned).status_code, len(waits), max(waits)

    status, polls, slowest = asyncio.run(run())
    assert status == 200
    assert polls > 3
    assert slowest < 1


def test_without_scipy_a_plan_says_what_is_missing() -> None:
    code = (
        "import sys, json, asyncio, httpx; sys.modules['scipy'] = None\n"
        "from everybit.server.app import Server, Settings\n"
        "async def run():\n"
        "    transport = httpx.ASGITransport(app=Server({}, Settings()).app)\n"
        "    async with httpx.AsyncClient(transport=transport, base_url='http://localhost') as client:\n"
        "        answers = [await client.get('/plan/choices'), await client.post('/plan/fleet', json=json.loads(sys.argv[1]))]\n"  # noqa: E501
        "        print(json.dumps([[one.status_code, one.json()] for one in answers]))\n"
        "asyncio.run(run())"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(FLEET)], capture_output=True, text=True, check=True)
    (chosen, _), (status, said) = json.loads(done.stdout)
    assert (chosen, status, said["error"]["code"]) == (200, 501, "not_installed")
    assert "everybit[plan]" in said["error"]["message"]


def test_keys_apply() -> None:
    server = Server({}, Settings(keys=Keys([Key("one", hashlib.sha256(b"k" * 20).digest())])))
    calls = [("GET", "/plan/choices", None), *(("POST", path, body) for path, body in PATHS.items())]
    assert [one.status_code for one in call(server, *calls)] == [401] * 4
    assert call(server, ("GET", "/page/plan.html", None))[0].status_code == 200


# --- the page
def test_the_page_is_served_like_the_other(alone: Server) -> None:
    paths = ("/plan", "/page/plan.js", "/page/app.js")
    page, script, other = call(alone, *(("GET", path, None) for path in paths))
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert script.status_code == other.status_code == 200


def test_files_are_small_and_stay_at_home() -> None:
    files = sorted(planning.PAGE.iterdir())
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    named = set()
    for path in files:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"\b(https?|wss?):|[\"'(]//|url\(|@import", text), path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
        if path.suffix == ".html":
            assert not re.search(r"\s(on\w+|style)\s*=|<style|<script(?![^>]*\ssrc=)|javascript:", text)
        named |= set(re.findall(r'(?:href|src)="/page/([^"]+)"', text)) | set(re.findall(r'from "\./([^"]+)"', text))
    other = {path.name for path in (planning.PAGE.parent / "page").iterdir()}
    assert named - other == {path.name for path in files} - {"plan.html"}
    assert not other & {path.name for path in files}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server without models, in a thread."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(Server({}, Settings()).app, log_level="error", lifespan="off")
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        running.should_exit = True
        thread.join(10)


def opened(browser: Browser, url: str, width: int, height: int, scheme: Any = None) -> tuple[Page, list[str]]:
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page, complaints = context.new_page(), []
    page.set_default_timeout(15_000)
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda one: complaints.append(one.url) if not one.url.startswith(url) else None)
    page.goto(f"{url}/plan")
    page.wait_for_selector("#cards input")
    return page, complaints


def keep(page: Page, name: str) -> None:
    if folder := os.environ.get("EVERYBIT_PLAN_SHOTS"):
        page.screenshot(path=Path(folder) / name)


def done(page: Page) -> None:
    page.wait_for_selector("#estimate:enabled")
    assert page.locator("#status").inner_text() == ""


def test_the_page_estimates_plans_and_simulates(browser: Browser, url: str) -> None:
    pytest.importorskip("scipy")
    page, complaints = opened(browser, url, 1440, 900)
    page.check("#cards input[value=l4]")
    page.click("#estimate")
    page.wait_for_selector("#estimates tbody tr")
    done(page)
    assert "Without a price: L4" in page.locator("#pareto-title").inner_text()
    page.fill("#price-l4", "0.8")
    page.click("#estimate")
    page.wait_for_selector("#pareto-title:not(:has-text('Without'))")
    done(page)
    assert page.locator("#estimates tbody tr").count() == 12
    assert page.locator("#pareto .point").count() == 12
    assert page.locator("#roofline .decode").count() > 3
    before = page.locator("#roofline-title").inner_text()
    keep(page, "plan-page.png")
    page.click("#estimates tbody tr:last-child button")
    assert page.locator("#roofline-title").inner_text() != before
    page.click("#fleet-form button")
    page.wait_for_selector("#fleet tbody tr")
    done(page)
    assert "$/h" in page.locator("#bill").inner_text()
    page.click("#simulate-form button")
    page.wait_for_selector("#timeline rect")
    done(page)
    assert page.locator("#timeline g").count() == 120
    page.locator("#fleet-title").scroll_into_view_if_needed()
    page.locator("#results").evaluate("e => e.scrollTo(0, e.scrollHeight)")
    keep(page, "plan-page-fleet.png")
    assert complaints == []
    page.context.close()


def test_the_page_says_what_the_server_refuses(browser: Browser, url: str) -> None:
    page, complaints = opened(browser, url, 1280, 860)
    page.select_option("#model", "config")
    page.click("#estimate")
    page.wait_for_selector("#status.error")
    assert "not JSON" in page.locator("#status").inner_text()
    page.fill("#config", '{"model_type": "<img src=x onerror=alert(1)>"}')
    page.click("#estimate")
    page.wait_for_selector("#estimate:enabled")
    page.wait_for_selector("text=is missing")
    assert [one for one in complaints if "status of 400" not in one] == []
    page.context.close()


def test_the_page_fits_a_narrow_screen_and_names_its_controls(browser: Browser, url: str) -> None:
    page, complaints = opened(browser, url, 360, 640, "dark")
    page.click("#estimate")
    page.wait_for_selector("#estimates tbody tr")
    done(page)
    page.click("#simulate-form button")
    page.wait_for_selector("#timeline rect")
    done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    snapshot = page.locator("body").aria_snapshot()
    controls = re.findall(r"- (?:textbox|spinbutton|combobox|checkbox|button)(.*)", snapshot)
    assert len(controls) > 60
    assert [one for one in controls if not one.startswith(' "')] == []
    page.locator("#plots").scroll_into_view_if_needed()
    keep(page, "plan-page-phone.png")
    assert complaints == []
    page.context.close()

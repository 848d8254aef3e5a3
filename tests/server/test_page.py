"""The page that the server delivers at `/`: in a browser against a server that is played here, and its files as text.

The browser tests need the package playwright and a Chromium (see scripts/screenshots.py). Where those are missing they
skip, or fail with EVERYBIT_REQUIRE_BROWSER=1. `python -m tests.server.test_page [PORT]` serves the played server.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from scripts import screenshots

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PAGE = Path(__file__).resolve().parents[2] / "src" / "everybit" / "server" / "page"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = "default-src 'self'"
KEY = "sesame"
MOST_BYTES = 40_000

SKY = (
    "Sunlight holds every colour. On its way through the air it meets molecules far smaller than its waves, "
    "and they scatter the short waves much more than the long ones: blue about four times as much as red. So "
    "from every part of the sky some scattered blue reaches your eye, while the red passes straight on. Violet "
    "is scattered even more, but the sun sends less of it, and our eyes see it poorly."
)
EVENING = (
    "In the evening the light comes to you along the ground, through some forty times as much air as at noon. "
    "Most of the blue has been scattered out of it long before it arrives, and what is left is orange and red. "
    "Dust and thin clouds catch that light and send it on, which is why the best sunsets need a sky that is "
    "not quite clear."
)
STORY = " there was a miller who counted every grain twice. Her neighbours laughed at it, until the winter came."
UNICODE = "Grüße, 世界! 🦊🌍 e\u0301 ½ ok."
HOSTILE = "<img src=x onerror=\"window.pwned=1\"><script>window.pwned=2</script><b>bold</b> &amp; 'end'"

MODELS: list[dict[str, Any]] = [
    {
        "id": "mill-1b-chat",
        "everybit": {"bits": [2, 3, 4, 5, 6, 7, 8], "context": 4096, "chat": True, "alias_of": None},
    },
    {"id": "mill-1b-base", "everybit": {"bits": [2, 3, 4, 6], "context": 2048, "chat": False, "alias_of": None}},
    {"id": "gpt-4", "everybit": {"bits": [2, 8], "context": 4096, "chat": True, "alias_of": "mill-1b-chat"}},
    {"id": "locked", "everybit": {"bits": [4, 8], "context": 4096, "chat": True, "alias_of": None}},
    {"id": "full", "everybit": {"bits": [4, 8], "context": 4096, "chat": True, "alias_of": None}},
    {"id": "fragile", "everybit": {"bits": [4, 8], "context": 4096, "chat": True, "alias_of": None}},
]


def text_for(body: dict[str, Any]) -> str:
    if "prompt" in body:
        return STORY
    said = body["messages"][-1]["content"]
    answers = {"unicode": UNICODE, "hostile": HOSTILE, "endless": "on and on " * 2000}
    return answers.get(said, EVENING if "evening" in said else SKY)


def auto_bits(token: int) -> int:
    """What a load that rises and falls would choose."""
    return (8, 8, 8, 6, 6, 4, 3, 3, 4, 6, 8, 8)[token // 7 % 12]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: PlayedServer

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, content: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status: int, message: str) -> None:
        self.reply(status, json.dumps({"error": {"message": message, "type": "played", "code": None}}).encode())

    def do_GET(self) -> None:
        path = "/page/index.html" if self.path == "/" else self.path
        file = PAGE / path.removeprefix("/page/")
        if path == "/v1/models":
            self.reply(200, json.dumps({"object": "list", "data": MODELS}).encode())
        elif path == "/status":
            self.server.polls += 1
            self.reply(200, json.dumps({"models": {one["id"]: self.load() for one in MODELS}}).encode())
        elif path.startswith("/page/") and file.parent == PAGE and file.is_file():
            self.reply(200, file.read_bytes(), TYPES[file.suffix])
        else:
            self.refuse(404, f"no such path: {path}")

    def load(self) -> dict[str, Any]:
        poll = self.server.polls
        bits = (8, 8, 6, 4, 3, 4, 6, 8)[poll // 2 % 8]
        return {
            "bits_now": bits, "running": 10 - bits, "waiting": max(0, 5 - bits), "queue_limit": 1024, "kv_blocks": 400,
            "kv_blocks_free": 200 + 20 * bits, "kv_blocks_cached": 50, "tokens_per_s": 250.0 / bits,
            "tokens_by_bits": {"8": 1200},
        }  # fmt: skip

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body))
        if body["model"] == "locked" and self.headers["Authorization"] != f"Bearer {KEY}":
            self.refuse(401, "a valid API key is needed")
        elif body["model"] == "full":
            self.refuse(429, "the queue is full: 1024 requests wait")
        else:
            self.stream(body)

    def stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        data = b"".join(f"data: {frame}\n\n".encode() for frame in self.frames(body))
        try:
            at = 0
            while at < len(data):
                # Cuts anywhere: inside a character, inside "data:", between two newlines; and several frames in one.
                size = (1, 2, 3, 700, 5, 1, 1, 900, 11, 311)[self.server.cuts % 10] if self.server.odd else 420
                self.server.cuts += 1
                piece = data[at : at + size]
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                self.wfile.flush()
                time.sleep(0.002 if self.server.odd else 0.05)
                at += size
            self.wfile.write(b"0\r\n\r\n")
        except OSError:  # the page hung up
            self.server.hung_up.set()
            self.close_connection = True

    def frames(self, body: dict[str, Any]) -> Iterator[str]:
        chat = "messages" in body
        tokens = re.findall(r"\s*\S{1,6}", text_for(body))[: body.get("max_tokens", 100)]
        counts: dict[str, int] = {}

        def frame(text: str, bits: list[int], reason: str | None = None) -> str:
            piece = {"delta": {"content": text}} if chat else {"text": text}
            choice = {"index": 0, **piece, "finish_reason": reason}
            return json.dumps({"object": "played", "choices": [choice], "bits": bits}, ensure_ascii=False)

        if chat:
            yield json.dumps({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "bits": []})
        at = 0
        while at < len(tokens):
            group = tokens[at : at + 1 + (at % 5 == 3)]  # sometimes two tokens in a chunk
            fixed = body["precision"]
            bits = [auto_bits(at + n) if fixed == "auto" else fixed for n in range(len(group))]
            for one in bits:
                counts[str(one)] = counts.get(str(one), 0) + 1
            yield frame("".join(group), bits)
            at += len(group)
            if body["model"] == "fragile" and at > 8:
                yield json.dumps(
                    {"error": {"message": "the engine stopped: block 7 is damaged", "type": "server_error"}}
                )
                return
        yield frame("", [], "length" if len(tokens) == body.get("max_tokens") else "stop")
        usage = {"prompt_tokens": 9, "completion_tokens": len(tokens), "tokens_by_bits": counts}
        yield json.dumps({"choices": [], "usage": usage})
        yield "[DONE]"


class PlayedServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int = 0, *, odd: bool = True) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.odd = odd  # cuts of a few bytes; else pieces at the pace of a small model
        self.cuts = self.polls = 0
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.hung_up = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


@pytest.fixture
def server() -> Iterator[PlayedServer]:
    played = PlayedServer()
    thread = threading.Thread(target=played.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield played
    played.shutdown()
    played.server_close()


class Watch:
    """A page, and what must not happen on it."""

    def __init__(self, browser: Browser, url: str, width: int = 1280, height: int = 860) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height})
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.complaints: list[str] = []
        self.addresses: list[str] = []
        # A content security violation is a console error too.
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.context.on("request", lambda request: self.addresses.append(request.url))
        self.url = url
        self.page.goto(url)
        self.page.wait_for_selector("#examples li")

    def send(self, prompt: str, *, wait: bool = True) -> None:
        self.page.fill("#prompt", prompt)
        self.page.press("#prompt", "Enter")
        if wait:
            self.page.wait_for_selector("#send:visible")

    def until(self, condition: str) -> None:
        """Waits for JavaScript to be true. (Playwright's own way needs eval in the page, which the policy forbids.)"""
        end = time.monotonic() + 15
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, condition
            self.page.wait_for_timeout(20)

    def texts(self) -> list[str]:
        return [
            str(text) for text in self.page.locator(".answer .text").evaluate_all("all => all.map(e => e.textContent)")
        ]


@pytest.fixture
def watch(browser: Browser, server: PlayedServer) -> Iterator[Watch]:
    seen = Watch(browser, server.url)
    yield seen
    seen.context.close()
    # The browser itself reports a refused request as an error: those are the tests of refusals.
    left = [line for line in seen.complaints if not re.search(r"status of (401|429)", line)]
    assert not left
    assert [address for address in seen.addresses if not address.startswith(seen.url)] == []


def test_an_answer_streams_and_joins(watch: Watch, server: PlayedServer) -> None:
    watch.send("unicode")
    assert watch.texts() == [UNICODE]
    watch.send("Why is the sky blue?")
    assert watch.texts() == [UNICODE, SKY]
    path, body = server.requests[1]
    assert path == "/v1/chat/completions"
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert [message["content"] for message in body["messages"]] == ["unicode", UNICODE, "Why is the sky blue?"]
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    figures = watch.page.locator(".figures").nth(1).inner_text()
    assert "at 8 bits" in figures
    assert "at 3 bits" in figures
    assert "tokens/s" in figures
    assert "to the first token" in figures


def test_each_cut_of_the_stream_gives_the_same(watch: Watch) -> None:
    data = (
        f": note\r\ndata: {UNICODE}\r\n\r\nevent: x\ndata:two\ndata: lines\n\ndata: last\n\ndata: [DONE]\n\n".encode()
    )
    events = watch.page.evaluate(
        """async (bytes) => {
          const { EventSplitter } = await import("/page/api.js");
          const all = new Set();
          for (let size = 1; size <= bytes.length; size += 1) {
            const decoder = new TextDecoder(), splitter = new EventSplitter(), events = [];
            for (let at = 0; at < bytes.length; at += size) {
              const part = new Uint8Array(bytes.slice(at, at + size));
              events.push(...splitter.push(decoder.decode(part, { stream: true })));
            }
            events.push(...splitter.push(decoder.decode(), true));
            all.add(JSON.stringify(events));
          }
          return [...all].map((one) => JSON.parse(one));
        }""",
        list(data),
    )
    assert events == [[UNICODE, "two\nlines", "last", "[DONE]"]]


def test_slider_and_settings_go_into_the_request(watch: Watch, server: PlayedServer) -> None:
    page = watch.page
    page.fill("#temperature", "0.3")
    page.fill("#max_tokens", "12")
    page.fill("#seed", "7")
    page.fill("#system", "Be brief.")
    page.focus("input[type=range] >> nth=0")
    for _ in range(3):
        page.keyboard.press("ArrowRight")  # auto, 2, 3, 4
    assert page.locator(".big").first.inner_text().split() == ["4", "bits"]
    watch.send("Why is the sky blue?")
    body = server.requests[0][1]
    assert body["precision"] == 4
    assert "precision_floor" not in body
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.3, 12, 7)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "limit of tokens" in page.locator(".answer .note").inner_text()
    assert page.locator(".answer .count").all_inner_texts() == ["12 at 4 bits"]


def test_a_click_on_a_step_chooses_it(watch: Watch) -> None:
    page = watch.page
    for index, label in enumerate(["auto", "2", "3", "4", "5", "6", "7", "8"]):
        box = page.locator(".slider").first.locator(".step").nth(index).bounding_box()
        assert box is not None
        for across in (0.2, 0.8):
            page.mouse.click(box["x"] + across * box["width"], box["y"] + box["height"] - 12)
            assert page.locator(".step.chosen b").first.inner_text() == label


def test_auto_with_floor_and_ceiling(watch: Watch, server: PlayedServer) -> None:
    floor, ceiling = watch.page.get_by_label("Floor").first, watch.page.get_by_label("Ceiling").first
    ceiling.select_option("4")
    floor.select_option("6")  # above the ceiling, which follows
    assert ceiling.input_value() == "6"
    floor.select_option("3")
    watch.send("Why is the sky blue?")
    body = server.requests[0][1]
    assert (body["precision"], body["precision_floor"], body["precision_ceiling"]) == ("auto", 3, 6)
    assert "auto from 3 up to 6" in watch.page.locator(".answer header").inner_text()


def test_compare_asks_at_both_precisions(watch: Watch, server: PlayedServer) -> None:
    page = watch.page
    page.click("#two")
    screenshots.choose(page, 0, 8)
    screenshots.choose(page, 1, 3)
    watch.send("Why is the sky blue?")
    assert sorted(body["precision"] for _, body in server.requests) == [3, 8]
    assert watch.texts() == [SKY, SKY]
    assert page.locator(".answer header b").all_inner_texts() == ["8 bits", "3 bits"]
    left, right = (page.locator(".answer").nth(n).bounding_box() for n in (0, 1))
    assert left is not None
    assert right is not None
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    watch.send("unicode")
    assert [len(body["messages"]) for _, body in server.requests[2:]] == [3, 3]


def test_stop_ends_the_request(watch: Watch, server: PlayedServer) -> None:
    watch.page.fill("#max_tokens", "4000")
    watch.send("endless", wait=False)
    watch.until("document.querySelector('.answer .text').textContent.length > 40")
    watch.page.click("#stop")
    watch.page.wait_for_selector("#send:visible")
    assert server.hung_up.wait(10)
    assert watch.page.locator(".answer .note").inner_text() == "Stopped."
    text = watch.texts()[0]
    assert "on and on".startswith(text[:9])
    watch.send("unicode")  # the stopped part stays in the conversation
    assert server.requests[1][1]["messages"][1] == {"role": "assistant", "content": text}


def test_a_new_conversation_forgets(watch: Watch, server: PlayedServer) -> None:
    watch.send("unicode")
    watch.page.click("#fresh")
    assert watch.texts() == []
    watch.send("hostile")
    assert len(server.requests[1][1]["messages"]) == 1


def test_model_text_stays_text(watch: Watch) -> None:
    watch.send("hostile")
    assert watch.texts() == [HOSTILE]
    assert watch.page.evaluate("window.pwned") is None
    assert watch.page.locator("#turns :is(img, script)").count() == 0


def test_errors_stand_in_the_place_of_the_answer(watch: Watch) -> None:
    watch.page.select_option("#model", "full")
    watch.send("Why is the sky blue?")
    assert watch.page.locator(".answer .error").inner_text() == "the queue is full: 1024 requests wait"
    watch.page.select_option("#model", "fragile")
    watch.send("Why is the sky blue?")
    assert watch.page.locator(".answer .error").inner_text() == "the engine stopped: block 7 is damaged"
    assert watch.texts()[0]
    assert SKY.startswith(watch.texts()[0])


def test_asks_for_a_key_once(watch: Watch, server: PlayedServer) -> None:
    page = watch.page
    page.select_option("#model", "locked")
    page.click("#two")
    watch.send("unicode", wait=False)
    page.wait_for_selector("#key-dialog[open]")
    assert "a valid API key is needed" in page.locator("#key-message").inner_text()
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:visible")
    assert watch.texts() == [UNICODE, UNICODE]
    watch.send("unicode")
    assert len(server.requests) == 6  # two refused, then four
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]


def test_a_cancelled_key_is_an_error(watch: Watch) -> None:
    watch.page.select_option("#model", "locked")
    watch.send("unicode", wait=False)
    watch.page.wait_for_selector("#key-dialog[open]")
    watch.page.keyboard.press("Escape")
    watch.page.wait_for_selector("#send:visible")
    assert watch.page.locator(".answer .error").inner_text() == "a valid API key is needed"


def test_a_model_without_a_chat_template_continues(watch: Watch, server: PlayedServer) -> None:
    page = watch.page
    assert page.locator("#model option").all_inner_texts() == [
        "mill-1b-chat",
        "mill-1b-base",
        "locked",
        "full",
        "fragile",
    ]
    page.select_option("#model", "mill-1b-base")
    assert "no chat template" in page.locator("#mode-note").inner_text()
    assert not page.locator("#system").is_visible()
    assert page.locator(".step b").all_inner_texts()[:5] == ["auto", "2", "3", "4", "6"]
    watch.send("Once upon a time")
    path, body = server.requests[0]
    assert path == "/v1/completions"
    assert body["prompt"] == "Once upon a time"
    assert watch.texts() == [STORY]


def test_load_is_polled_while_the_tab_is_seen(watch: Watch, server: PlayedServer) -> None:
    page = watch.page
    watch.until("document.getElementById('load-kv-text').textContent.endsWith('%')")
    assert page.locator("#load-queue").inner_text().endswith("of 1024")
    watch.until("document.querySelectorAll('#load-chart rect').length > 0")
    hide = "(hidden) => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });"
    hide += " document.dispatchEvent(new Event('visibilitychange')); }"
    page.evaluate(hide, True)
    page.wait_for_timeout(300)
    before = server.polls
    page.wait_for_timeout(1500)
    assert server.polls == before
    page.evaluate(hide, False)
    page.wait_for_timeout(500)
    assert server.polls > before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_narrow_screen(browser: Browser, server: PlayedServer, scheme: Any) -> None:
    seen = Watch(browser, server.url, 360, 640)
    page = seen.page
    page.emulate_media(color_scheme=scheme)
    page.click("#two")
    page.click("summary")
    page.fill("#max_tokens", "12")
    page.click("summary")
    seen.send("x" * 200)
    page.fill("#prompt", "y" * 90)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.getElementById('talk').scrollWidth") <= 360
    outside = """all => all.filter(e => { const box = e.getBoundingClientRect();
      return box.width && (box.right > 360.5 || box.left < -0.5); }).map(e => e.outerHTML)"""
    assert page.locator("button, input, select, textarea, dd, .figures span").evaluate_all(outside) == []
    height = page.evaluate("document.getElementById('talk').clientHeight")
    assert height >= 180, f"{height} px are left for the conversation"
    assert seen.complaints == []
    seen.context.close()


def test_every_control_has_a_name(watch: Watch) -> None:
    for control in watch.page.locator("button:visible, input:visible, select:visible, textarea:visible").all():
        markup = control.evaluate("e => e.outerHTML")
        assert re.search(r'(textbox|spinbutton|slider|combobox|checkbox|button) "', control.aria_snapshot()), markup


def test_the_screenshot_script(browser: Browser, server: PlayedServer, tmp_path: Path) -> None:
    screenshots.take(browser, server.url, tmp_path, tokens=20, settle_ms=100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page-chat.png", "page-compare.png", "page-phone.png"]


def test_files_are_small_and_stay_at_home() -> None:
    files = sorted(PAGE.iterdir())
    assert {path.name for path in files} >= {"index.html", "style.css", "app.js"}
    assert {path.suffix for path in files} <= set(TYPES)
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    for path in files:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert not re.search(r"\b(https?|wss?):|[\"'(]//", text), path.name
        assert not re.search(r"\binnerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), (
            path.name
        )
        assert not re.search(r"url\(|@import", text), path.name
        if path.suffix in (".html", ".svg"):
            assert not re.search(r"\s(on\w+|style)\s*=", text), path.name
            assert not re.search(r"<style|<script(?![^>]*\ssrc=)|javascript:", text), path.name


def test_every_file_that_is_named_is_there() -> None:
    named = set(re.findall(r'(?:href|src)="(/page/[^"]+)"', (PAGE / "index.html").read_text(encoding="utf-8")))
    for path in PAGE.glob("*.js"):
        named |= {f"/page/{name}" for name in re.findall(r'from "\./([^"]+)"', path.read_text(encoding="utf-8"))}
    assert named == {f"/page/{path.name}" for path in PAGE.iterdir() if path.name != "index.html"}


if __name__ == "__main__":
    alone = PlayedServer(int(sys.argv[1]) if len(sys.argv) > 1 else 8000, odd=False)
    print(alone.url, flush=True)
    alone.serve_forever()

"""Screenshots of the page of a running server, for the documentation.

    python scripts/screenshots.py http://127.0.0.1:8000 docs/images [--model NAME]

Writes OUTDIR/page-compare.png (desktop, light), page-chat.png (desktop, dark) and page-phone.png. Needs the package
playwright and a Chromium: `pip install playwright` and `apt-get install chromium-headless-shell`, or a browser of
playwright's own, or EVERYBIT_BROWSER=/path/to/chromium.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Playwright

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHAT = ("Why is the sky blue?", "And why is it red in the evening?")
TEXT = ("Once upon a time", "The sea was calm, and")
ANSWER_MS = 120_000


def open_browser(playwright: Playwright) -> Browser:
    """The system's Chromium, or playwright's own. Without the sandbox where the user is root, as Chromium demands."""
    path = os.environ.get("EVERYBIT_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    return playwright.chromium.launch(executable_path=path, args=flags)


def open_page(
    browser: Browser, url: str, width: int, height: int, *, dark: bool, model: str | None, scale: int
) -> Page:
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", device_scale_factor=scale
    )
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#examples li")  # the models are known
    if model:
        page.select_option("#model", model)
    return page


def choose(page: Page, slider: int, bits: int | None) -> None:
    """Sets a slider to the precision nearest to `bits`, or to auto."""
    labels = page.locator(".slider").nth(slider).locator(".step b").all_inner_texts()
    offered = [int(label) for label in labels[1:]]
    position = 0 if bits is None else 1 + offered.index(min(offered, key=lambda b: abs(b - bits)))
    page.locator("input[type=range]").nth(slider).fill(str(position))


def ask(page: Page, number: int, *, wait: bool = True) -> None:
    """Sends the example of that number, and waits for the answers unless told not to."""
    chat = page.locator("#send").inner_text() == "Send"
    page.fill("#prompt", (CHAT if chat else TEXT)[number])
    page.click("#send")
    if wait:
        page.wait_for_selector("#send:visible", timeout=ANSWER_MS)


def take(
    browser: Browser, url: str, out: Path, model: str | None = None, tokens: int = 90, settle_ms: int = 8000
) -> None:
    """`settle_ms`: how long the load strip may gather its chart before each desktop picture."""
    out.mkdir(parents=True, exist_ok=True)

    page = open_page(browser, url, 1280, 860, dark=False, model=model, scale=1)
    page.fill("#max_tokens", str(tokens))
    page.click("#two")
    choose(page, 0, 8)
    choose(page, 1, 3)
    page.wait_for_timeout(settle_ms)
    ask(page, 0)
    page.screenshot(path=out / "page-compare.png")
    page.context.close()

    page = open_page(browser, url, 1280, 860, dark=True, model=model, scale=1)
    page.fill("#max_tokens", str(tokens))
    page.wait_for_timeout(settle_ms)
    ask(page, 0)
    ask(page, 1)
    page.screenshot(path=out / "page-chat.png")
    page.context.close()

    page = open_page(browser, url, 390, 844, dark=False, model=model, scale=2)
    page.locator("#max_tokens").evaluate("(field, value) => { field.value = value; }", str(tokens))
    choose(page, 0, 4)
    ask(page, 0)
    page.screenshot(path=out / "page-phone.png")
    page.context.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Screenshots of the page of a running server.")
    parser.add_argument("url")
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=90, help="of each answer")
    parser.add_argument("--settle", type=float, default=8, help="seconds for the load chart before a desktop picture")
    options = parser.parse_args(arguments)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = open_browser(playwright)
        take(browser, options.url, options.outdir, options.model, options.tokens, int(options.settle * 1000))
        browser.close()
    for path in sorted(options.outdir.glob("page-*.png")):
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

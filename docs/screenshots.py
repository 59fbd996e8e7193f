"""`make screenshots`: the pictures of docs/ui.md and README.md, taken from the page itself on the embedded model and the example adapters.

Owns what is on the pictures. Needs Debian's chromium; `examples.server_process` owns the server.
"""

import shutil
import sys
import time
from pathlib import Path
from threading import Event, Thread

import httpx
from playwright.sync_api import Page, expect, sync_playwright

from examples.embedded_model import ensure_model
from examples.server_process import ROOT, ServerProcess
from sizing.printing import run_tool

FOLDER = Path(__file__).parent / "images"
MAX_BYTES = 200_000
KEY = "a-key-for-the-pictures"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
LOAD_S = 75.0  # of requests, before the live view is taken
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 360, "height": 740}
PROMPTS = ["What is the capital of France?", "Table hotels(name, city, rooms). How many hotels are there?", "Why is the sky blue?"]


def main() -> int:
    """Start the server, take the pictures, stop; 1 if there is no browser or a picture is too large."""
    chromium = shutil.which("chromium")
    if chromium is None:
        print("error: Debian's chromium is not installed (apt-get install chromium)", file=sys.stderr)
        return 1
    ensure_model()
    FOLDER.mkdir(exist_ok=True)
    with ServerProcess(admin_key=KEY, log_path=ROOT / ".cache" / "screenshots-server.log") as server, sync_playwright() as playwright:
        server.wait_healthy(lambda _: None)
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for name, scheme, viewport in (("", "light", WIDE), ("-dark", "dark", WIDE), ("-narrow", "light", NARROW)):
            page = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce").new_page()
            take_compare(page, server.url, name)
            if not name:
                take_orders(page, server.url)
                take_live(page, server.url)
            page.context.close()
        browser.close()
    too_large = [path.name for path in FOLDER.glob("ui-*.png") if path.stat().st_size > MAX_BYTES]
    for name in too_large:
        print(f"error: {name} is larger than {MAX_BYTES} bytes", file=sys.stderr)
    return 1 if too_large else 0


def take_compare(page: Page, url: str, name: str) -> None:
    """The base and four adapters, each with its answer."""
    page.goto(f"{url}/ui")
    for _ in range(2):  # the second time every adapter is in memory: numbers of a server that has run for a while
        page.get_by_role("button", name="Ask").click()
        expect(page.get_by_role("button", name="Ask")).to_be_visible(timeout=300_000)
    if page.viewport_size == NARROW:
        page.get_by_label("Prompt").evaluate("(one) => scrollTo(0, one.getBoundingClientRect().top + scrollY - 150)")
    shoot(page, f"ui-compare{name}")


def take_orders(page: Page, url: str) -> None:
    """The list, with a published and a pinned name."""
    for body in ({"name": "team/reports", "id": "sql", "pin": True}, {"name": "team/intake", "id": "json"}):
        order(url, "adapters", body)
    order(url, "adapters/team/intake/unload")
    page.get_by_role("tab", name="Adapters").click()
    page.get_by_role("button", name="Enter a key").click()
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("row", name="team/reports")).to_be_visible()
    page.get_by_role("tabpanel", name="Adapters").focus()
    shoot(page, "ui-adapters")
    for name in ("team/reports", "team/intake"):
        httpx.delete(f"{url}/v1/adapters/{name}?release=true", headers=_headers(), timeout=60).raise_for_status()


def take_live(page: Page, url: str) -> None:
    """A minute of requests for the base and all adapters."""
    page.get_by_role("tab", name="Live").click()
    over = Event()
    callers = [Thread(target=call, args=(url, index, over)) for index in range(5)]
    for caller in callers:
        caller.start()
    page.wait_for_timeout(LOAD_S * 1000)
    shoot(page, "ui-live")
    over.set()
    for caller in callers:
        caller.join()


def call(url: str, index: int, over: Event) -> None:
    """One caller, who asks one thing after the other, some adapters more often than others."""
    models = [row["id"] for row in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]]
    for turn in range(10_000):
        if over.is_set():
            return
        model = models[(turn * turn + index) % len(models)]
        body = {"model": model, "messages": [{"role": "user", "content": PROMPTS[(turn + index) % 3]}], "max_tokens": 24, "seed": turn}
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).raise_for_status()
        time.sleep(0.2 * index)


def order(url: str, path: str, body: dict | None = None) -> None:
    """An order about an adapter."""
    httpx.post(f"{url}/v1/{path}", json=body, headers=_headers(), timeout=120).raise_for_status()


def _headers() -> dict[str, str]:
    return {"authorization": f"Bearer {KEY}"}


def shoot(page: Page, name: str) -> None:
    """One picture, of what the window shows."""
    page.screenshot(path=FOLDER / f"{name}.png")


if __name__ == "__main__":
    sys.exit(run_tool(main))

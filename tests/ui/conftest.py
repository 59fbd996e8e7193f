"""Debian's Chromium, driven by Playwright against a live API process with a fake engine. Every page is watched: what it logs and asks.

A machine without Chromium skips these tests with the reason; in CI that is a failure (.ci/run installs it).
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.server.api.live import LiveServer, live_server
from tests.server.api.test_adapters import write_adapter

KEY = "an-admin-key-of-a-test"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
ADAPTERS = ("json", "pirate", "sql", "team/haiku", "zebra")
expect.set_options(timeout=10_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for a module. Not for longer: Playwright's loop runs as long as it does, and asynchronous tests want their own."""
    chromium = shutil.which("chromium")
    if chromium is None:
        reason = "Debian's chromium is not installed (apt-get install chromium)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS, headless=True)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[LiveServer]:
    """One server for a module, with five adapters and an admin key."""
    folder = tmp_path_factory.mktemp("ui")
    for seed, name in enumerate(ADAPTERS):
        write_adapter(folder / "adapters" / name, seed=seed)
    with live_server(folder, model_dir, admin_key=KEY, max_total_tokens=1024) as server:
        yield server


@pytest.fixture
def live(shared: LiveServer) -> LiveServer:
    shared.control()
    return shared


OpenPage = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """`open_page(url, width=..., **context)`: the page in a session of its own. At the end nothing may have gone wrong in it unseen."""
    pages: list[Page] = []
    problems: list[str] = []
    ours = ("http://127.0.0.1:", "about:blank")

    def open_page(url: str, *, width: int = 1280, height: int = 900, **context: Any) -> Page:
        page = browser.new_context(viewport={"width": width, "height": height}, **context).new_page()
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on(
            "console",
            lambda said: problems.append(said.text) if said.type == "error" and "Failed to load resource" not in said.text else None,
        )
        page.on("request", lambda request: None if request.url.startswith(ours) else problems.append(f"asked {request.url}"))
        page.on("request", lambda request: problems.append(f"key in {request.url}") if KEY in request.url else None)
        page.goto(url)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.context.close()
    assert not problems


def give_key(page: Page, key: str = KEY) -> None:
    """Type the key in, as a person does."""
    page.get_by_role("button", name="Key: ").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Key", exact=True).fill(key)
    dialog.get_by_role("button", name="Use this key").click()
    expect(dialog).to_have_count(0)


def order(live: LiveServer, path: str, body: Any = None, method: str = "POST") -> Any:
    """An order given beside the page."""
    answer = live.client.request(method, f"/v1/{path}", json=body, headers={"authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200, answer.text
    return answer.json()

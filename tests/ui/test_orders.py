"""The page's second and third view in a real browser: orders with their confirmations and errors, and the live numbers."""

import re
from typing import Any

from playwright.sync_api import Locator, Page, expect

from tests.server.api.live import LiveServer, wait_for
from tests.server.api.test_adapters import PROMPT, write_adapter
from tests.ui.conftest import ADAPTERS, KEY, OpenPage, give_key, order


def adapters_tab(live: LiveServer, open_page: OpenPage, **options: Any) -> Page:
    page = open_page(f"{live.base_url}/ui#adapters", **options)
    expect(page.get_by_role("heading", name="Adapters need a key")).to_be_visible()
    give_key(page)
    expect(page.get_by_role("row", name="json")).to_be_visible()
    return page


def open_one(page: Page, name: str) -> Locator:
    page.get_by_role("button", name=f"Open {name}", exact=True).click()
    return page.get_by_role("dialog", name=name, exact=True)


def row(live: LiveServer, name: str) -> dict[str, Any]:
    return order(live, f"adapters/{name}", method="GET")


def test_a_wrong_key_shows_nothing(live: LiveServer, open_page: OpenPage) -> None:
    page = open_page(f"{live.base_url}/ui#adapters")
    give_key(page, "not-the-key-of-this-server")
    expect(page.get_by_role("heading", name="Adapters need a key")).to_be_visible()
    assert page.get_by_role("row").count() == 0
    page.get_by_role("tab", name="Live").click()
    expect(page.get_by_role("heading", name="Live numbers need a key")).to_be_visible()


def test_adapters_are_listed_searched_and_sorted(live: LiveServer, open_page: OpenPage) -> None:
    for _ in range(3):
        live.post("/generate", {"inputs": PROMPT, "parameters": {"adapter_id": "sql", "max_new_tokens": 1}})
    page = adapters_tab(live, open_page)
    names = page.locator("tbody .name")
    expect(names.first).to_have_text("sql")  # the most asked for
    sql = page.get_by_role("row", name="sql")
    expect(sql).to_contain_text("ready")
    expect(sql).to_contain_text("host memory")
    assert int(sql.locator(".column-hits").inner_text()) >= 3
    page.get_by_role("button", name="Name", exact=True).click()
    assert names.all_inner_texts()[: len(ADAPTERS)] == sorted(names.all_inner_texts())[: len(ADAPTERS)]
    expect(page.get_by_role("columnheader", name="Name")).to_have_attribute("aria-sort", "ascending")
    page.get_by_role("searchbox", name="Search adapters").fill("haik")
    expect(names).to_have_text(["team/haiku"])
    expect(page.get_by_role("columnheader", name="Owner")).to_have_count(0)  # this server has no tenants


def test_publish_says_what_is_wrong_and_then_publishes(live: LiveServer, open_page: OpenPage) -> None:
    write_adapter(live.folder / "adapters" / "fresh-source", seed=41)
    page = adapters_tab(live, open_page)
    page.get_by_role("button", name="Publish").click()
    dialog = page.get_by_role("dialog", name="Publish an adapter")
    dialog.get_by_role("textbox", name="Name").fill("team/fresh")
    dialog.get_by_label("Id in the source").fill("nobody")
    dialog.get_by_role("button", name="Publish").click()
    expect(dialog.get_by_role("alert")).to_contain_text("'nobody' was not found")
    dialog.get_by_label("Id in the source").fill("fresh-source")
    dialog.get_by_label("Keep it in memory on every server").check()
    dialog.get_by_role("button", name="Publish").click()
    expect(page.get_by_text("team/fresh answers with version 1")).to_be_visible()
    fresh = page.get_by_role("row", name="team/fresh")
    expect(fresh).to_contain_text("v1")
    expect(fresh).to_contain_text("pinned")
    assert row(live, "team/fresh")["source_id"] == "fresh-source"


def test_orders_ask_before_they_take_something_away(live: LiveServer, open_page: OpenPage) -> None:
    page = adapters_tab(live, open_page)
    open_one(page, "zebra").get_by_role("button", name="Load", exact=True).click()
    expect(page.get_by_text("zebra is loaded")).to_be_visible()
    assert row(live, "zebra")["tier"] == "host"
    open_one(page, "zebra").get_by_role("button", name="Pin", exact=True).click()
    expect(page.get_by_role("row", name="zebra")).to_contain_text("pinned")
    dialog = open_one(page, "zebra")
    dialog.get_by_role("button", name="Unload").click()
    question = page.get_by_role("dialog", name="Unload zebra?")
    expect(question).to_contain_text("Its memory is freed on every server")
    question.get_by_role("button", name="Cancel").click()
    assert row(live, "zebra")["pinned"]
    dialog.get_by_role("button", name="Unload").click()
    page.get_by_role("dialog", name="Unload zebra?").get_by_role("button", name="Unload").click()
    expect(page.get_by_text("zebra is unloaded")).to_be_visible()
    wait_for(lambda: row(live, "zebra")["tier"] == "absent")
    dialog = open_one(page, "zebra")
    dialog.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog", name="Delete zebra?").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("row", name="zebra")).to_have_count(0)
    order(live, "adapters/zebra?release=true", method="DELETE")


def test_a_name_is_rolled_back(live: LiveServer, open_page: OpenPage) -> None:
    for seed in (51, 52):
        write_adapter(live.folder / "adapters" / "turned", seed=seed)
        order(live, "adapters", {"name": "turned"})
    page = adapters_tab(live, open_page)
    dialog = open_one(page, "turned")
    expect(dialog).to_contain_text("2, published")
    dialog.get_by_role("button", name="Roll back").click()
    page.get_by_role("dialog", name="Roll back turned?").get_by_role("button", name="Roll back").click()
    expect(page.get_by_role("row", name="turned")).to_contain_text("v1")
    assert row(live, "turned")["version"] == 1
    expect(open_one(page, "turned").get_by_role("button", name="Roll back")).to_have_count(0)  # there is none before it


def test_an_order_that_fails_says_why(live: LiveServer, open_page: OpenPage) -> None:
    write_adapter(live.folder / "adapters" / "broken", use_qalora=True)
    page = adapters_tab(live, open_page)
    dialog = open_one(page, "broken")
    dialog.get_by_role("button", name="Load", exact=True).click()
    expect(dialog.get_by_role("alert")).to_contain_text("use_qalora")


def test_live_numbers_move(live: LiveServer, open_page: OpenPage) -> None:
    page = open_page(f"{live.base_url}/ui#live")
    give_key(page)
    way = page.get_by_role("img", name=re.compile("^Requests under way: running 0"))
    expect(way).to_be_visible()
    live.control(step_s=0.1)
    body = {"inputs": PROMPT, "parameters": {"adapter_id": "pirate", "max_new_tokens": 900, "ignore_eos_token": True}}
    with live.client.stream("POST", "/generate_stream", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        expect(page.get_by_role("img", name=re.compile("^Requests under way: running 1"))).to_be_visible()
    live.control()
    live.post("/generate", {"inputs": PROMPT, "parameters": {"adapter_id": "pirate", "max_new_tokens": 5}})
    expect(way).to_be_visible()
    expect(page.get_by_role("row", name="pirate")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("^Adapters by tier: memory 0, host memory [1-9]"))).to_be_visible()
    expect(page.get_by_text(re.compile(r"of \d+ failed or were dropped"))).to_be_visible()
    page.get_by_role("button", name="Pause").click()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.get_by_role("tab", name="Adapters").click()
    expect(page.get_by_role("row", name="json")).to_be_visible()
    page.get_by_role("tab", name="Live").click()
    expect(page.get_by_role("button", name="Go on")).to_be_visible()
    assert not [url for url in asked if "stats" in url]
    page.get_by_role("button", name="Go on").click()
    wait_for(lambda: page.wait_for_timeout(50) or [url for url in asked if "stats" in url])


def test_a_server_without_a_key_says_how_to_set_one(tmp_path, model_dir, open_page: OpenPage) -> None:
    from tests.server.api.live import live_server

    with live_server(tmp_path, model_dir) as live:
        page = open_page(f"{live.base_url}/ui#adapters")
        expect(page.get_by_text("MANYLORA_ADMIN_KEY")).to_be_visible()
        assert KEY not in page.content()

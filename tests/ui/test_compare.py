"""The page's first view in a real browser: picking among thousands, streaming side by side, what each answer says of itself."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.server.api.live import LiveServer, live_server, wait_for
from tests.ui.conftest import KEY, OpenPage


def cards(page: Page) -> Locator:
    return page.get_by_role("article")


def picker(page: Page) -> Locator:
    return page.get_by_role("listbox", name="Adapters")


def opened(live: LiveServer, open_page: OpenPage) -> Page:
    """The page with the adapters in it: before they have come it asks the base alone."""
    page = open_page(f"{live.base_url}/ui")
    expect(page.locator(".chip")).to_have_count(5)
    return page


def ask(page: Page) -> None:
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_text(re.compile(r"^(\d+) of \1 answers are there$"))).to_have_count(1)


def answer_of(page: Page, name: str) -> str:
    return page.get_by_label(f"Answer of {name}", exact=True).inner_text()


def test_base_and_four_adapters_stream_side_by_side(live: LiveServer, open_page: OpenPage) -> None:
    page = opened(live, open_page)
    expect(picker(page).get_by_role("option", selected=True)).to_have_text(
        ["json", "pirate", "sql", "team/haiku"]
    )  # the first four, at once
    expect(page.locator("#status")).to_have_text("base")
    page.get_by_label("Prompt").fill("one two three")
    page.get_by_label("Tokens").fill("12")
    ask(page)
    expect(cards(page)).to_have_count(5)
    texts = [answer_of(page, name) for name in ("the base", "json", "pirate", "sql", "team/haiku")]
    assert all(texts) and texts[0] != texts[1]
    for card, tier in zip(cards(page).all(), (None, "fetched", "fetched", "fetched", "fetched"), strict=True):
        numbers = dict(zip(card.locator("dt").all_inner_texts(), card.locator("dd").all_inner_texts(), strict=True))
        assert re.fullmatch(r"[\d.]+ m?s", numbers["first token"]) and re.fullmatch(r"[\d,.]+", numbers["tokens/s"])
        assert 1 < int(numbers["tokens"]) <= 12
        expect(card.locator(".tier")).to_have_text(tier) if tier else expect(card.locator(".tier")).to_be_hidden()
    ask(page)  # now the engine has them
    expect(page.locator(".answer .tier:visible")).to_have_text(["host memory"] * 4)
    submitted = [one for one in live.seen("Submit") if one["adapter"]]
    assert {one["adapter"]["name"] for one in submitted} == {"json", "pirate", "sql", "team/haiku"}


def test_a_fifth_is_refused_until_one_is_taken_off(live: LiveServer, open_page: OpenPage) -> None:
    page = opened(live, open_page)
    picker(page).get_by_role("option", name="zebra").click()
    expect(page.get_by_text("4 at most: take one off first")).to_be_visible()
    page.get_by_role("button", name="Take pirate off").click()
    picker(page).get_by_role("option", name="zebra").click()
    expect(page.locator(".answer h2")).to_have_text(["base", "json", "sql", "team/haiku", "zebra"])


def test_search_among_thousands_by_keyboard(tmp_path: Path, model_dir: Path, open_page: OpenPage) -> None:
    for number in range(3000):
        folder = tmp_path / "adapters" / f"team-{number % 7}" / f"task-{number:04d}"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    with live_server(tmp_path, model_dir) as live:
        page = open_page(f"{live.base_url}/ui")
        expect(page.get_by_text("3,000 adapters, the first 100 are shown")).to_be_visible()
        assert picker(page).get_by_role("option").count() == 100
        for name in page.locator(".chip .chip-name").all_inner_texts():
            page.get_by_role("button", name=f"Take {name} off").click()
        box = page.get_by_role("combobox", name="Search adapters")
        box.focus()
        page.keyboard.type("TEAM-3 task-29")
        expect(page.get_by_text("15 of 3,000")).to_be_visible()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        chosen = picker(page).get_by_role("option", selected=True)
        expect(chosen).to_have_count(1)
        assert chosen.get_attribute("id") == box.get_attribute("aria-activedescendant")
        expect(page.locator(".chip .chip-name")).to_have_text([chosen.inner_text()])
        page.keyboard.press("Escape")
        expect(box).to_have_value("")
        page.keyboard.type("nothing like it")
        expect(page.get_by_text("0 of 3,000")).to_be_visible()


def test_stop_ends_the_requests_on_the_server(live: LiveServer, open_page: OpenPage) -> None:
    live.answer("word " * 900, step_s=0.05)  # nobody's answer ends by itself
    page = opened(live, open_page)
    page.get_by_label("Tokens").fill("900")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator(".answer[aria-busy=true]")).to_have_count(5)
    for answer in page.locator(".answer-text").all():  # adapters may have to be packed first
        expect(answer).not_to_be_empty(timeout=30_000)
    page.get_by_role("button", name="Stop").click()
    try:
        expect(page.get_by_text("stopped")).to_have_count(5)
    except AssertionError as error:
        raise AssertionError(cards(page).all_inner_texts()) from error
    wait_for(lambda: not live.api.metrics.underway)
    expect(page.get_by_role("button", name="Ask")).to_be_visible()


def test_what_fails_is_said_in_its_own_card(live: LiveServer, open_page: OpenPage) -> None:
    page = opened(live, open_page)
    expect(cards(page)).to_have_count(5)
    live.control(fail="the engine could not", kind="GenerationFailed")
    ask(page)
    expect(page.get_by_role("alert").filter(has_text="the engine could not")).to_have_count(5)
    live.control()
    ask(page)
    expect(page.get_by_role("alert")).to_have_count(0)
    page.get_by_label("Prompt").fill("word " * 2000)
    ask(page)
    expect(page.get_by_role("alert").first).to_contain_text("must be <= 1024")


def test_what_a_model_writes_is_never_read_as_html(live: LiveServer, open_page: OpenPage) -> None:
    text = "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b>"
    live.answer(text)
    page = opened(live, open_page)
    ask(page)
    assert answer_of(page, "the base") == text
    assert page.locator(".answer-text :is(img, script, b)").count() == 0


def test_plain_text_goes_to_completions(live: LiveServer, open_page: OpenPage) -> None:
    page = opened(live, open_page)
    page.get_by_label("As", exact=True).select_option("plain text")
    page.get_by_label("Prompt").fill("alpha beta")
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.get_by_text("5 of 5 answers are there")).to_have_count(1)
    tokenizer = live.api.model.tokenizer
    assert live.seen("Submit")[-1]["token_ids"] == tokenizer.encode("alpha beta", add_special_tokens=True)


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_the_key_goes_out_in_the_header_that_is_taken(live: LiveServer, open_page: OpenPage, header: str) -> None:
    """A gateway that wants a key for everything but the page: the API's own header, or API Gateway's."""
    page = open_page("about:blank")
    expected = f"Bearer {KEY}" if header == "authorization" else KEY
    sent: list[dict[str, str]] = []

    def gate(route) -> None:
        sent.append(route.request.headers)
        if route.request.headers.get(header) == expected:
            route.fallback()
        else:
            route.fulfill(status=403, json={"message": "Forbidden"})

    page.route(re.compile(r"/(v1/|info|health)"), gate)
    page.goto(f"{live.base_url}/ui")
    expect(page.get_by_role("heading", name="Answers need a key")).to_be_visible()
    page.get_by_role("button", name="Enter a key").click()
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(picker(page).get_by_role("option")).to_have_count(5)
    sent.clear()
    ask(page)
    assert sent and all(one.get(header) == expected for one in sent)
    kept = page.evaluate("({session: {...sessionStorage}, local: {...localStorage}, cookie: document.cookie})")
    assert kept["session"]["manylora.key"] == KEY and not kept["local"] and not kept["cookie"]
    page.reload()
    expect(picker(page).get_by_role("option")).to_have_count(5)  # the tab remembers it
    page.get_by_role("button", name="Key: one is set").click()
    page.get_by_role("button", name="Forget it").click()
    expect(page.get_by_role("heading", name="Answers need a key")).to_be_visible()


def test_it_works_behind_a_gateways_prefix(tmp_path: Path, model_dir: Path, open_page: OpenPage) -> None:
    with live_server(tmp_path, model_dir, root_path="/prod") as live:
        page = open_page("about:blank")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{live.base_url}/prod/ui")
        page.get_by_label("Tokens").fill("4")
        ask(page)
        assert answer_of(page, "the base")
        assert asked and all(url.startswith(f"{live.base_url}/prod/") for url in asked)

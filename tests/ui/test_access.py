"""The page for everybody: a narrow window, the keyboard alone, names for every control, colour schemes, reduced motion."""

import pytest
from playwright.sync_api import Page, expect

from tests.server.api.live import LiveServer
from tests.ui.conftest import OpenPage, give_key

TABS = ("Compare", "Adapters", "Live")
READY = {"Compare": ".answer", "Adapters": "tbody tr", "Live": ".tile"}


def show(page: Page, tab: str) -> None:
    page.get_by_role("tab", name=tab).click()
    expect(page.locator(f"#view-{tab.lower()} {READY[tab]}").first).to_be_visible()


@pytest.mark.parametrize("width", [360, 768, 1920])
def test_nothing_is_wider_than_the_window(live: LiveServer, open_page: OpenPage, width: int) -> None:
    page = open_page(f"{live.base_url}/ui", width=width)
    give_key(page)
    for tab in TABS:
        show(page, tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
        small = page.evaluate(
            """[...document.querySelectorAll('button, select, input')].filter((one) => one.checkVisibility())
               .map((one) => [one.textContent || one.name, one.getBoundingClientRect()])
               .filter(([, box]) => box.right > innerWidth + 1 || box.height < 18 || box.width < 18).map(([name]) => name)"""
        )
        assert not small, tab
    show(page, "Adapters")
    page.get_by_role("button", name="Open json").click()
    box = page.get_by_role("dialog").bounding_box()
    assert box and box["x"] >= 0 and box["x"] + box["width"] <= width


def test_by_keyboard_alone(live: LiveServer, open_page: OpenPage) -> None:
    page = open_page(f"{live.base_url}/ui")
    expect(page.locator(".answer")).to_have_count(5)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("tab", name="Compare")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Adapters")).to_be_focused()
    expect(page.get_by_role("tab", name="Adapters")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_role("tabpanel", name="Adapters")).to_be_visible()
    page.keyboard.press("End")
    expect(page.get_by_role("tabpanel", name="Live")).to_be_visible()
    page.keyboard.press("ArrowRight")  # round to the first
    expect(page.get_by_role("tabpanel", name="Compare")).to_be_visible()
    page.keyboard.press("Tab")
    key = page.get_by_role("button", name="Key: none is set")
    expect(key).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Key", exact=True)).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(key).to_be_focused()  # back where it was
    page.keyboard.press("Tab")
    expect(page.get_by_role("combobox", name="Search adapters")).to_be_focused()


def test_every_control_has_a_name_and_every_field_a_label(live: LiveServer, open_page: OpenPage) -> None:
    page = open_page(f"{live.base_url}/ui")
    give_key(page)
    for tab in TABS:
        show(page, tab)
        snapshot = page.locator("body").aria_snapshot()
        unnamed = [line.strip() for line in snapshot.splitlines() if line.strip() in {f"- {role}" for role in ROLES}]
        assert not unnamed, tab
    assert page.evaluate("document.documentElement.lang") == "en"


ROLES = ("button", "textbox", "searchbox", "combobox", "spinbutton", "checkbox", "tab", "tabpanel", "dialog", "img", "listbox", "table")


def test_colours_follow_the_system_and_can_be_read(live: LiveServer, open_page: OpenPage) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        page = open_page(f"{live.base_url}/ui", color_scheme=scheme)
        give_key(page)
        show(page, "Adapters")
        show(page, "Compare")
        seen[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        for low in page.evaluate(CONTRAST):
            raise AssertionError(f"{scheme}: {low}")
    assert seen["light"] != seen["dark"]


# Texts whose colour has less than 4.5 to 1 against the first opaque background behind them (WCAG 2, AA). Half-transparent ones are mixed.
CONTRAST = """
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const parse = (text, under) => {
    canvas.globalCompositeOperation = "copy"; canvas.fillStyle = `rgb(${under})`; canvas.fillRect(0, 0, 1, 1);
    canvas.globalCompositeOperation = "source-over"; canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  };
  const behind = (element) => {
    const layers = [];
    for (let one = element; one; one = one.parentElement) layers.unshift(getComputedStyle(one).backgroundColor);
    return layers.reduce((under, layer) => parse(layer, under), [255, 255, 255]);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    if (!element.checkVisibility() || ![...element.childNodes].some((one) => one.nodeType === 3 && one.data.trim())) continue;
    if (element.closest(".visually-hidden, .skip, kbd, svg")) continue;
    const under = behind(element), over = parse(getComputedStyle(element).color, under);
    const [a, b] = [light(under), light(over)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push(`${element.className || element.tagName} "${element.textContent.trim().slice(0, 30)}" ${ratio.toFixed(2)}`);
  }
  return low;
})()
"""


def test_nothing_moves_for_whoever_wants_it_so(live: LiveServer, open_page: OpenPage) -> None:
    page = open_page(f"{live.base_url}/ui", reduced_motion="reduce")
    live.answer("word " * 900, step_s=0.05)  # nobody's answer ends meanwhile
    page.get_by_role("button", name="Ask").click()
    busy = page.locator(".answer[aria-busy=true] .answer-text").first
    expect(busy).to_be_visible()
    assert busy.evaluate("(one) => getComputedStyle(one, '::after').animationName") == "none"
    assert page.get_by_role("button", name="Stop").evaluate("(one) => getComputedStyle(one).transitionDuration") == "0s"
    page.get_by_role("button", name="Stop").click()

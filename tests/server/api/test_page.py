"""/ui over HTTP: the files, the headers that bind the browser, prefixes, the setting that turns it off. tests/ui drives the page."""

import re
import tomllib
from pathlib import Path

import pytest

from server.api.page import page_files
from tests.server.api.live import LiveServer, live_server

ROOT = Path(__file__).parents[3]
FILES = ROOT / "server" / "api" / "ui"


def test_the_page_and_its_files_need_no_key_and_are_bound_by_their_headers(live: LiveServer) -> None:
    page = live.client.get("/ui")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.content == (FILES / "index.html").read_bytes()
    for name in sorted(page_files()):
        answer = live.client.get(f"/ui/{name}")
        assert answer.status_code == 200 and answer.content == (FILES / name).read_bytes()
        rules = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
        assert rules["default-src"] == "'none'" and rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
        assert rules["frame-ancestors"] == rules["form-action"] == rules["base-uri"] == "'none'"
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "no-referrer"


def test_a_browser_that_has_a_file_is_not_sent_it_again(live: LiveServer) -> None:
    first = live.client.get("/ui/app.js")
    again = live.client.get("/ui/app.js", headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 304 and not again.content and again.headers["etag"] == first.headers["etag"]
    assert live.client.get("/ui/app.js", headers={"if-none-match": '"other"'}).content == first.content


@pytest.mark.parametrize("name", ["nothing.js", "../page.py", "%2e%2e/page.py", "..%2fpage.py", "ui/app.js", "app.js/", "__init__.py"])
def test_nothing_but_the_files_is_served(live: LiveServer, name: str) -> None:
    assert live.client.get(f"/ui/{name}").status_code == 404


def test_the_page_asks_no_third_party_and_runs_nothing_inline() -> None:
    """What the policy would refuse is not there in the first place: also on a server that somebody puts another policy before."""
    for path in FILES.iterdir():
        text = path.read_text()
        hosts = set(re.findall(r"(?:https?:)?//[a-z][\w.-]*\.[a-z]{2,}", text)) - {"http://www.w3.org"}  # SVG's name, not an address
        assert not hosts, f"{path.name}: {hosts}"
        assert not re.search(r"""\s(?:style|on[a-z]+)=["']|<script(?![^>]*\ssrc=)|innerHTML|javascript:|\beval\(""", text), path.name
        assert not re.search(r"""(?:src|href)=["']/""", text), f"{path.name}: a link from the root would miss a gateway's prefix"


def test_the_package_brings_the_files() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["server.api"] == ["ui/*"]
    assert {path.name for path in FILES.iterdir()} == set(page_files()), "a kind of file that page.py does not serve"


def test_it_works_behind_a_prefix_and_can_be_turned_off(tmp_path: Path, model_dir: Path) -> None:
    with live_server(tmp_path / "prefix", model_dir, root_path="/prod") as live:
        for path in ("/prod/ui", "/ui", "/prod/ui/app.js"):
            assert live.client.get(path).status_code == 200
        moved = live.client.get("/prod/ui/")
        assert moved.status_code == 308 and moved.url.join(moved.headers["location"]).path == "/prod/ui"
    with live_server(tmp_path / "off", model_dir, ui=False, wait=False) as live:
        assert {live.client.get(path).status_code for path in ("/ui", "/ui/", "/ui/app.js")} == {404}

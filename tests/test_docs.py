"""The documentation says what the code does: tables are those of the code, links and paths exist, commands are targets of the Makefile."""

import re
from pathlib import Path

import pytest

from docs.tables import architectures, fill, pages
from server.model.architectures import VERIFIED

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_tables_are_those_of_the_code(page):
    assert page.read_text() == fill(page.read_text()), "run `make docs`"


def test_architectures_are_all_listed():
    assert set(re.findall(r"`([a-z0-9_]+)`", architectures())) == set(VERIFIED)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:server|infra|ami|config|tests|examples|benchmarks|docs)/[A-Za-z0-9_./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in pages():
        for target in re.findall(r"`make ([a-z-]+)", page.read_text()):
            assert target in targets, f"{page.name}: make {target}"

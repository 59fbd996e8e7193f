"""Symbolic links between the places of tenants in one --adapters-dir: none leads from one's place into another's."""

import shutil
import tomllib
from pathlib import Path

import pytest

from server.api.tenants.bounds import LinkBounds
from server.api.tenants.rules import parse_rules
from server.errors import AdapterNotFound, AdapterRefused
from server.sources import SourceOptions, Sources
from tests.server.api.tenants.world import World
from tests.server.sources.worlds import LocalWorld, adapter_files

RULES = """
[defaults]
sources = { local = ["of/{tenant}"], s3 = ["x"] }
[shared]
sources = { local = ["common", "acme/open/"] }
[gateway]
others = "each"
[tenants.acme]
sources = { local = ["acme"] }
[tenants.beta]
[tenants.every]
sources = { local = ["*"] }
"""


def bounds(rules: str = RULES) -> LinkBounds:
    return LinkBounds(parse_rules(tomllib.loads(rules)))


def test_the_places_that_something_is_below() -> None:
    assert bounds().of("acme/sql") == ["acme"] and bounds().of("acme/open/sql") == ["acme", "acme/open"]
    assert (
        bounds().of("of/beta/sql") == ["of/beta"]
        and bounds().of("of/anybody/sql") == ["of/anybody"]
        and bounds().of("common") == ["common"]
    )
    for of_nobody in ("x", "acmes/sql", "of/sql.v1/x", "of", "commons/x"):
        assert bounds().of(of_nobody) == [], of_nobody
    assert bounds(RULES.replace("each", "refuse")).of("of/anybody/sql") == [] and bounds("").of("acme/sql") == []


@pytest.fixture
def folders(tmp_path: Path) -> LocalWorld:
    folders = LocalWorld(tmp_path / "adapters")
    folders.put("sql", adapter_files())  # team/sql
    for name in ("acme/own", "of/beta/secret", "common/pirate"):
        shutil.copytree(folders.root / "team" / "sql", folders.root / name)
    return folders


@pytest.fixture
def source(folders: LocalWorld):
    sources = Sources(SourceOptions(adapters_dir=folders.root))
    sources.bound_links(bounds().of)
    return sources.get("local")


@pytest.mark.parametrize("target", ["of/beta/secret", "of/beta", "common/pirate", "team/sql", "of/beta/nothing"])
def test_a_link_out_of_a_place_is_refused(source, folders: LocalWorld, target: str) -> None:
    """By the same words whether there is something or not."""
    for name in ("acme/link", "acme/open", "acme/deep/link"):
        link = folders.root / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(folders.root / target)
        for adapter_id in (name, f"{name}/secret"):
            with pytest.raises(AdapterRefused, match=f"Adapter '{adapter_id}' leaves the place of its tenant"):
                source.snapshot(adapter_id)


def test_a_file_link_out_of_a_place_is_refused(source, folders: LocalWorld) -> None:
    weights = folders.root / "acme" / "own" / "adapter_model.safetensors"
    assert source.snapshot("acme/own").folder is not None
    weights.unlink()
    weights.symlink_to(folders.root / "of" / "beta" / "secret" / weights.name)
    with pytest.raises(AdapterRefused, match="leaves the place of its tenant"):
        source.snapshot("acme/own")


def test_links_within_a_place_and_of_the_operator_are_followed(source, folders: LocalWorld) -> None:
    (folders.root / "acme" / "latest").symlink_to("own")
    assert source.snapshot("acme/latest").folder == folders.root / "acme" / "own"
    (folders.root / "of" / "gamma").symlink_to(folders.root / "team")  # a tenant's whole place
    assert source.snapshot("of/gamma/sql").folder == folders.root / "team" / "sql"
    (folders.root / "mine").symlink_to(folders.root / "of" / "beta")  # no tenant's: the operator's alone
    assert source.snapshot("mine/secret").files
    (folders.root / "acme" / "nowhere").symlink_to("nothing")
    with pytest.raises(AdapterNotFound):
        source.snapshot("acme/nowhere")


def test_over_http(live, made: World, request: pytest.FixtureRequest) -> None:
    """To call and to publish."""
    link = made.folder / "adapters" / "acme" / "stolen"
    link.symlink_to(made.folder / "adapters" / "beta" / "secret")
    request.addfinalizer(link.unlink)
    called = made.generate(live, "acme", "acme/stolen")
    published = made.ask(live, "acme", "POST", "/v1/adapters", {"name": "stolen", "id": "acme/stolen"})
    for answer in (called, published):
        assert answer.status_code in (400, 422, 424) and "'acme/stolen' leaves the place of its tenant" in answer.text, answer.text
    assert made.generate(live, "beta", "beta/secret").status_code == 200

"""Which ids a tenant may name in each source: places by whole segments, whatever way an id is written; nothing is asked of anybody."""

import tomllib
from functools import partial
from pathlib import Path

import pytest

from server.api.adapters import AdapterSelection, Merge
from server.api.published import NamedSources, PublishedWeights
from server.api.registry import NOTHING, Entry, Registry
from server.api.tenants.access import Access, Places, is_below, unrestricted
from server.api.tenants.callers import Caller
from server.api.tenants.limits import scopes_of
from server.api.tenants.rules import Rules, parse_rules
from server.errors import AdapterNotFound, Conflict, ValidationFailed
from server.sources import SourceOptions, Sources

RULES = """
[shared]
sources = { local = ["common"], s3 = ["company/shared"], hub = ["open-models"] }
prefix_cache = true
[tenants.acme]
max_names = 2
adapters = { "s3://company/adapters/acme/sql/" = { queue_length = 7 } }
sources = { local = ["acme"], s3 = ["s3://company/adapters/acme/", "acme-bucket"], hub = ["acme-org"] }
[tenants.every]
sources = { local = ["*"] }
"""


@pytest.fixture
def rules() -> Rules:
    return parse_rules(tomllib.loads(RULES))


@pytest.fixture
def access(rules: Rules, tmp_path: Path):
    options = SourceOptions(
        adapters_dir=tmp_path, allowed_buckets=("company", "acme-bucket", "other-bucket"), model_bucket="company", model_folder="adapters",
        hub_enabled=True, allowed_hub_owners=("*",),
    )  # fmt: skip
    registry, places = Registry(tmp_path / "registry", "model", "local"), Places(Sources(options))
    return lambda name: Access(Caller(rules.tenant(name)), registry, places, rules.shared)


ALLOWED = [
    ("local", "acme/sql"), ("local", "acme"), ("local", "common/pirate"),
    ("s3", "acme/sql"), ("s3", "s3://company/adapters/acme/sql"), ("s3", "s3://company/adapters/acme/sql/"), ("s3", "s3://acme-bucket/x/y"),
    ("s3", "s3://company/shared/pirate"),
    ("hub", "acme-org/sql"), ("hub", "open-models/x"),
]  # fmt: skip
REFUSED = [
    ("local", "acme-old/sql"), ("local", "acmesql"), ("local", "beta/acme"), ("local", "commons/x"), ("local", "sql"),
    ("local", "Acme/sql"),
    ("s3", "acme-old/sql"), ("s3", "shared/pirate"), ("s3", "s3://company/adapters/beta/sql"), ("s3", "s3://company/acme/sql"),
    ("s3", "s3://acme-bucket-2/x"), ("s3", "s3://other-bucket/adapters/acme"),
    ("hub", "acme-org2/sql"), ("hub", "beta/acme-org"), ("hub", "Acme-Org/sql"),
]  # fmt: skip
NO_IDS = [
    ("local", "acme/../beta/sql"), ("local", "/acme/sql"), ("local", "acme//sql"), ("local", "beta\\sql"), ("local", "acme/./sql"),
    ("s3", "s3://company/adapters/acme/../beta"), ("s3", "acme/../beta/sql"), ("s3", "s3://company"),
    ("s3", "S3://company/adapters/acme/sql"), ("hub", "acme-org"),
    ("hub", "acme-org/a/b"), ("hub", "acme-org/../beta"),
]  # fmt: skip


def test_places_that_are_a_tenants_or_everybodys(access) -> None:
    for source, adapter_id in ALLOWED:
        selection = AdapterSelection(source, adapter_id)
        called = access("acme").to_call(selection)
        assert called is not None and called.shown_ids == (adapter_id,), selection
        assert access("acme").sees(selection)


def test_one_adapter_is_one_key_however_it_is_written(access, rules: Rules) -> None:
    """For limits, metrics, deletions and what is remembered; an answer names it as the request did."""
    for caller in ("acme", "operator"):
        to_call = access(caller).to_call
        for written in ("acme/sql", "acme/sql/", "s3://company/adapters/acme/sql", "s3://company/adapters/acme/sql/"):
            called = to_call(AdapterSelection("s3", written))
            assert called.name_key == ("s3", "acme/sql", None) and called.shown_ids == (written,), written
        merged = to_call(AdapterSelection("s3", merge=Merge(("acme/sql/", "s3://acme-bucket/x/"), (1, 1))))
        assert merged.ids == ("acme/sql", "s3://acme-bucket/x") and merged.shown_ids == ("acme/sql/", "s3://acme-bucket/x/")
    spelling = partial(access("acme").places.spelling, "s3")
    keys = {}
    for written in ("acme/sql/", "s3://company/adapters/acme/sql"):
        called = access("acme").to_call(AdapterSelection("s3", written))
        keys |= {one.key: one.limits.queue_length for one in scopes_of(rules.tenant("acme"), rules.shared, called, (), spelling)}
    assert keys == {"adapter/acme/s3/acme/sql": 7}  # whose limit the file writes in yet another way


async def test_a_deleted_id_is_not_had_by_another_spelling(tmp_path: Path) -> None:
    sources = Sources(SourceOptions(model_bucket="company"))
    registry = Registry(tmp_path, "model", "s3")
    requests = NamedSources(sources, registry, PublishedWeights(registry.folder))
    anybody = unrestricted(registry, Places(sources))
    await registry.update("sql", lambda before, now: Entry(changed=now, deleted=True))
    for written in ("sql", "sql/", "s3://company/sql", "s3://company/sql/"):
        called = anybody.to_call(AdapterSelection("s3", written))
        with pytest.raises(AdapterNotFound):  # before S3 is asked
            requests.get("s3").snapshot(called.adapter_id)
        assert anybody.to_order(written) == "sql"
    assert anybody.to_call(AdapterSelection("s3", "s3://company")).adapter_id == "s3://company"  # no id: the source says why


def test_places_that_are_not(access) -> None:
    for source, adapter_id in REFUSED:
        selection = AdapterSelection(source, adapter_id)
        with pytest.raises(AdapterNotFound) as caught:
            access("acme").to_call(selection)
        assert caught.value.message == f"Adapter '{adapter_id}' was not found in source '{source}'", selection
        assert not access("acme").sees(selection)


def test_what_is_no_id(access) -> None:
    for source, adapter_id in NO_IDS:
        with pytest.raises(ValidationFailed):
            access("acme").to_call(AdapterSelection(source, adapter_id))
        assert not access("acme").sees(AdapterSelection(source, adapter_id))
        with pytest.raises(ValidationFailed):
            access("every").to_call(AdapterSelection(source, adapter_id))


def test_one_wrong_id_of_several_refuses_all(access) -> None:
    merge = Merge(("acme/sql", "common/pirate"), (1, 1))
    assert access("acme").to_call(AdapterSelection("local", merge=merge)).merge == merge
    with pytest.raises(AdapterNotFound, match=r"acme/sql\+beta/sql"):
        access("acme").to_call(AdapterSelection("local", merge=Merge(("acme/sql", "beta/sql"), (1, 1))))


async def test_ids_that_a_tenant_deletes_are_bounded(access) -> None:
    """Each stays in the registry that all share: nobody fills it for the others."""
    acme, every = access("acme"), access("every")
    for number in range(2):
        kept = acme.to_delete(f"acme/{number}")
        await acme.registry.update(kept, lambda before, now: Entry(changed=now, deleted=True))
    await acme.registry.update("beta/x", lambda before, now: Entry(changed=now, deleted=True))  # another's
    for refused in ("acme/2", "acme/3"):
        with pytest.raises(Conflict, match="has 2 ids of sources deleted, all that it may"):
            acme.to_delete(refused)
    assert acme.to_delete("acme/1") == "acme/1" and acme.to_delete("acme/1", True) == "acme/1" and every.to_delete("acme/9") == "acme/9"
    await acme.registry.update("acme/1", lambda before, now: NOTHING)  # released
    assert acme.to_delete("acme/2") == "acme/2"


def test_everything_is_said_with_a_star(access) -> None:
    assert access("every").to_call(AdapterSelection("local", "anything/at/all")) is not None
    with pytest.raises(AdapterNotFound):
        access("every").to_call(AdapterSelection("hub", "acme-org/sql"))


def test_whose_prefix_cache(access) -> None:
    """Shared by the file's word alone, and for what is everybody's alone."""
    acme, every = access("acme"), access("every")
    assert acme.cache_salt(None) == acme.cache_salt(AdapterSelection("local", "common/pirate")) == ""
    for own in (AdapterSelection("local", "acme/sql"), AdapterSelection("local", merge=Merge(("common/pirate", "acme/sql"), (1, 1)))):
        assert acme.cache_salt(own) and acme.cache_salt(own) != every.cache_salt(own)


def test_whole_segments() -> None:
    assert is_below("a/b", ["a"]) and is_below("a", ["a"]) and is_below("a/b/c", ["x", "/a/b/"]) and is_below("a", ["*"])
    assert not is_below("ab", ["a"]) and not is_below("a", ["a/b"]) and not is_below("a", [])

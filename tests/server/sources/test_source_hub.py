"""The hub source: off by default, allowed owners alone, pinned commits, and whose token is sent."""

import logging
from pathlib import Path

import pytest

from server.errors import AdapterNotFound, AdapterRefused, SourceUnavailable, ValidationFailed
from server.sources import SourceOptions, Store
from server.sources.hub import HubSource
from tests.server.sources.hub_stand_in import Repository
from tests.server.sources.worlds import HubWorld, adapter_files


def test_off_unless_enabled_and_owners_are_named() -> None:
    with pytest.raises(ValidationFailed, match="hub-enabled"):
        HubSource(SourceOptions(allowed_hub_owners=("team",)))
    with pytest.raises(ValidationFailed, match="allowed-hub-owners"):
        HubSource(SourceOptions(hub_enabled=True))


def test_foreign_owners_are_not_asked(hub: HubWorld) -> None:
    hub.hub.commit("other/sql", adapter_files())
    with pytest.raises(AdapterNotFound, match="allowed-hub-owners"):
        HubSource(hub.options()).snapshot("other/sql")
    assert hub.hub.requests == []
    assert HubSource(hub.options(allowed_hub_owners=("*",))).snapshot("other/sql").files


def test_a_repository_that_moved_to_a_foreign_owner_is_not_followed(hub: HubWorld) -> None:
    hub.hub.commit("other/sql", adapter_files())
    hub.hub.repositories["team/sql"] = Repository(moved_to="other/sql")
    with pytest.raises(AdapterNotFound, match="allowed-hub-owners"):
        HubSource(hub.options()).snapshot("team/sql")


@pytest.mark.parity(
    "2", "a hub repository that moved, or in other case", "refused", "with its name: a limit or a deletion holds for an adapter's one name"
)
def test_a_repository_is_asked_for_by_its_own_name(hub: HubWorld) -> None:
    """A limit or a deletion of one name must not be passed by another: one it had before, or one in other case, which the hub takes."""
    hub.hub.commit("team/sql", adapter_files())
    for other in ("team/old", "team/SQL"):
        hub.hub.repositories[other] = Repository(moved_to="team/sql")
        with pytest.raises(AdapterRefused, match=f"'{other}' is called 'team/sql' on the hub"):
            HubSource(hub.options()).snapshot(other)


@pytest.mark.parametrize(
    "adapter_id", ["sql", "team/a/sql", "team/sq l", "team/s--ql", "team/s..ql", "team/ß", "team/sql@main", "team/sql?x=1"]
)
def test_ids_are_owner_and_name(hub: HubWorld, adapter_id: str) -> None:
    with pytest.raises(ValidationFailed, match="`owner/name`"):
        HubSource(hub.options()).snapshot(adapter_id)


@pytest.mark.parametrize("revision", ["", "../../x", "a b", "x?y", "-x", "x" * 201, "a\nb"])
def test_odd_revisions_are_refused(hub: HubWorld, revision: str) -> None:
    with pytest.raises(ValidationFailed, match="`revision` must be a branch, a tag or a commit"):
        HubSource(hub.options()).snapshot("team/sql", revision=revision)


def test_revisions_name_commits(hub: HubWorld, tmp_path: Path) -> None:
    old = hub.hub.commit("team/sql", adapter_files(1))
    new = hub.hub.commit("team/sql", adapter_files(2))
    branch = hub.hub.commit("team/sql", adapter_files(3), branch="feature/x")
    source, store = HubSource(hub.options()), Store(tmp_path)
    assert source.snapshot("team/sql").version == new
    for revision, commit, seed in ((old, old, 1), ("main", new, 2), ("feature/x", branch, 3)):
        stored = store.materialize(source, source.snapshot("team/sql", revision=revision))
        assert stored.snapshot.version == commit
        assert (stored.path / "adapter_model.safetensors").read_bytes() == adapter_files(seed)["adapter_model.safetensors"]
    with pytest.raises(AdapterNotFound):
        source.snapshot("team/sql", revision="gone")


def test_only_the_requests_own_token_is_sent(hub: HubWorld, tmp_path: Path) -> None:
    hub.put("sql", adapter_files())
    source, store = HubSource(hub.options()), Store(tmp_path)
    store.materialize(source, source.snapshot("team/sql"))
    assert {request.token for request in hub.hub.requests} == {None}  # not the machine's own, see conftest
    hub.hub.repositories["team/sql"].token = "hf_mine"
    hub.hub.commit("team/sql", adapter_files(2))
    hub.hub.requests.clear()
    store.materialize(source, source.snapshot("team/sql", api_token="hf_mine"), api_token="hf_mine")
    assert {request.token for request in hub.hub.requests} == {"hf_mine"}


def test_a_private_adapter_needs_the_token_on_every_request(hub: HubWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    hub.put("sql", adapter_files())
    hub.hub.repositories["team/sql"].token = "hf_mine"
    source, store = HubSource(hub.options()), Store(tmp_path)
    store.materialize(source, source.snapshot("team/sql", api_token="hf_mine"), api_token="hf_mine")
    messages = []
    for adapter_id, token in (("team/sql", None), ("team/sql", "hf_wrong"), ("team/none", "hf_wrong")):
        with pytest.raises(AdapterNotFound) as error:  # though the files lie in the store
            source.snapshot(adapter_id, api_token=token)
        messages.append(error.value.message.replace("team/none", "team/sql"))
    assert len(set(messages)) == 1
    assert not [text for text in (*messages, caplog.text) if "hf_mine" in text or "hf_wrong" in text]


@pytest.mark.parametrize("token", ["a b", "a\nb", "\u00e9", "x" * 2000])
def test_tokens_that_cannot_be_sent_are_refused_unquoted(hub: HubWorld, token: str) -> None:
    with pytest.raises(ValidationFailed) as error:
        HubSource(hub.options()).snapshot("team/sql", api_token=token)
    assert error.value.param == "api_token"
    assert token not in error.value.message


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_failing_hub_is_unavailable(hub: HubWorld, status: int) -> None:
    hub.put("sql", adapter_files())
    hub.hub.fail_with = status
    with pytest.raises(SourceUnavailable, match=f"it answered {status}"):
        HubSource(hub.options()).snapshot("team/sql")


def test_no_hub_at_all_is_unavailable(hub: HubWorld) -> None:
    with pytest.raises(SourceUnavailable, match="ConnectError"):
        HubSource(hub.options(hub_endpoint="http://127.0.0.1:9")).snapshot("team/sql")


def test_a_hub_that_fails_during_the_fetch_leaves_nothing(hub: HubWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library's pauses between tries
    hub.put("sql", adapter_files())
    source, store = HubSource(hub.options()), Store(tmp_path)
    snapshot = source.snapshot("team/sql")
    hub.hub.fail_with = 500
    with pytest.raises(SourceUnavailable):
        store.materialize(source, snapshot)
    hub.hub.fail_with, hub.hub.cut_off_at = None, 1000
    with pytest.raises(SourceUnavailable):
        store.materialize(source, snapshot)
    assert not [*(tmp_path / "objects").iterdir(), *(tmp_path / "staging").iterdir(), *(tmp_path / "index").iterdir()]
    hub.hub.cut_off_at = None
    assert store.verify(store.materialize(source, snapshot))

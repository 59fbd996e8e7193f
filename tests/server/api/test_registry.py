"""The registry's file: numbered, whole, one writer at a time, followed by every server; and what happens when the file system fails."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from server.api.adapters import AdapterResolver, AdapterSelection
from server.api.published import NamedSources, PublishedWeights
from server.api.registry import MAX_NAMES, NOTHING, Entry, Names, Registry, Version
from server.api.shared_file import SharedFile
from server.api.text.tokenizer import load_tokenizer
from server.errors import AdapterNotFound, SourceUnavailable, Unavailable, ValidationFailed
from server.metrics import Metrics
from server.sources import Source, SourceOptions, Sources, Store
from server.sources.content import SETTLE_S, hash_adapter
from server.sources.flight import file_lock
from tests.server.api.fake_engine import layout
from tests.server.api.live import ROOT, wait_for
from tests.server.api.test_adapters import write_adapter


def pinned(before: Entry, now: int) -> Entry:
    return Entry(changed=now, pinned=True)


def make(root: Path) -> Registry:
    return Registry(root, "org/base", "local")


async def until(condition, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def test_what_one_writes_the_other_follows(tmp_path: Path) -> None:
    a, b = make(tmp_path), make(tmp_path)
    seen: list[tuple[str, bool, bool]] = []
    b.on_change = lambda name, before, after: seen.append((name, before.pinned, after.pinned))
    following = asyncio.create_task(b.follow(0.01))
    assert await a.update("x", pinned) == Entry(changed=1, pinned=True) == a.entry("x")
    await until(lambda: b.view.generation == 1)
    assert seen == [("x", False, True)] and b.entry("x") == a.entry("x") and b.entry("y") == NOTHING
    await b.update("y", pinned)
    await a.update("z", pinned)  # `a` has not looked since: nothing of `b`'s is lost
    assert set(a.view.names) == {"x", "y", "z"} and a.view.generation == 3
    following.cancel()


async def test_a_fault_of_ours_does_not_end_the_following(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b = make(tmp_path), make(tmp_path)

    def fail(name: str, before: Entry, after: Entry) -> None:
        raise KeyError(f"a fault about {name}")

    b.on_change = fail
    following = asyncio.create_task(b.follow(0.01))
    await a.update("x", pinned)
    await until(lambda: "a fault about x" in caplog.text)
    seen: list[str] = []
    b.on_change = lambda name, before, after: seen.append(name)
    await a.update("y", pinned)
    await until(lambda: seen == ["y"])
    following.cancel()


async def test_an_order_that_changes_nothing_or_fails_writes_nothing(tmp_path: Path) -> None:
    registry = make(tmp_path)
    await registry.update("x", pinned)
    written = (registry.folder / "names.json").stat().st_mtime_ns

    def refuse(before: Entry, now: int) -> Entry:
        raise ValidationFailed("no")

    with pytest.raises(ValidationFailed, match="no"):
        await registry.update("x", refuse)
    assert await registry.update("x", lambda before, now: before) == registry.entry("x")
    assert (registry.folder / "names.json").stat().st_mtime_ns == written and registry.view.generation == 1


async def test_a_damaged_file_changes_nothing_until_it_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = make(tmp_path)
    await registry.update("x", pinned)
    file = registry.folder / "names.json"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    following = asyncio.create_task(registry.follow(0.01))
    await until(lambda: "what it said before holds" in caplog.text)
    assert registry.entry("x").pinned
    with pytest.raises(SourceUnavailable, match="nothing was changed"):
        await registry.update("y", pinned)
    with pytest.raises(ValueError, match=r"names.json is not a registry of this version"):
        make(tmp_path)
    file.write_bytes(whole)
    await registry.update("y", pinned)
    assert set(registry.view.names) == {"x", "y"}
    following.cancel()


async def test_a_file_that_was_put_back_does_not_turn_time_back(tmp_path: Path) -> None:
    registry = make(tmp_path)
    for name in ("x", "y", "z"):
        await registry.update(name, pinned)
    (registry.folder / "names.json").unlink()
    following = asyncio.create_task(registry.follow(0.01))
    await asyncio.sleep(0.05)
    assert set(registry.view.names) == {"x", "y", "z"}  # a missing file says nothing
    await registry.update("w", pinned)
    assert registry.view.generation == 4 and set(registry.view.names) == {"w"}  # the file is the truth, and its number grows on
    following.cancel()


def test_two_writers_at_a_time_lose_nothing(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import msgspec\nfrom pathlib import Path\nfrom server.api.registry import Entry, Names\n"
        "from server.api.shared_file import SharedFile\n"
        f"file = SharedFile(Path({str(tmp_path / 'names.json')!r}), Names())\n"
        "for n in range(20):\n"
        "    file.update(lambda now: Names(now.generation + 1, now.names | {f'{sys.argv[1]}-{n}': Entry(changed=1)}), 0)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(index)]) for index in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    names = SharedFile(tmp_path / "names.json", Names()).read()
    assert names.generation == 60 and len(names.names) == 60


async def test_a_lock_that_cannot_be_had_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = make(tmp_path)
    monkeypatch.setattr("server.api.shared_file._LOCK_WAIT_S", 0.05)
    with file_lock(registry.folder / "names.lock", 1.0) as held, pytest.raises(Unavailable, match="the registry is busy"):
        assert held
        await registry.update("x", pinned)


async def test_the_registry_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = make(tmp_path)
    monkeypatch.setattr("server.api.registry.MAX_NAMES", 1)
    await registry.update("w", lambda before, now: Entry(unloaded=now))
    await registry.update("x", pinned)  # an order that was carried out makes room
    with pytest.raises(ValidationFailed, match="holds 1 names"):
        await registry.update("y", pinned)
    await registry.update("x", lambda before, now: NOTHING)
    assert registry.view == Names(3, {})
    await registry.update("y", pinned)
    assert MAX_NAMES == 20_000 and set(registry.view.names) == {"y"}


def test_models_have_names_of_their_own(tmp_path: Path) -> None:
    assert make(tmp_path).folder != Registry(tmp_path, "other", "local").folder
    assert make(tmp_path).folder.parent == tmp_path and Registry(tmp_path, "..", "local").folder.parent == tmp_path


def test_published_weights_stay_for_an_hour_after_the_last_name(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapters/one")
    source = Sources(SourceOptions(adapters_dir=tmp_path / "adapters")).get("local")
    stored = Store(tmp_path / "store").materialize(source, source.snapshot("one"))
    weights = PublishedWeights(tmp_path / "registry")
    weights.keep(stored)
    folder = tmp_path / "registry/objects" / stored.hash
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert weights.prune(set) == 0
    hour_ago = time.time() - 3700
    os.utime(folder, (hour_ago, hour_ago))
    assert weights.prune(lambda: {stored.hash}) == 0 and folder.is_dir()
    assert weights.hold(stored.hash) and weights.prune(set) == 0  # held anew for another hour
    os.utime(folder, (hour_ago, hour_ago))

    def held_meanwhile() -> set[str]:
        assert PublishedWeights(tmp_path / "registry").hold(stored.hash)  # another server publishes it, after the names were read
        return set()

    assert weights.prune(held_meanwhile) == 0 and folder.is_dir()
    os.utime(folder, (hour_ago, hour_ago))
    assert weights.prune(set) == 1 and not folder.exists() and not weights.hold(stored.hash)
    with pytest.raises(SourceUnavailable, match="'one': its published weights cannot be read"):
        weights.snapshot(stored.hash, "one")
    wait_for(lambda: not list((tmp_path / "registry/staging").iterdir()))


class RemoteSources(Sources):
    """The local source as if it were far away: what it holds is copied, and asked for again only after a while."""

    def get(self, name: str) -> Source:
        source = super().get(name)
        source.snapshot = lambda *ids, **options: replace(type(source).snapshot(source, *ids, **options), folder=None)  # type: ignore[method-assign]
        return source


async def test_a_change_of_a_remote_name_is_not_held_up_by_what_is_remembered(tmp_path: Path, model_dir: Path) -> None:
    registry, weights = make(tmp_path / "registry"), PublishedWeights(tmp_path / "registry")
    raw, store = RemoteSources(SourceOptions(adapters_dir=tmp_path / "adapters")), Store(tmp_path / "store")
    hashes = [hash_adapter(write_adapter(tmp_path / "adapters" / name, seed=seed)) for seed, name in enumerate(("x", "other"))]
    await asyncio.sleep(SETTLE_S)  # ctime: the snapshots are remembered then
    resolver = AdapterResolver(
        NamedSources(raw, registry, weights), store, load_tokenizer(model_dir), Metrics(), recheck_s=3600, stamps=registry.stamps
    )
    x, base = AdapterSelection("local", "x"), layout(100)
    try:
        assert (await resolver.resolve(x, base)).ref.hash == hashes[0]
        shutil.rmtree(tmp_path / "adapters/x")
        assert (await resolver.resolve(x, base)).ref.hash == hashes[0]  # for an hour it is not asked for
        weights.keep(store.materialize(raw.get("local"), raw.get("local").snapshot("other")))
        version = Version(hash=hashes[1], number=1, source="local", adapter_id="other", size_bytes=1, published_at=0, rank=2)
        await registry.update("x", lambda before, now: Entry(changed=now, version=version))
        assert (await resolver.resolve(x, base)).ref.hash == hashes[1]
        await registry.update("x", lambda before, now: Entry(changed=now, deleted=True))
        with pytest.raises(AdapterNotFound):
            await resolver.resolve(x, base)
        await registry.update("x", lambda before, now: Entry(changed=now, version=version))
        assert (await resolver.resolve(x, base)).ref.hash == hashes[1]  # though it failed a moment ago
    finally:
        resolver.close()


async def test_weights_that_were_touched_are_read_again_by_the_name_as_it_is_kept(tmp_path: Path) -> None:
    """A tenant's name, which messages show without the tenant, never turns into the shared one of the same name."""
    registry, weights = make(tmp_path / "registry"), PublishedWeights(tmp_path / "registry")
    raw, store = Sources(SourceOptions(adapters_dir=tmp_path / "adapters")), Store(tmp_path / "store")
    for seed, name in enumerate(("sql", "acme\\sql")):
        write_adapter(tmp_path / f"adapters/{seed}", seed=seed)
        stored = store.materialize(raw.get("local"), raw.get("local").snapshot(str(seed)))
        weights.keep(stored)
        version = Version(hash=stored.hash, number=1, source="local", adapter_id=str(seed), size_bytes=1, published_at=0, rank=2)
        await registry.update(name, lambda before, now, version=version: Entry(changed=now, version=version))
    requests = NamedSources(raw, registry, weights).get("local")
    snapshot = requests.snapshot("acme\\sql")
    os.utime(tmp_path / "registry/objects" / stored.hash / "adapter_model.safetensors")  # as a restored backup: the same bytes
    assert snapshot.shown_id == "sql" and store.materialize(requests, snapshot).hash == stored.hash

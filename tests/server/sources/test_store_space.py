"""The store's packs, and what goes when it holds too much."""

import os
import time
from pathlib import Path

import pytest

from server.errors import AdapterRefused
from server.sources import Store
from tests.server.sources.toy_source import ToySource, assert_clean, names, run_threads, write


@pytest.fixture
def source() -> ToySource:
    return ToySource()


def test_packs_are_written_once(source: ToySource, tmp_path: Path) -> None:
    store, adapter_hash, num_written = Store(tmp_path), "a" * 64, 0

    def slowly(path: Path) -> None:
        nonlocal num_written
        num_written += 1
        path.write_bytes(b"half")
        time.sleep(0.2)
        assert not store.pack_path(adapter_hash, "base-bf16").exists()
        path.write_bytes(b"whole")

    paths = run_threads(8, lambda: store.publish_pack(adapter_hash, "base-bf16", slowly))
    assert set(paths) == {store.pack_path(adapter_hash, "base-bf16")} == {tmp_path / "packs" / f"{adapter_hash}-base-bf16.pack"}
    assert store.pack_path(adapter_hash, "base-bf16").read_bytes() == b"whole"
    assert num_written == 1
    store.publish_pack(adapter_hash, "other", write(b"x"))
    store.discard_packs(adapter_hash)
    assert names(tmp_path / "packs") == []
    assert_clean(tmp_path)


def test_packs_that_any_server_used_of_late_are_not_discarded(tmp_path: Path) -> None:
    """The servers on a shared folder know of each other's uses by the mark on the file alone."""
    store, other, adapter_hash = Store(tmp_path), Store(tmp_path), "a" * 64
    path, second = (store.publish_pack(adapter_hash, key, write(b"x")) for key in ("base", "other"))
    for one in (path, second):
        os.utime(one, (time.time() - 600, time.time() - 600))
    with other.pinned(adapter_hash):
        assert not other.discard_packs(adapter_hash, idle_s=60) and path.exists()
    other.publish_pack(adapter_hash, "base", write(b"x"))
    assert not store.discard_packs(adapter_hash, idle_s=60)
    assert path.exists() and not second.exists()
    os.utime(path, (time.time() - 600, time.time() - 600))
    assert store.discard_packs(adapter_hash, idle_s=60) and store.discard_packs(adapter_hash, idle_s=60)
    assert names(tmp_path / "packs") == []
    assert_clean(tmp_path)


def test_a_writers_refusal_passes_and_leaves_nothing(tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        path.write_bytes(b"half")
        raise AdapterRefused("rank 9 is not 8")

    with pytest.raises(AdapterRefused, match="rank 9"):
        Store(tmp_path).publish_pack("a" * 64, "base", refuse)
    assert_clean(tmp_path)
    assert names(tmp_path / "packs") == []


@pytest.mark.parametrize(
    ("adapter_hash", "key"), [("a" * 63, "x"), ("../" + "a" * 61, "x"), ("a" * 64, "../x"), ("a" * 64, ""), ("A" * 64, "x")]
)
def test_odd_pack_names_are_a_bug(tmp_path: Path, adapter_hash: str, key: str) -> None:
    with pytest.raises(ValueError, match="not a pack's name"):
        Store(tmp_path).pack_path(adapter_hash, key)


def fill(store: Store, source: ToySource, ids: str) -> dict[str, str]:
    """Bring adapters in one after the other; id -> hash."""
    hashes = {}
    for adapter_id in ids:
        hashes[adapter_id] = store.materialize(source, source.snapshot(adapter_id)).hash
        time.sleep(0.02)  # so that their times of use differ
    return hashes


def test_the_least_recently_used_goes(source: ToySource, tmp_path: Path) -> None:
    size_bytes = source.snapshot("a").size_bytes
    store = Store(tmp_path, max_bytes=3 * size_bytes, min_idle_s=0)
    hashes = fill(store, source, "abc")
    fill(store, source, "a")  # used again: now b is the oldest
    hashes |= fill(store, source, "d")
    assert names(tmp_path / "objects") == sorted(hashes[i] for i in "acd")
    assert source.num_fetches == 4
    fill(store, source, "b")
    assert source.num_fetches == 5
    assert names(tmp_path / "objects") == sorted(hashes[i] for i in "abd")
    assert_clean(tmp_path)


def test_packs_count_and_go_too(source: ToySource, tmp_path: Path) -> None:
    size_bytes = source.snapshot("a").size_bytes
    store = Store(tmp_path, max_bytes=4 * size_bytes, min_idle_s=0)
    hashes = fill(store, source, "a")
    store.publish_pack(hashes["a"], "base", write(b"x" * 2 * size_bytes))
    time.sleep(0.02)
    hashes |= fill(store, source, "abc")  # a, its pack of two, b: full; c takes the place of the pack
    assert names(tmp_path / "packs") == []
    assert names(tmp_path / "objects") == sorted(hashes.values())


def test_what_is_pinned_or_just_used_stays(source: ToySource, tmp_path: Path) -> None:
    size_bytes = source.snapshot("a").size_bytes
    store = Store(tmp_path / "pins", max_bytes=2 * size_bytes, min_idle_s=0)
    hashes = fill(store, source, "ab")
    with store.pinned(hashes["a"]):
        hashes |= fill(store, source, "c")
        assert names(tmp_path / "pins" / "objects") == sorted(hashes[i] for i in "ac")
    fill(store, source, "d")
    assert hashes["a"] not in names(tmp_path / "pins" / "objects")
    with pytest.raises(ValueError, match="unpin without a pin"):
        store.unpin(hashes["a"])
    young = Store(tmp_path / "young", max_bytes=2 * size_bytes, min_idle_s=60)
    fill(young, source, "abc")
    assert len(names(tmp_path / "young" / "objects")) == 3


def test_an_open_file_outlives_its_eviction(source: ToySource, tmp_path: Path) -> None:
    store = Store(tmp_path, max_bytes=source.snapshot("a").size_bytes, min_idle_s=0)
    stored = store.materialize(source, source.snapshot("a"))
    with (stored.path / "adapter_model.safetensors").open("rb") as file:
        fill(store, source, "b")
        assert not stored.path.exists()
        assert file.read() == source.content("a")["adapter_model.safetensors"]


def test_an_adapter_larger_than_the_store_is_refused(source: ToySource, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match="store-max-bytes"):
        Store(tmp_path, max_bytes=100).materialize(source, source.snapshot("a"))
    assert source.num_fetches == 0

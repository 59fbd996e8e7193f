"""The store's objects: what is fetched once, what is seen when, and what a full or damaged disk does."""

import errno
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from server.errors import SourceUnavailable
from server.sources import Progress, Snapshot, Store
from server.sources.content import hash_adapter
from tests.server.sources.toy_source import ToySource, assert_clean, names, run_threads


@pytest.fixture
def source() -> ToySource:
    return ToySource()


def test_a_known_version_is_not_fetched_again(source: ToySource, tmp_path: Path) -> None:
    first = Store(tmp_path).materialize(source, source.snapshot("sql"))
    again = Store(tmp_path).materialize(source, source.snapshot("sql"))  # also by another server on the same folder
    assert first == again
    assert source.num_fetches == 1
    assert first.path == tmp_path / "objects" / first.hash
    assert first.bytes == sum(path.stat().st_size for path in first.path.iterdir())
    assert hash_adapter(first.path) == first.hash
    assert_clean(tmp_path)


def test_equal_bytes_are_one_object(source: ToySource, tmp_path: Path) -> None:
    store = Store(tmp_path)
    one, two = store.materialize(source, source.snapshot("ab")), store.materialize(source, source.snapshot("ba"))
    assert source.num_fetches == 2
    assert one.hash == two.hash
    assert names(tmp_path / "objects") == [one.hash]


def test_many_threads_make_one_fetch(source: ToySource, tmp_path: Path) -> None:
    store = Store(tmp_path)
    source.midway = lambda into: time.sleep(0.2)
    found = run_threads(16, lambda: store.materialize(source, source.snapshot("sql")))
    assert len({stored.hash for stored in found}) == 1  # type: ignore[attr-defined]
    assert source.num_fetches == 1


def test_two_stores_on_one_folder_make_one_fetch(source: ToySource, tmp_path: Path) -> None:
    """Two stores share no memory, only the folder: as two servers do (test_store_processes.py has real ones)."""
    stores = [Store(tmp_path), Store(tmp_path)]
    source.midway = lambda into: time.sleep(0.2)
    found = run_threads(4, lambda: stores.pop().materialize(source, source.snapshot("sql")) if stores else None)
    assert len([stored for stored in found if stored]) == 2
    assert source.num_fetches == 1


def test_adapters_do_not_wait_for_each_other(source: ToySource, tmp_path: Path) -> None:
    store, meet = Store(tmp_path), threading.Barrier(3, timeout=10)
    source.midway = lambda into: meet.wait()  # passes only once three fetches are under way
    ids = ["a", "b", "c"]
    assert not [
        found for found in run_threads(3, lambda: store.materialize(source, source.snapshot(ids.pop()))) if isinstance(found, Exception)
    ]


def test_a_failed_fetch_fails_who_asked_and_nobody_later(source: ToySource, tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fail(into: Path) -> None:
        time.sleep(0.2)
        raise SourceUnavailable("gone")

    source.midway = fail
    found = run_threads(4, lambda: store.materialize(source, source.snapshot("sql")))
    assert [str(error) for error in found] == ["gone"] * 4
    assert source.num_fetches == 1
    assert_clean(tmp_path)
    assert names(tmp_path / "objects") == []
    source.midway = lambda into: None
    assert store.materialize(source, source.snapshot("sql"))


def test_one_callers_bad_token_does_not_fail_another(source: ToySource, tmp_path: Path) -> None:
    store = Store(tmp_path)

    class Strict(ToySource):
        def fetch(self, snapshot: Snapshot, into: Path, api_token: str | None = None, progress: Progress | None = None) -> None:
            time.sleep(0.1)
            if api_token != "good":
                raise SourceUnavailable("bad token")
            super().fetch(snapshot, into, api_token, progress)

    strict, tokens = Strict(), ["good", "bad"]
    found = run_threads(2, lambda: store.materialize(strict, strict.snapshot("sql"), api_token=tokens.pop()))
    assert sum(isinstance(one, SourceUnavailable) for one in found) <= 1  # none if the good one was first
    assert sum(not isinstance(one, Exception) for one in found) >= 1


def test_without_file_locks_it_is_still_right(source: ToySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    stores, meet = [Store(tmp_path), Store(tmp_path)], threading.Barrier(2, timeout=10)
    source.midway = lambda into: meet.wait()  # both fetch at once
    found = run_threads(2, lambda: stores.pop().materialize(source, source.snapshot("sql")))
    assert len({stored.hash for stored in found}) == 1  # type: ignore[attr-defined]
    assert source.num_fetches == 2
    assert names(tmp_path / "staging") == []
    assert names(tmp_path / "objects") == [found[0].hash]  # type: ignore[attr-defined]


def test_the_wait_for_a_lock_is_bounded(source: ToySource, tmp_path: Path) -> None:
    slow, fast = ToySource(), ToySource()
    entered, leave = threading.Event(), threading.Event()

    def hold(into: Path) -> None:
        entered.set()
        leave.wait(10)

    slow.midway = hold
    thread = threading.Thread(target=lambda: Store(tmp_path).materialize(slow, slow.snapshot("sql")))
    thread.start()
    assert entered.wait(10)
    stored = Store(tmp_path, lock_wait_s=0.2).materialize(fast, fast.snapshot("sql"))
    leave.set()
    thread.join()
    assert fast.num_fetches == slow.num_fetches == 1
    assert names(tmp_path / "objects") == [stored.hash]


@pytest.mark.parametrize("lost", ["short", "long", "missing", "extra", "folder"])
def test_an_incomplete_transfer_is_not_published(source: ToySource, tmp_path: Path, lost: str) -> None:
    class Lossy(ToySource):
        def fetch(self, snapshot: Snapshot, into: Path, api_token: str | None = None, progress: Progress | None = None) -> None:
            super().fetch(snapshot, into, api_token, progress)
            weights = into / "adapter_model.safetensors"
            match lost:
                case "short":
                    weights.write_bytes(weights.read_bytes()[:-1])
                case "long":
                    weights.write_bytes(weights.read_bytes() + b"x")
                case "missing":
                    weights.unlink()
                case "extra":
                    (into / "evil.py").write_bytes(b"")
                case "folder":
                    (into / ".cache").mkdir()

    lossy = Lossy()
    with pytest.raises(SourceUnavailable, match=r"adapter_model.safetensors arrived with|unexpected file"):
        Store(tmp_path).materialize(lossy, lossy.snapshot("sql"))
    assert_clean(tmp_path)
    assert names(tmp_path / "objects") == names(tmp_path / "index") == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_full_or_broken_disk(source: ToySource, tmp_path: Path, code: int) -> None:
    def fail(into: Path) -> None:
        raise OSError(code, "the system's words", str(into))

    store = Store(tmp_path)
    source.midway = fail
    with pytest.raises(SourceUnavailable) as error:
        store.materialize(source, source.snapshot("sql"))
    assert ("disk is full" in error.value.message) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert str(tmp_path) not in error.value.message
    assert_clean(tmp_path)
    source.midway = lambda into: None
    stored = store.materialize(source, source.snapshot("sql"))
    with pytest.raises(SourceUnavailable):
        store.publish_pack(stored.hash, "base", fail)
    assert_clean(tmp_path)
    assert names(tmp_path / "packs") == []


def test_a_damaged_object_is_found_and_fetched_again(source: ToySource, tmp_path: Path) -> None:
    store = Store(tmp_path)
    stored = store.materialize(source, source.snapshot("sql"))
    pack = store.publish_pack(stored.hash, "base", lambda path: path.write_bytes(b"pack"))
    assert store.verify(stored)
    assert pack.exists()
    weights = stored.path / "adapter_model.safetensors"
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])  # one bit
    assert not store.verify(stored)
    assert not pack.exists()
    again = store.materialize(source, source.snapshot("sql"))
    assert again.hash == stored.hash
    assert source.num_fetches == 2
    assert store.verify(again)


def test_a_damaged_index_is_as_none(source: ToySource, tmp_path: Path) -> None:
    store = Store(tmp_path)
    stored = store.materialize(source, source.snapshot("sql"))
    (entry,) = (tmp_path / "index").iterdir()
    for damage in (b"", b"{", b"[]", b'{"hash": "../../etc", "bytes": 1}', b'{"hash": 5, "bytes": 1}', b'{"bytes": 1}', b"\xff"):
        entry.write_bytes(damage)
        assert store.materialize(source, source.snapshot("sql")) == stored


def test_another_version_is_another_entry(source: ToySource, tmp_path: Path) -> None:
    store, snapshot = Store(tmp_path), source.snapshot("a")
    store.materialize(source, snapshot)
    for other in (replace(snapshot, version="v2"), replace(snapshot, source="toy2"), replace(snapshot, adapter_id="b")):
        store.materialize(source, other)
    assert source.num_fetches == 4
    assert len(names(tmp_path / "index")) == 4

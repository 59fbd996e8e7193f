"""What one user of the store or of a source may not do to another: hold up its pins, fail with its error, tell it a bucket's name."""

import threading
from pathlib import Path

import pytest

from server.errors import AdapterNotFound, SourceUnavailable
from server.sources import Snapshot, SourceChanged, Store
from server.sources import local as local_module
from server.sources.local import LocalSource
from server.sources.s3 import S3Source
from server.sources.store import StoredAdapter
from tests.server.sources.toy_source import ToySource, write
from tests.server.sources.worlds import BUCKET, LocalWorld, S3World, adapter_files


def test_pins_do_not_wait_for_a_count_or_a_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ToySource()
    store = Store(tmp_path, max_bytes=source.snapshot("a").size_bytes, min_idle_s=0)
    space, entered, opened = store._space, threading.Event(), threading.Event()

    def slow(real):
        def wait(*arguments):
            entered.set()
            assert opened.wait(10), "the pins waited"
            return real(*arguments)

        return wait

    for owner, name in ((space, "_count"), (store._staging, "take_away")):
        stored = store.materialize(source, source.snapshot("a"))
        entered.clear()
        opened.clear()
        space._counted_at = float("-inf")
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, slow(getattr(owner, name)))
            reserving = threading.Thread(target=space.reserve, args=(100,))
            reserving.start()
            assert entered.wait(5)

            def use() -> None:
                store.pin("b" * 64)
                space.add(1)
                store.unpin("b" * 64)

            using = threading.Thread(target=use)
            using.start()
            using.join(5)
            waited = using.is_alive()
            opened.set()
            reserving.join(10)
            using.join(10)
            assert not waited and not stored.path.exists()


def test_what_is_pinned_during_the_count_stays(tmp_path: Path) -> None:
    source = ToySource()
    store = Store(tmp_path, max_bytes=source.snapshot("a").size_bytes, min_idle_s=0)
    stored = store.materialize(source, source.snapshot("a"))
    real = store._space._count

    def count():
        entries = real()
        store.pin(stored.hash)
        return entries

    store._space._count = count  # type: ignore[method-assign]
    store.materialize(source, source.snapshot("b"))
    assert stored.path.exists()
    store.publish_pack(stored.hash, "base", write(b"x"))
    store.discard_packs(stored.hash)
    assert store.pack_path(stored.hash, "base").exists()  # pinned


def test_bytes_added_during_a_count_are_not_lost(tmp_path: Path) -> None:
    space = Store(tmp_path, max_bytes=1000)._space

    class Folder:
        def iterdir(self):
            space.add(7)
            return iter(())

    space._folders = (Folder(),)  # type: ignore[assignment]
    space._count()
    assert space._used_bytes == 7


def test_a_change_of_one_folder_is_not_the_error_of_its_twin(local: LocalWorld, tmp_path: Path) -> None:
    """Two ids with the same bytes share a pack; while it is written from one folder, that one is replaced."""
    for name in ("one", "two"):
        local.put(name, adapter_files())
    source, store = LocalSource(local.options()), Store(tmp_path / "store")
    one, two = (store.materialize(source, source.snapshot(f"team/{name}")) for name in ("one", "two"))
    assert one.hash == two.hash
    writing, opened = threading.Event(), threading.Event()
    results: dict[str, object] = {}

    def slowly(path: Path) -> None:
        writing.set()
        opened.wait(10)
        path.write_bytes(b"pack")

    def publish(name: str, stored: StoredAdapter) -> None:
        try:
            results[name] = store.publish_pack(stored.hash, "base", slowly, stored)
        except SourceChanged as error:
            results[name] = error

    first = threading.Thread(target=publish, args=("one", one))
    first.start()
    assert writing.wait(5)
    local.put("one", adapter_files(seed=1))
    second = threading.Thread(target=publish, args=("two", two))
    second.start()
    second.join(0.2)  # it waits for the first one's flight or lock
    opened.set()
    first.join(10)
    second.join(10)
    assert isinstance(results["one"], SourceChanged) and "team/one" in str(results["one"])
    assert results["two"] == store.pack_path(two.hash, "base")


def test_a_write_between_version_and_check_does_not_look_settled(local: LocalWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    local.put("sql", adapter_files())
    real, written = local_module.stat_signature, threading.Event()

    def racing(folder: Path, names):
        written.set()
        return real(folder, names)

    monkeypatch.setattr(local_module, "stat_signature", racing)
    monkeypatch.setattr(local_module, "is_settled", lambda folder, names: not written.is_set())
    assert not LocalSource(local.options()).snapshot("team/sql").settled


def test_messages_name_no_bucket_that_the_caller_did_not(s3: S3World, tmp_path: Path) -> None:
    s3.put("sql", adapter_files())
    source = S3Source(s3.options())
    snapshot = source.snapshot("team/sql")
    assert BUCKET in snapshot.adapter_id and BUCKET not in SourceChanged(snapshot).message
    s3.put("sql", adapter_files(seed=1))
    (tmp_path / "into").mkdir()
    with pytest.raises(SourceChanged, match="'team/sql' changed"):
        source.fetch(snapshot, tmp_path / "into")
    stored = Store(tmp_path / "store").materialize(source, snapshot)  # it takes a new snapshot under the same words
    assert stored.snapshot.shown_id == "team/sql" and stored.snapshot.adapter_id == snapshot.adapter_id
    with pytest.raises(SourceUnavailable) as listing:
        S3Source(s3.options(model_bucket="bucket-of-nobody")).adapter_ids(5)
    assert "bucket-of-nobody" not in listing.value.message
    with pytest.raises(AdapterNotFound, match="'team/none'"):
        source.snapshot("team/none")


def test_callers_with_other_words_have_other_errors(tmp_path: Path) -> None:
    """Two names for one place: the flight of one does not answer the other."""
    source, errors = ToySource(), {}
    entered, opened = threading.Event(), threading.Event()

    def midway(into: Path) -> None:
        entered.set()
        opened.wait(10)

    source.midway = midway
    source.fetch, real = lambda snapshot, into, *rest: (real(snapshot, into), (_ for _ in ()).throw(SourceChanged(snapshot))), source.fetch
    source.snapshot, plain = lambda adapter_id, **options: named(plain("a"), adapter_id), source.snapshot
    store = Store(tmp_path)

    def named(snapshot: Snapshot, given_id: str) -> Snapshot:
        return Snapshot(snapshot.source, snapshot.adapter_id, snapshot.version, snapshot.files, given_id=given_id)

    def ask(given_id: str) -> None:
        try:
            store.materialize(source, source.snapshot(given_id))
        except SourceChanged as error:
            errors[given_id] = error.message

    threads = [threading.Thread(target=ask, args=(given_id,)) for given_id in ("x", "s3://bucket/x")]
    for thread in threads:
        thread.start()
    assert entered.wait(5)
    opened.set()
    for thread in threads:
        thread.join(10)
    assert "'x'" in errors["x"] and "bucket" not in errors["x"] and "'s3://bucket/x'" in errors["s3://bucket/x"]

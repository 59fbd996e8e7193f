"""The local source: containment, reading in place, files that change under a reader."""

import os
from pathlib import Path

import pytest

from server.errors import AdapterNotFound, AdapterRefused, SourceUnavailable
from server.sources import SourceChanged, SourceOptions, Store
from server.sources.content import hash_adapter
from server.sources.local import LocalSource
from tests.server.sources.worlds import LocalWorld, adapter_files, settle


@pytest.fixture(autouse=True)
def quick_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far above this machine's clock tick, and quicker to wait for."""
    monkeypatch.setattr("server.sources.content.SETTLE_S", 0.2)


@pytest.fixture
def source(local: LocalWorld) -> LocalSource:
    local.put("sql", adapter_files())
    return LocalSource(local.options())


def test_a_link_inside_is_followed(source: LocalSource, local: LocalWorld) -> None:
    (local.root / "latest").symlink_to(local.root / "team" / "sql")
    assert source.snapshot("latest").version == source.snapshot("team/sql").version


def test_a_folder_link_out_is_refused(source: LocalSource, local: LocalWorld, tmp_path: Path) -> None:
    outside = LocalWorld(tmp_path / "outside")
    outside.put("x", adapter_files())
    (local.root / "evil").symlink_to(outside.root / "team")
    with pytest.raises(AdapterRefused, match="leaves the adapters' folder through a symbolic link"):
        source.snapshot("evil/x")


def test_a_file_link_out_is_refused(source: LocalSource, local: LocalWorld, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    weights = local.root / "team" / "sql" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(secret)
    with pytest.raises(AdapterRefused, match="symbolic link"):
        source.snapshot("team/sql")


def test_a_sibling_whose_name_begins_like_the_root_is_outside(source: LocalSource, local: LocalWorld, tmp_path: Path) -> None:
    LocalWorld(tmp_path / "adapters-private").put("x", adapter_files())
    (local.root / "near").symlink_to(tmp_path / "adapters-private")
    with pytest.raises(AdapterRefused):
        source.snapshot("near/team/x")


def test_links_in_a_circle_and_to_nowhere(source: LocalSource, local: LocalWorld) -> None:
    (local.root / "loop").symlink_to("loop")
    (local.root / "nowhere").symlink_to("missing")
    for adapter_id in ("loop", "nowhere", "team/sql/adapter_config.json"):
        with pytest.raises(AdapterNotFound):
            source.snapshot(adapter_id)
    (local.root / "team" / "sql" / "loop").symlink_to("loop")  # one bad link beside the files harms nobody
    source.snapshot("team/sql")


def test_a_pipe_is_no_file(source: LocalSource, local: LocalWorld) -> None:
    weights = local.root / "team" / "sql" / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)  # reading it would block for ever
    with pytest.raises(AdapterRefused, match="has no weights"):
        source.snapshot("team/sql")


def test_unmounted_root_is_unavailable_not_missing(tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable):
        LocalSource(SourceOptions(adapters_dir=tmp_path / "not-mounted")).snapshot("team/sql")


def test_read_in_place_unless_foreign_weights_lie_beside(source: LocalSource, local: LocalWorld, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    here = store.materialize(source, source.snapshot("team/sql"))
    assert here.path == local.root / "team" / "sql"
    (here.path / "optimizer.safetensors").write_bytes(b"states")
    copied = store.materialize(source, source.snapshot("team/sql"))
    assert copied.path.parent == tmp_path / "store" / "objects"
    assert {path.name for path in copied.path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert copied.hash == here.hash == hash_adapter(copied.path)


@pytest.mark.parametrize("how", ["overwrite", "replace", "keep mtime"])
def test_a_write_gives_another_version_and_hash(source: LocalSource, local: LocalWorld, tmp_path: Path, how: str) -> None:
    store = Store(tmp_path / "store")
    first = store.materialize(source, source.snapshot("team/sql"))
    weights = first.path / "adapter_model.safetensors"
    old = weights.stat()
    settle(first.path)  # otherwise the write may fall into the same tick of the clock
    new = bytes(reversed(weights.read_bytes()))
    if how == "replace":
        (tmp_path / "new").write_bytes(new)
        os.replace(tmp_path / "new", weights)
    else:
        weights.write_bytes(new)
    if how == "keep mtime":
        os.utime(weights, ns=(old.st_atime_ns, old.st_mtime_ns))
    second = store.materialize(source, source.snapshot("team/sql"))
    assert second.snapshot.version != first.snapshot.version
    assert second.hash != first.hash
    assert store.verify(second)
    assert not store.verify(first)


def test_two_writes_in_one_tick_are_not_confused(
    source: LocalSource, local: LocalWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that stands still is the worst case: no signature can tell the writes apart, so a fresh folder's hash is not kept."""
    monkeypatch.setattr("server.sources.local.stat_signature", lambda folder, names: "same")
    monkeypatch.setattr("server.sources.store.stat_signature", lambda folder, names: "same")
    store = Store(tmp_path / "store")
    first = store.materialize(source, source.snapshot("team/sql"))
    local.put("sql", adapter_files(9))
    second = store.materialize(source, source.snapshot("team/sql"))
    assert second.hash != first.hash
    with pytest.raises(SourceChanged):  # nor is a pack published for a hash that the folder no longer has
        store.publish_pack(first.hash, "key", lambda path: path.write_bytes(b"pack"), of=first)
    settle(local.root / "team" / "sql")
    third = store.materialize(source, source.snapshot("team/sql"))
    assert third.hash == second.hash
    assert len(list((tmp_path / "store" / "index").iterdir())) == 1  # rested: remembered now
    local.put("sql", adapter_files(10))  # bytes that change behind the signature's back (a bad disk): `verify` makes it look again
    settle(local.root / "team" / "sql")
    stale = store.materialize(source, source.snapshot("team/sql"))
    assert stale.hash == third.hash
    assert not store.verify(stale)
    assert store.verify(store.materialize(source, source.snapshot("team/sql")))


def test_a_writer_during_every_attempt_is_noticed(
    source: LocalSource, local: LocalWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = local.root / "team" / "sql" / "adapter_model.safetensors"
    num_hashed = 0

    def hash_while_written(folder: Path, names: tuple[str, ...]) -> str:
        nonlocal num_hashed
        num_hashed += 1
        digest = hash_adapter(folder, names)
        weights.write_bytes(weights.read_bytes() + b"x")
        return digest

    monkeypatch.setattr("server.sources.store.hash_adapter", hash_while_written)
    with pytest.raises(SourceUnavailable, match="changed in source 'local' while it was read; try again"):
        Store(tmp_path / "store").materialize(source, source.snapshot("team/sql"))
    assert num_hashed == 3


def test_names_and_content_make_the_hash(tmp_path: Path) -> None:
    def hashed(files: dict[str, bytes]) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return hash_adapter(folder)

    base = adapter_files()
    same = {**base, "adapter_config.json": b'{\n "seed": "000000", "r": 8,\n "peft_type": "LORA"}', "README.md": b"not part of it"}
    assert hashed(base) == hashed(same)
    others = [
        {**base, "adapter_config.json": b'{"seed": "000000", "r": 9, "peft_type": "LORA"}'},
        {**base, "adapter_model.safetensors": base["adapter_model.safetensors"] + b"x"},
        {**base, "tokenizer.json": b"{}"},
        {**base, "tokenizer_config.json": b"{}"},
        {"adapter_config.json": base["adapter_config.json"], "model.safetensors": base["adapter_model.safetensors"]},
    ]
    assert len({hashed(base), *map(hashed, others)}) == 1 + len(others)


@pytest.mark.parametrize("config", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"1" * 5000])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, config: bytes) -> None:
    for name, data in {**adapter_files(), "adapter_config.json": config}.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(AdapterRefused, match=r"adapter_config\.json (is not JSON|must be a JSON object)"):
        hash_adapter(tmp_path)

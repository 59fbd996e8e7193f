"""What every registered source must do, run through each of them against a real place."""

import threading
from pathlib import Path

import pytest

from server.errors import AdapterNotFound, AdapterRefused, ServerError, ValidationFailed
from server.sources import FACTORIES, Source, SourceChanged, SourceOptions, Sources, Store
from tests.server.sources.worlds import World, adapter_files


def open_source(world: tuple[str, World], **changes: object) -> Source:
    return Sources(world[1].options(**changes)).get(world[0])


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fetch_brings_exactly_what_an_adapter_needs(world: tuple[str, World], tmp_path: Path) -> None:
    wanted = adapter_files(extra={"tokenizer.json": b"{}", "chat_template.jinja": b"x"})
    world[1].put("sql", {**wanted, "README.md": b"no", "optimizer.pt": b"no", "training_args.bin": b"no", "optimizer.safetensors": b"no"})
    source = open_source(world)
    snapshot = source.snapshot(world[1].adapter_id("sql"))
    assert snapshot.source == source.name == world[0]
    assert {file.name: file.size_bytes for file in snapshot.files} == {name: len(data) for name, data in wanted.items()}
    into = tmp_path / "into"
    into.mkdir()
    told: list[tuple[int, int]] = []
    source.fetch(snapshot, into, progress=lambda done, total: told.append((done, total)))
    assert read(into) == wanted
    assert told[-1] == (snapshot.size_bytes, snapshot.size_bytes)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_what_is_listed_can_be_asked_for(world: tuple[str, World]) -> None:
    source = open_source(world)
    for name in ("sql", "team/json", "team/pirate"):
        world[1].put(name, adapter_files())
    listed = source.adapter_ids(10)
    if world[0] == "hub":
        assert listed == []
        return
    assert len(listed) == 3 and listed == sorted(listed)
    wanted = {source.snapshot(world[1].adapter_id(name)).adapter_id for name in ("sql", "team/json", "team/pirate")}
    assert {source.snapshot(adapter_id).adapter_id for adapter_id in listed} == wanted
    assert len(source.adapter_ids(2)) == 2


def test_a_place_is_said_without_asking_and_is_below_its_folder(world: tuple[str, World]) -> None:
    """What a tenant may reach is said as beginnings of places: one place an id, whether there is anything or not."""
    source = open_source(world)
    for name in ("nothing", "sql"):
        adapter_id = world[1].adapter_id(name)
        place = source.place(adapter_id)
        assert (
            place.endswith(adapter_id.removeprefix("s3://").rsplit("/", 1)[-1]) and not place.startswith(("/", "s3:")) and ".." not in place
        )
        assert source.place(adapter_id) == place and source.place(source.spelling(adapter_id)) == place
        assert source.spelling(source.spelling(adapter_id)) == source.spelling(adapter_id)
    for wrong in ("../team/sql", "team/../other", "/etc", "team//sql", "team\\sql", "", "team/.hidden"):
        with pytest.raises(ValidationFailed):
            source.place(wrong)
        with pytest.raises(ValidationFailed):
            source.spelling(wrong)


def test_version_names_the_bytes(world: tuple[str, World]) -> None:
    source, adapter_id = open_source(world), world[1].adapter_id("sql")
    world[1].put("sql", adapter_files(1))
    first = source.snapshot(adapter_id)
    assert source.snapshot(adapter_id).version == first.version
    world[1].put("sql", adapter_files(2))  # same names, same sizes
    assert source.snapshot(adapter_id).version != first.version


def test_shards_are_taken_and_foreign_weights_are_not(world: tuple[str, World]) -> None:
    files = adapter_files()
    weights = files.pop("adapter_model.safetensors")
    shards = {"adapter_model-00001-of-00002.safetensors": weights, "adapter_model-00002-of-00002.safetensors": weights}
    world[1].put("sharded", {**files, **shards, "training_args.safetensors": b"no", "optimizer.safetensors": b"no"})
    snapshot = open_source(world).snapshot(world[1].adapter_id("sharded"))
    assert set(snapshot.names) == {"adapter_config.json", *shards}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.pop("adapter_config.json"), "has no adapter_config.json"),
        (lambda files: files.pop("adapter_model.safetensors"), "has no weights (adapter_model.safetensors)"),
        (
            lambda files: files.update({"adapter_model.bin": files.pop("adapter_model.safetensors")}),
            "has its weights only as a pickle ('adapter_model.bin')",
        ),
        (lambda files: files.update({"adapter_config.json": b" " * (1 << 20) + b"{}"}), "adapter_config.json is larger than"),
    ],
)
def test_refused_by_name(world: tuple[str, World], change: object, message: str) -> None:
    files = adapter_files()
    change(files)  # type: ignore[operator]
    world[1].put("bad", files)
    with pytest.raises(AdapterRefused) as error:
        open_source(world).snapshot(world[1].adapter_id("bad"))
    assert message in error.value.message


def test_too_large_is_refused_before_a_download(world: tuple[str, World]) -> None:
    world[1].put("large", adapter_files(size_bytes=5000))
    with pytest.raises(AdapterRefused, match=r"at most 4999 are allowed \(max-adapter-bytes\)"):
        open_source(world, max_adapter_bytes=4999).snapshot(world[1].adapter_id("large"))


def test_missing(world: tuple[str, World]) -> None:
    world[1].put("sql-old", adapter_files())
    with pytest.raises(AdapterNotFound, match=f"Adapter 'team/sql' was not found in source '{world[0]}'"):
        open_source(world).snapshot(world[1].adapter_id("sql"))  # though a longer name begins with it


NO_PLAIN_PATHS = [
    "", "/", "/etc/passwd", "..", "team/../../etc", "team/./sql", "team//sql", "team/.git", "team\\sql", "team/s\0ql", "team/s\nql",
    "team/\ud800", "team/\uff0e\uff0e/sql", "team/\u2025/sql", "team/sql\u200b", "team/\u202esql", "team/\u2028sql", "team/ sql",
    "team/" + "x" * 256, "x/" * 600 + "x", "~\x7f/sql",
]  # fmt: skip


def test_ids_that_are_no_plain_path_are_refused(world: tuple[str, World]) -> None:
    source = open_source(world)
    for adapter_id in NO_PLAIN_PATHS:
        with pytest.raises(ValidationFailed) as error:
            source.snapshot(adapter_id)
        assert error.value.param == "adapter_id"
        error.value.message.encode()  # no lone surrogate, so that it can be sent


def test_errors_name_no_path_and_no_token(world: tuple[str, World], tmp_path: Path) -> None:
    for adapter_id in ("team/missing", "../x", "nobody/x", "s3://other-bucket/x/y"):
        with pytest.raises(ServerError) as error:
            open_source(world).snapshot(adapter_id, api_token="hf_secret")
        assert str(tmp_path) not in error.value.message
        assert "hf_secret" not in repr(error.value) + str(error.value.__cause__)


def test_replaced_while_it_is_fetched(world: tuple[str, World], tmp_path: Path) -> None:
    """Either the snapshot's very bytes arrive (the hub keeps commits) or the change is noticed; never the new bytes."""
    source = open_source(world)
    world[1].put("sql", {**adapter_files(1), "optimizer.safetensors": b""})  # the foreign file makes `local` copy
    snapshot = source.snapshot(world[1].adapter_id("sql"))
    world[1].put("sql", {**adapter_files(2), "optimizer.safetensors": b""})
    into = tmp_path / "into"
    into.mkdir()
    try:
        source.fetch(snapshot, into)
    except SourceChanged:
        return
    assert read(into) == adapter_files(1)


def test_the_store_gets_the_newest_when_it_changes_meanwhile(world: tuple[str, World], tmp_path: Path) -> None:
    source = open_source(world)
    world[1].put("sql", adapter_files(1))
    stale = source.snapshot(world[1].adapter_id("sql"))
    world[1].put("sql", adapter_files(2))
    stored = Store(tmp_path / "store").materialize(source, stale)
    content = {name: (stored.path / name).read_bytes() for name in stored.snapshot.names}
    assert content in (adapter_files(1), adapter_files(2))
    assert content == (adapter_files(2) if stored.snapshot.version != stale.version else adapter_files(1))


def test_many_threads_at_once(world: tuple[str, World], tmp_path: Path) -> None:
    source, store = open_source(world), Store(tmp_path / "store")
    world[1].put("sql", adapter_files(3))
    found: list[str] = []

    def ask() -> None:
        snapshot = source.snapshot(world[1].adapter_id("sql"))
        found.append(store.materialize(source, snapshot).hash)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_revisions_are_used_or_refused(world: tuple[str, World]) -> None:
    world[1].put("sql", adapter_files())
    source, adapter_id = open_source(world), world[1].adapter_id("sql")
    if world[0] == "hub":
        assert source.snapshot(adapter_id, revision="main").version == source.snapshot(adapter_id).version
        return
    with pytest.raises(ValidationFailed) as error:
        source.snapshot(adapter_id, revision="main")
    assert error.value.param == "revision"


def test_the_registry_knows_names() -> None:
    sources = Sources(SourceOptions())
    for name in FACTORIES:
        with pytest.raises(ValidationFailed, match=f"Source '{name}' is off on this server"):
            sources.get(name.upper())
    with pytest.raises(ValidationFailed, match=r"Invalid source 'ftp'; allowed are 'hub', 'local', 's3'"):
        sources.get("ftp")
    with pytest.raises(ValidationFailed, match=r"Source 'pbase' .* is not served here; allowed are 'hub', 'local', 's3'"):
        sources.get("pbase")

"""What resolving one adapter may not do to others: hold them up, name them, poison or fill what they share, go unanswered."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from server.api import adapter_tokenizers
from server.api.adapter_lists import AdapterLists
from server.api.adapters import AdapterResolver
from server.api.mending import PackMender
from server.api.source_threads import SourceThreads
from server.api.text.tokenizer import Tokenizer, load_tokenizer
from server.errors import AdapterNotFound, AdapterRefused, SourceUnavailable
from server.metrics import Metrics
from server.sources import SourceChanged, SourceOptions, Sources, Store
from server.sources import local as local_module
from server.types import AdapterRef
from tests.server.api.fake_engine import layout
from tests.server.api.test_adapters import pick, write_adapter


class Gate(Sources):
    """The real sources, with a snapshot that waits for `opened` where the id begins with `cold`; `change` is applied to all others."""

    def __init__(self, root: Path) -> None:
        super().__init__(SourceOptions(adapters_dir=root))
        self.opened, self.asked = threading.Event(), []
        self.change: Callable = lambda snapshot: snapshot

    def get(self, name: str):
        self._inner = super().get(name)
        return self

    def snapshot(self, adapter_id: str, **options):
        self.asked.append(adapter_id)
        if adapter_id.startswith("cold"):
            self.opened.wait(20)
        return self.change(self._inner.snapshot(adapter_id, **options))

    def fetch(self, snapshot, *arguments, **options):
        return self._inner.fetch(replace(snapshot, adapter_id=snapshot.shown_id), *arguments, **options)


@pytest.fixture
def base(model_dir: Path) -> Tokenizer:
    return load_tokenizer(model_dir)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    monkeypatch.setattr(local_module, "is_settled", lambda *arguments: True)  # so that all is remembered at once
    (tmp_path / "adapters").mkdir()
    gate = Gate(tmp_path / "adapters")
    yield gate
    gate.opened.set()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def resolver(sources: Gate, store: Store, base: Tokenizer) -> Iterator[AdapterResolver]:
    resolver = AdapterResolver(sources, store, base, Metrics())
    yield resolver
    sources.opened.set()
    resolver.close()


def far(snapshot):
    """As a source answers whose files must be fetched, under an id that callers need not know."""
    return replace(snapshot, adapter_id=f"s3://private-bucket/prefix/{snapshot.adapter_id}", folder=None, given_id=snapshot.adapter_id)


def write_template(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text)


@pytest.mark.parametrize("change", [lambda snapshot: snapshot, far], ids=["in place", "fetched"])
async def test_a_known_adapter_waits_for_no_cold_one(tmp_path: Path, resolver: AdapterResolver, sources: Gate, change: Callable) -> None:
    sources.change = change
    write_adapter(tmp_path / "adapters/warm")
    before = await resolver.resolve(pick("warm"), layout(100))
    cold = [asyncio.create_task(resolver.resolve(pick(f"cold{n}"), layout(100))) for n in range(40)]
    await asyncio.sleep(0.05)
    async with asyncio.timeout(10):
        assert (await resolver.resolve(pick("warm"), layout(100))).ref == before.ref
    assert not any(task.done() for task in cold)
    sources.opened.set()
    assert all(isinstance(error, AdapterNotFound) for error in await asyncio.gather(*cold, return_exceptions=True))


@pytest.mark.parametrize("change", [lambda snapshot: snapshot, far], ids=["in place", "fetched"])
async def test_a_known_adapter_takes_one_turn_of_a_thread_and_is_made_anew_if_its_pack_is_gone(
    tmp_path: Path, resolver: AdapterResolver, sources: Gate, monkeypatch: pytest.MonkeyPatch, change: Callable
) -> None:
    sources.change = change
    write_adapter(tmp_path / "adapters/one")
    ref = (await resolver.resolve(pick("one"), layout(100))).ref
    work: list[str] = []
    submit = SourceThreads.submit

    def count(self, source: str, kind, run):
        work.append(kind)
        return submit(self, source, kind, run)

    monkeypatch.setattr(SourceThreads, "submit", count)
    assert (await resolver.resolve(pick("one"), layout(100))).ref == ref and work == ["known"]
    Path(ref.path).unlink()
    assert (await resolver.resolve(pick("one"), layout(100))).tier == "source" and Path(ref.path).exists()
    assert work == ["known", "known", "fetch", "fetch"]


async def test_who_joins_a_flight_after_the_adapter_was_replaced_gets_the_new_one(
    tmp_path: Path, resolver: AdapterResolver, sources: Gate
) -> None:
    write_adapter(tmp_path / "adapters/one", seed=1)
    before = (await resolver.resolve(pick("one"), layout(100))).ref
    looked, go_on = threading.Event(), threading.Event()

    def hold(snapshot):
        looked.set()
        go_on.wait(20)
        return snapshot

    sources.change = hold
    early = asyncio.create_task(resolver.resolve(pick("one"), layout(100)))
    assert await asyncio.to_thread(looked.wait, 20)  # it has seen the old files
    write_adapter(tmp_path / "adapters/one", seed=2)
    late = asyncio.create_task(resolver.resolve(pick("one"), layout(100)))
    await asyncio.sleep(0)
    go_on.set()
    assert (await early).ref == before != (await late).ref


async def test_what_nobody_waits_for_any_more_is_not_begun(tmp_path: Path, resolver: AdapterResolver, sources: Gate) -> None:
    write_adapter(tmp_path / "adapters/new")
    cold = [asyncio.create_task(resolver.resolve(pick(f"cold{n}"), layout(100))) for n in range(40)]
    while len(sources.asked) < 8:
        await asyncio.sleep(0.01)
    for task in cold[8:]:
        task.cancel()
    await asyncio.wait(cold[8:])
    sources.opened.set()
    await asyncio.wait(cold)
    assert (await resolver.resolve(pick("new"), layout(100))).ref.name == "new"
    assert len(sources.asked) == 9 and resolver._flights == {}


async def test_one_that_is_asked_for_again_after_all_left_is_resolved(tmp_path: Path, resolver: AdapterResolver, sources: Gate) -> None:
    write_adapter(tmp_path / "adapters/cold")
    blockers = [asyncio.create_task(resolver.resolve(pick(f"cold{n}"), layout(100))) for n in range(8)]
    while len(sources.asked) < 8:
        await asyncio.sleep(0.01)
    first = asyncio.create_task(resolver.resolve(pick("cold"), layout(100)))
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.wait({first})
    second = asyncio.create_task(resolver.resolve(pick("cold"), layout(100)))
    await asyncio.sleep(0.01)
    sources.opened.set()
    assert (await second).ref.name == "cold"
    await asyncio.wait(blockers)


async def test_a_tokenizer_replaced_while_it_is_read_is_not_kept(
    tmp_path: Path, resolver: AdapterResolver, base: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n, name in enumerate(("one", "two", "three")):
        write_template(write_adapter(tmp_path / "adapters" / name, seed=n), "right")
    real = adapter_tokenizers.load_adapter_tokenizer

    def always(folder: Path, *arguments, **options):
        write_template(folder, f"wrong {time.monotonic_ns()}")
        return real(folder, *arguments, **options)

    def once(folder: Path, *arguments, **options):
        monkeypatch.setattr(adapter_tokenizers, "load_adapter_tokenizer", real)
        write_template(folder, "newer")
        return real(folder, *arguments, **options)

    monkeypatch.setattr(adapter_tokenizers, "load_adapter_tokenizer", always)
    with pytest.raises(SourceChanged, match="'one' changed"):
        await resolver.resolve(pick("one"), layout(base.num_ids))
    monkeypatch.setattr(adapter_tokenizers, "load_adapter_tokenizer", once)
    assert (await resolver.resolve(pick("two"), layout(base.num_ids))).tokenizer.chat_template == "newer"
    assert (await resolver.resolve(pick("three"), layout(base.num_ids))).tokenizer.chat_template == "right"


async def test_tokenizer_files_are_bounded(tmp_path: Path, resolver: AdapterResolver, monkeypatch: pytest.MonkeyPatch) -> None:
    (write_adapter(tmp_path / "adapters/one") / "tokenizer.json").write_text("{}" + " " * 100)
    monkeypatch.setattr(adapter_tokenizers, "_MAX_FILE_BYTES", 100)
    with pytest.raises(AdapterRefused, match="Adapter 'one': the adapter's tokenizer.json has more than 100 bytes"):
        await resolver.resolve(pick("one"), layout(100))


async def test_tokenizers_are_held_by_their_cache_alone(
    tmp_path: Path, resolver: AdapterResolver, base: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_tokenizers, "_MAX_TOKENIZERS", 2)
    for n in range(3):
        folder = write_adapter(tmp_path / f"adapters/a{n}", seed=n)
        write_template(folder, f"template {n}")
    first = [await resolver.resolve(pick(f"a{n}"), layout(base.num_ids)) for n in range(3)]
    assert len(resolver._tokenizers._loaded) == 2
    again = [await resolver.resolve(pick(f"a{n}"), layout(base.num_ids)) for n in (2, 0)]
    assert again[0].tokenizer is first[2].tokenizer
    assert again[1].tokenizer is not first[0].tokenizer and again[1].tokenizer.chat_template == "template 0"


@pytest.mark.parametrize("damage", [lambda raw: raw[:-8], lambda raw: raw[:-8] + bytes(8)], ids=["cut off", "other numbers"])
async def test_a_damaged_copy_is_fetched_again(tmp_path: Path, resolver: AdapterResolver, sources: Gate, damage: Callable) -> None:
    sources.change = far
    write_adapter(tmp_path / "adapters/one")
    found = await resolver.resolve(pick("one"), layout(100))
    weights = tmp_path / "store/objects" / found.ref.hash / "adapter_model.safetensors"
    whole, pack = weights.read_bytes(), Path(found.ref.path).read_bytes()
    weights.write_bytes(damage(whole))
    Path(found.ref.path).unlink()
    assert (await resolver.resolve(pick("one"), layout(100))).ref == found.ref
    assert Path(found.ref.path).read_bytes() == pack and weights.read_bytes() == whole


async def test_only_the_callers_own_id_is_named(tmp_path: Path, resolver: AdapterResolver, sources: Gate) -> None:
    sources.change = far
    write_adapter(tmp_path / "adapters/bad", target_modules=["nothing_of_that_name"])
    write_adapter(tmp_path / "adapters/good")
    assert (await resolver.resolve(pick("good"), layout(100))).ref.name == "good"
    with pytest.raises(AdapterRefused, match="Adapter 'bad'") as refusal:
        await resolver.resolve(pick("bad"), layout(100))
    sources.fetch = lambda snapshot, *rest, **options: (_ for _ in ()).throw(SourceChanged(snapshot))  # type: ignore[method-assign]
    write_adapter(tmp_path / "adapters/moving", seed=3)
    with pytest.raises(SourceChanged, match="'moving'") as changed:
        await resolver.resolve(pick("moving"), layout(100))
    assert "private-bucket" not in refusal.value.message + changed.value.message


class Listed:
    """A source that is asked for its ids alone."""

    def __init__(self) -> None:
        self.num_asked, self.opened, self.error = 0, threading.Event(), None

    def get(self, name: str) -> "Listed":
        return self

    def adapter_ids(self, limit: int) -> list[str]:
        self.num_asked += 1
        self.opened.wait(20)
        if self.error is not None:
            raise self.error
        return ["one"]


async def test_listing_is_one_at_a_time_bounded_and_remembered() -> None:
    listed, threads = Listed(), SourceThreads()
    lists = AdapterLists(listed, threads, timeout_s=0.05)  # type: ignore[arg-type]
    answers = await asyncio.gather(*(lists.ids("local") for _ in range(20)), return_exceptions=True)
    assert all(isinstance(answer, SourceUnavailable) and "within 0.05 s" in answer.message for answer in answers)
    lists._timeout_s = 60  # what is remembered is not waited for
    with pytest.raises(SourceUnavailable, match="within 0.05 s"):
        await asyncio.wait_for(lists.ids("local"), 10)
    assert listed.num_asked == 1
    lists._timeout_s = 0.05
    listed.opened.set()
    while lists._running:
        await asyncio.sleep(0.01)
    assert await lists.ids("local") == ["one"] and listed.num_asked == 1
    lists._kept.clear()
    listed.error = SourceUnavailable("asleep")
    for _ in range(3):
        with pytest.raises(SourceUnavailable, match="asleep|within"):
            await lists.ids("local")
    assert listed.num_asked == 2
    threads.close()


async def test_who_mends_the_same_weights_under_another_name_hears_no_error_of_anothers(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = SourceThreads()
    mender, ref = PackMender(store, threads), AdapterRef("0" * 64, "/nowhere", "")
    monkeypatch.setattr(mender, "_remove_damaged", lambda ref: True)

    async def gone() -> AdapterRef:
        await asyncio.sleep(0.05)
        raise AdapterNotFound("Adapter 'of-another' was not found")

    async def there() -> AdapterRef:
        return ref

    first, second, third = await asyncio.gather(*(mender.mend(ref, make) for make in (gone, there, there)), return_exceptions=True)
    assert isinstance(first, AdapterNotFound) and second is True and third is True
    threads.close()

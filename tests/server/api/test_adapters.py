"""Adapters from a request to the engine: found, packed once, replaced when they change, refused by name."""

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from server.adapters.pack import read_header
from server.api.adapters import AdapterResolver, AdapterSelection, Merge
from server.api.text.tokenizer import Tokenizer, load_tokenizer
from server.errors import AdapterNotFound, AdapterRefused, ServerError, SourceUnavailable
from server.metrics import Metrics
from server.sources import SourceOptions, Sources, Store
from tests.server.api.fake_engine import HIDDEN, SITE, layout
from tests.server.api.live import LiveServer, live_server, wait_for

PROMPT = "one two three four"


def write_adapter(folder: Path, *, seed: int = 0, rank: int = 2, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    known = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (folder / "adapter_config.json").write_text(json.dumps(known | config))
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((rank, HIDDEN)), random.standard_normal((HIDDEN, rank))
    prefix = f"base_model.model.{SITE}"
    tensors = {f"{prefix}.lora_A.weight": a.astype(np.float32), f"{prefix}.lora_B.weight": b.astype(np.float32)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


class CountingSources:
    """The real sources; counts how often an adapter was looked up."""

    def __init__(self, adapters_dir: Path) -> None:
        self._sources, self.num_snapshots, self.error = Sources(SourceOptions(adapters_dir=adapters_dir)), 0, None

    def get(self, name: str):
        self._source = self._sources.get(name)
        return self

    def snapshot(self, *arguments, **options):
        self.num_snapshots += 1
        if self.error is not None:
            raise self.error
        return self._source.snapshot(*arguments, **options)

    def fetch(self, *arguments, **options):
        return self._source.fetch(*arguments, **options)


@pytest.fixture(scope="module")
def base(model_dir: Path) -> Tokenizer:
    return load_tokenizer(model_dir)


@pytest.fixture
def sources(tmp_path: Path) -> CountingSources:
    (tmp_path / "adapters").mkdir()
    return CountingSources(tmp_path / "adapters")


@pytest.fixture
def resolver(tmp_path: Path, sources: CountingSources, base: Tokenizer):
    resolver = AdapterResolver(sources, Store(tmp_path / "store"), base, Metrics(), max_merged_rank=5)  # type: ignore[arg-type]
    yield resolver
    resolver.close()


def pick(adapter_id: str, **options) -> AdapterSelection:
    return AdapterSelection("local", adapter_id, **options)


@pytest.mark.parity("2", "one fetch, however many ask", "same")
async def test_resolved_once_however_many_ask(tmp_path: Path, resolver: AdapterResolver, sources: CountingSources) -> None:
    write_adapter(tmp_path / "adapters/team/one")
    found = await asyncio.gather(*(resolver.resolve(pick("team/one"), layout(100)) for _ in range(50)))
    assert sources.num_snapshots == 1 and len({one.ref for one in found}) == 1
    header, _ = read_header(Path(found[0].ref.path))
    assert header.hash == found[0].ref.hash and header.max_rank == 2 and found[0].ref.name == "team/one"


async def test_a_replaced_adapter_gets_its_new_hash_at_once(tmp_path: Path, resolver: AdapterResolver) -> None:
    write_adapter(tmp_path / "adapters/one", seed=1)
    before = await resolver.resolve(pick("one"), layout(100))
    write_adapter(tmp_path / "adapters/one", seed=2)
    after = await resolver.resolve(pick("one"), layout(100))
    assert before.ref.hash != after.ref.hash
    shutil.rmtree(tmp_path / "adapters/one")
    with pytest.raises(AdapterNotFound):
        await resolver.resolve(pick("one"), layout(100))


async def test_failures_are_not_remembered_for_long(tmp_path: Path, resolver: AdapterResolver, sources: CountingSources) -> None:
    for _ in range(3):
        with pytest.raises(AdapterNotFound, match="'late' was not found"):
            await resolver.resolve(pick("late"), layout(100))
    assert sources.num_snapshots == 1
    write_adapter(tmp_path / "adapters/late")
    await asyncio.sleep(1.1)
    assert (await resolver.resolve(pick("late"), layout(100))).ref.name == "late"


@pytest.mark.parity("2", "a failed adapter", "better", "fails those who asked for it; LoRAX fails the whole batch, or ends")
async def test_a_failure_is_its_own_alone(tmp_path: Path, resolver: AdapterResolver) -> None:
    write_adapter(tmp_path / "adapters/good")
    write_adapter(tmp_path / "adapters/bad", target_modules=["nothing_of_that_name"])
    (tmp_path / "adapters/corrupt").mkdir()
    shutil.copy(tmp_path / "adapters/good/adapter_config.json", tmp_path / "adapters/corrupt")
    (tmp_path / "adapters/corrupt/adapter_model.safetensors").write_bytes(b"\xff" * 100)
    results = await asyncio.gather(
        *(resolver.resolve(pick(name), layout(100)) for name in ("bad", "good", "corrupt")), return_exceptions=True
    )
    assert isinstance(results[0], AdapterRefused) and isinstance(results[2], AdapterRefused)
    assert not isinstance(results[1], BaseException)


async def test_a_caller_that_leaves_does_not_stop_the_others(tmp_path: Path, resolver: AdapterResolver) -> None:
    write_adapter(tmp_path / "adapters/one")
    tasks = [asyncio.create_task(resolver.resolve(pick("one"), layout(100))) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError) and results[1].ref == results[2].ref


@pytest.mark.parity(
    "2",
    "an adapter is known by id alone",
    "better",
    "by source, id and the caller's token: nobody is answered with what another's token fetched",
)
async def test_tokens_of_callers_are_kept_apart(tmp_path: Path, resolver: AdapterResolver, sources: CountingSources) -> None:
    write_adapter(tmp_path / "adapters/one")
    await asyncio.gather(*(resolver.resolve(pick("one", api_token=token), layout(100)) for token in (None, "a", "b", "a")))
    assert sources.num_snapshots == 3


async def test_merges(tmp_path: Path, resolver: AdapterResolver) -> None:
    for name, rank in (("a", 2), ("b", 3), ("c", 2)):
        write_adapter(tmp_path / "adapters" / name, seed=ord(name), rank=rank)

    async def merged(*ids: str, **options) -> object:
        merge = Merge(ids, (0.5,) * len(ids), **options)
        return await resolver.resolve(AdapterSelection("local", merge=merge), layout(100))

    linear = await merged("a", "b")
    header, _ = read_header(Path(linear.ref.path))
    assert header.max_rank == 5 and header.hash == linear.ref.hash and linear.ref.name == "a+b"
    assert (await merged("a", "b")).ref == linear.ref and (await merged("b", "a")).ref.hash != linear.ref.hash
    assert (await merged("a", "c", strategy="ties", density=0.5)).ref.hash != (await merged("a", "c")).ref.hash
    with pytest.raises(ServerError, match="rank"):
        await merged("a", "b", "c")


@pytest.mark.parity("2", "an adapter's own chat template", "better", "used; LoRAX ignores it")
async def test_an_adapter_may_bring_its_chat_template(tmp_path: Path, resolver: AdapterResolver, base: Tokenizer) -> None:
    folder = write_adapter(tmp_path / "adapters/own")
    plain = await resolver.resolve(pick("own"), layout(base.num_ids))
    assert plain.tokenizer is base and plain.own_template is False
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    own = await resolver.resolve(pick("own"), layout(base.num_ids))
    assert own.tokenizer.chat_template == "{{ messages[0].content }}!" and own.own_template is True


async def test_a_damaged_pack_is_made_anew_once_however_many_met_it(tmp_path: Path, resolver: AdapterResolver) -> None:
    write_adapter(tmp_path / "adapters/one")
    found = await resolver.resolve(pick("one"), layout(100))
    pack = Path(found.ref.path)
    whole = pack.read_bytes()
    assert await resolver.mend(pick("one"), found, layout(100)) is False  # the engine had another reason
    assert pack.read_bytes() == whole
    pack.write_bytes(whole[:-40] + bytes(40))
    with resolver.pinned(found):
        assert await asyncio.gather(*(resolver.mend(pick("one"), found, layout(100)) for _ in range(5))) == [True] * 5
    assert pack.read_bytes() == whole
    assert await resolver.mend(pick("one"), found, layout(100)) is True  # refused before it was mended
    for again in (True, True, False):  # a disk that damages all that is written
        pack.write_bytes(b"damaged")
        assert await resolver.mend(pick("one"), found, layout(100)) is again


async def test_a_damaged_pack_of_a_name_with_new_content_is_not_made_anew(tmp_path: Path, resolver: AdapterResolver) -> None:
    write_adapter(tmp_path / "adapters/one")
    found = await resolver.resolve(pick("one"), layout(100))
    Path(found.ref.path).write_bytes(b"damaged")
    write_adapter(tmp_path / "adapters/one", seed=9)
    assert await resolver.mend(pick("one"), found, layout(100)) is False


@pytest.mark.parametrize("damage", ["cut off", "header", "emptied"])
async def test_a_pack_that_a_crash_left_damaged_is_made_anew_at_the_first_request(tmp_path: Path, base: Tokenizer, damage: str) -> None:
    """Another server, or this one after a start: nothing is remembered of the pack but that it is there."""
    write_adapter(tmp_path / "adapters/one")
    sources = Sources(SourceOptions(adapters_dir=tmp_path / "adapters"))
    first = AdapterResolver(sources, Store(tmp_path / "store"), base, Metrics())
    found = await first.resolve(pick("one"), layout(100))
    pack = Path(found.ref.path)
    whole = pack.read_bytes()
    pack.write_bytes({"cut off": whole[:-100], "header": whole[:60] + b"\xff" + whole[61:], "emptied": b""}[damage])
    second = AdapterResolver(sources, Store(tmp_path / "store"), base, Metrics())
    assert (await second.resolve(pick("one"), layout(100))).ref == found.ref
    assert pack.read_bytes() == whole
    for one in (first, second):
        one.close()


async def test_a_merge_of_a_damaged_pack_is_made_of_a_new_one(tmp_path: Path, resolver: AdapterResolver) -> None:
    for seed, name in enumerate(("one", "two")):
        write_adapter(tmp_path / "adapters" / name, seed=seed)
    found = await resolver.resolve(pick("one"), layout(100))
    whole = Path(found.ref.path).read_bytes()
    Path(found.ref.path).write_bytes(whole[:-40] + bytes(40))
    merged = await resolver.resolve(AdapterSelection("local", merge=Merge(("one", "two"), (1.0, 1.0))), layout(100))
    assert read_header(Path(merged.ref.path))[0].max_rank == 4 and Path(found.ref.path).read_bytes() == whole


async def test_unreachable_sources_say_so(resolver: AdapterResolver, sources: CountingSources) -> None:
    sources.error = SourceUnavailable("Source 'local' is unavailable: asleep; try again")
    with pytest.raises(SourceUnavailable, match="asleep"):
        await resolver.resolve(pick("one"), layout(100))


def test_end_to_end(tmp_path: Path, model_dir: Path) -> None:
    write_adapter(tmp_path / "adapters/team/sql")
    with live_server(tmp_path, model_dir, preloaded_adapter_ids=["team/sql"]) as live:
        wait_for(lambda: live.seen("Prefetch"))
        check_adapter_requests(live)
        check_templates(live)


def check_adapter_requests(live: LiveServer) -> None:
    parameters = {"max_new_tokens": 4, "adapter_id": "team/sql", "adapter_source": "LOCAL"}
    answer = live.post("/generate", {"inputs": PROMPT, "parameters": parameters})
    assert answer.json()["generated_text"] == " four three twoone"  # the fake engine's mark of an adapter
    assert answer.headers["x-adapter-id"] == "team/sql" and answer.headers["x-adapter-source"] == "local"
    sent = live.seen("Submit")[-1]["adapter"]
    assert sent["name"] == "team/sql" and Path(sent["path"]).is_file()
    completion = live.post("/v1/completions", {"model": "team/sql", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}).json()
    assert completion["choices"][0]["text"] == " four three twoone" and completion["model"] == "team/sql"
    merged = {"ids": ["team/sql", "team/sql"], "weights": [0.5, 0.5]}
    both = live.post("/generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 4, "merged_adapters": merged}})
    assert both.status_code == 200 and both.headers["x-adapter-id"] == "team/sql,team/sql"
    missing = live.post("/generate", {"inputs": PROMPT, "parameters": {"adapter_id": "team/none"}})
    assert missing.status_code == 424
    assert missing.json() == {
        "error": "Request failed during generation: Server error: Adapter 'team/none' was not found in source 'local'",
        "error_type": "generation",
    }
    models = [(model["id"], model["parent"]) for model in live.client.get("/v1/models").json()["data"]]
    assert models == [("base", None), ("team/sql", "base")]
    off = live.post("/generate", {"inputs": PROMPT, "parameters": {"adapter_id": "org/name", "adapter_source": "hub"}})
    assert off.status_code == 422 and "hub" in off.json()["error"]


def check_templates(live: LiveServer) -> None:
    folder = write_adapter(live.folder / "adapters/own")
    messages = [{"role": "user", "content": "hi there"}]
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}{% if shout %}!{% endif %}")
    body = {"model": "own", "messages": messages, "max_tokens": 1}
    assert live.post("/v1/chat/completions", body | {"chat_template_kwargs": {"shout": True}}).status_code == 200
    assert live.api.model.tokenizer.decode(live.seen("Submit")[-1]["token_ids"]) == "hi there!"
    (folder / "chat_template.jinja").write_text("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    slow = live.post("/v1/chat/completions", body)
    assert slow.status_code == 400 and "took more than 1 s" in slow.json()["error"]["message"]
    wait_for(lambda: live.api.admission._num_sequences == 0)

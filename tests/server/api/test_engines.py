"""Several engines behind one API: where a request goes, what is told to whom, and that one's end is not the others'."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.api.devices import count_gpus, engine_devices
from server.api.engines import SLACK, Engines
from server.errors import Overloaded, Unavailable
from server.ipc.messages import AdapterEvent, Forget, Pin, Prefetch, Unpin
from server.metrics import Metrics
from server.types import AdapterRef, EngineOptions, EngineRequest, SamplingParams, SequenceOutput

ROOT = Path(__file__).parents[3]


class StillClient:
    """An engine that answers when the test says so."""

    def __init__(self, options, metrics, *, max_open, on_fatal):
        self.options, self.metrics, self.on_fatal = options, metrics, on_fatal
        self.told, self.asked, self.reason = [], [], None
        self.ready = self.last_ready = SimpleNamespace(layout=SimpleNamespace(fingerprint="f"))
        self.stats = None
        self.answer = asyncio.Event()

    def unhealthy_reason(self):
        return self.reason

    def tell(self, message):
        self.told.append(message)

    async def submit(self, request):
        self.asked.append(request.request_id)
        await self.answer.wait()
        yield SequenceOutput(request.request_id, [1], finish_reason="length")


def engines(count=3, max_open=1000):
    made = Engines([EngineOptions(model_dir="x")] * count, Metrics(), max_open=max_open, make_client=StillClient)
    return made, [member.client for member in made.members]


def ref(name):
    return AdapterRef(name, "/p", name)


async def ask(made, name, adapter=None):
    """Submit and leave it open."""

    async def use():
        async for _ in made.submit(EngineRequest(name, [1], SamplingParams(max_new_tokens=1), adapter and ref(adapter))):
            pass

    task = asyncio.create_task(use())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


async def finish(clients, tasks):
    for client in clients:
        client.answer.set()
    await asyncio.gather(*tasks)


async def test_requests_spread_over_idle_engines():
    made, clients = engines()
    tasks = [await ask(made, str(i)) for i in range(9)]
    assert [len(client.asked) for client in clients] == [3, 3, 3]
    await finish(clients, tasks)
    assert [member.num_open for member in made.members] == [0, 0, 0]


async def test_an_adapter_is_asked_where_it_is_until_that_engine_has_a_queue_of_its_own():
    made, clients = engines(2)
    clients[1].on_adapter = made.members[1].client.on_adapter
    made.members[1].client.on_adapter(AdapterEvent("a", "device", 10))
    tasks = [await ask(made, str(i), "a") for i in range(SLACK + 1)]
    assert len(clients[1].asked) == SLACK + 1 and not clients[0].asked
    tasks.append(await ask(made, "more", "a"))  # the other is idle: the adapter is loaded there as well
    assert clients[0].asked == ["more"]
    made.members[0].client.on_adapter(AdapterEvent("a", "loading"))
    tasks += [await ask(made, "base")]
    assert clients[0].asked == ["more", "base"]
    await finish(clients, tasks)


async def test_an_engine_that_does_not_serve_is_passed_over():
    made, clients = engines(2)
    clients[0].reason = "stuck"
    tasks = [await ask(made, str(i)) for i in range(3)]
    assert len(clients[1].asked) == 3 and made.unhealthy_reason() is None
    clients[1].ready = None
    clients[1].reason = "gone"
    assert made.unhealthy_reason() == "stuck"
    with pytest.raises(Unavailable, match="stuck"):
        async for _ in made.submit(EngineRequest("x", [1], SamplingParams(max_new_tokens=1))):
            pass
    await finish(clients, tasks)


async def test_the_bound_is_on_all_together():
    made, clients = engines(2, max_open=2)
    tasks = [await ask(made, "a"), await ask(made, "b")]
    with pytest.raises(Overloaded):
        async for _ in made.submit(EngineRequest("c", [1], SamplingParams(max_new_tokens=1))):
            pass
    await finish(clients, tasks)


def test_what_is_told_to_whom():
    made, clients = engines(2)
    events = []
    made.on_adapter = events.append
    clients[1].on_adapter(AdapterEvent("a", "host", 5))
    made.tell(Prefetch(ref("a")))
    assert [len(client.told) for client in clients] == [0, 1]
    for _ in range(2):
        made.tell(Pin(ref("a")))
    made.tell(Unpin("a"))
    made.tell(Unpin("a"))
    made.tell(Forget("a"))
    assert [type(m).__name__ for m in clients[0].told] == ["Pin", "Unpin", "Forget"]
    clients[0].on_adapter(AdapterEvent("a", "loading"))  # still best held by the other
    clients[1].on_adapter(AdapterEvent("a", "absent"))
    assert [(event.hash, event.state) for event in events] == [("a", "host"), ("a", "host"), ("a", "loading")]


def test_a_new_engine_forgets_its_own_adapters_alone_and_gets_the_pins_again():
    made, clients = engines(2)
    seen, events = [], []
    made.on_ready, made.on_adapter = lambda: (seen.append("ready"), made.tell(Pin(ref("p"))))[0], events.append
    made.tell(Pin(ref("p")))
    clients[0].on_adapter(AdapterEvent("a", "device"))
    clients[1].on_adapter(AdapterEvent("b", "device"))
    events.clear()
    clients[0].on_ready()
    assert seen == ["ready"] and [(event.hash, event.state) for event in events] == [("b", "device")]
    assert len(clients[0].told) == 2 and len(clients[1].told) == 1


def test_numbers_are_added_up():
    made, clients = engines(2)
    for client, running in zip(clients, (3, 4), strict=True):
        client.metrics.observe_engine({"num_running": running, "max_batch_size": 8})
        client.metrics.engine_up.set(1)
    text = made.members[0].client.metrics._metrics.render().decode()
    assert "lorax_batch_current_size 7.0" in text and "manylora_batch_size_max 16.0" in text and "manylora_engine_up 2.0" in text


@pytest.mark.parametrize(
    "environment, folders, count",
    [({}, 4, 4), ({}, 0, 0), ({"CUDA_VISIBLE_DEVICES": "0,2"}, 4, 2), ({"CUDA_VISIBLE_DEVICES": ""}, 4, 0)]
    + [({"CUDA_VISIBLE_DEVICES": "1,-1,2"}, 4, 1), ({"CUDA_VISIBLE_DEVICES": "GPU-1a,GPU-2b"}, 1, 2)],
)
def test_gpus_are_counted_without_torch(environment, folders, count, tmp_path):
    for index in range(folders):
        (tmp_path / f"0000:0{index}:00.0").mkdir()
    assert count_gpus(environment, tmp_path) == count
    assert count_gpus({}, tmp_path / "none") == 0


def test_each_engine_has_its_device():
    assert engine_devices("auto", None, 0) == ["auto"] and engine_devices("auto", None, 1) == ["auto"]
    assert engine_devices("auto", None, 4) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert engine_devices("cuda", 2, 4) == ["cuda:0", "cuda:1"] and engine_devices("cpu", 2, 4) == ["cpu", "cpu"]
    with pytest.raises(ValueError, match="num_engines 5: there are 4 GPUs"):
        engine_devices("auto", 5, 4)
    with pytest.raises(ValueError, match="several engines need device auto"):
        engine_devices("cuda:1", 2, 4)


async def test_one_engine_dies_and_the_other_answers_on(tmp_path):
    (tmp_path / "control").write_text(json.dumps({"delay_s": 0.0}))
    fake = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.server.api.fake_engine import main; sys.exit(main())"
    command = [sys.executable, "-c", fake, "--control", str(tmp_path / "control"), "--log", str(tmp_path / "log"), "--vocab-size", "10"]
    made = Engines([EngineOptions(model_dir="x")] * 2, Metrics(), max_open=100, command=command, backoff_s=0.05)
    made.start()
    try:
        async with asyncio.timeout(30):
            while not all(member.client.ready for member in made.members):
                await asyncio.sleep(0.02)

            async def use(name, num):
                return [o async for o in made.submit(EngineRequest(name, [1, 2], SamplingParams(max_new_tokens=num)))]

            assert all(done[-1].finish_reason for done in await asyncio.gather(*(use(str(i), 3) for i in range(6))))
            victim = made.members[0].client
            os.kill(victim._process.pid, signal.SIGKILL)
            ends = []
            while victim.ready is not None:
                with contextlib.suppress(Unavailable):
                    ends += await use(f"during{len(ends)}", 1)
                await asyncio.sleep(0.01)
            assert made.unhealthy_reason() is None
            assert all([(await use(f"after{i}", 2))[-1].finish_reason == "length" for i in range(5)])
            while victim.ready is None:
                await asyncio.sleep(0.02)
            assert all(done[-1].finish_reason for done in await asyncio.gather(*(use(f"again{i}", 3) for i in range(6))))
    finally:
        await made.stop()

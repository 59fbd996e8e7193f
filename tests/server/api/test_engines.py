"""Several engines behind one API: where a request goes, what is told to whom, and that one's end is not the others'."""

import asyncio
from types import SimpleNamespace

import pytest

from server.api.engines import Engines
from server.api.open_requests import NotTaken
from server.api.placement import SEQUENCE_TOKENS, SLACK_TOKENS
from server.errors import Overloaded, Unavailable
from server.ipc.messages import AdapterEvent, Forget, Pin, Prefetch, Unpin
from server.metrics import Metrics
from server.types import AdapterRef, EngineOptions, EngineRequest, SamplingParams, SequenceOutput


class StillClient:
    """An engine that answers when the test says so."""

    def __init__(self, options, metrics, *, max_open, on_fatal):
        self.options, self.metrics, self.on_fatal = options, metrics, on_fatal
        self.told, self.asked, self.reason = [], [], None
        self.ready = self.last_ready = SimpleNamespace(layout=SimpleNamespace(fingerprint="f"))
        self.device = options.device
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


async def ask(made, name, adapter=None, prompt_len=1):
    """Submit and leave it open."""

    async def use():
        request = EngineRequest(name, [1] * prompt_len, SamplingParams(max_new_tokens=1), adapter and ref(adapter))
        async for _ in made.submit(request):
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
    assert all((one.num_open, one.num_tokens, one.adapters) == (0, 0, {}) for one in made.members)


async def test_load_is_tokens_not_requests():
    made, clients = engines(2)
    tasks = [await ask(made, "long", prompt_len=10 * SEQUENCE_TOKENS)]
    tasks += [await ask(made, str(i)) for i in range(10)]
    assert clients[0].asked == ["long"] and len(clients[1].asked) == 10
    tasks += [await ask(made, "then"), await ask(made, "and then")]
    assert clients[0].asked == ["long", "then"] and clients[1].asked[-1] == "and then"
    await finish(clients, tasks)


async def test_what_was_generated_counts_as_load():
    made, clients = engines(2)

    async def submit(request):
        yield SequenceOutput(request.request_id, [1] * (2 * SEQUENCE_TOKENS))
        await clients[0].answer.wait()
        yield SequenceOutput(request.request_id, finish_reason="length")

    clients[0].submit = submit
    tasks = [await ask(made, "talks")]
    tasks += [await ask(made, "1"), await ask(made, "2")]
    assert made.members[0].num_tokens == 2 * SEQUENCE_TOKENS + 1 and clients[1].asked == ["1", "2"]
    await finish(clients, tasks)


async def test_an_adapter_is_asked_where_it_is_until_that_engine_has_a_queue_of_its_own():
    made, clients = engines(2)
    clients[1].on_adapter(AdapterEvent("a", "device", 10))
    num_near = SLACK_TOKENS // SEQUENCE_TOKENS + 1
    tasks = [await ask(made, str(i), "a") for i in range(num_near)]
    assert len(clients[1].asked) == num_near and not clients[0].asked
    tasks.append(await ask(made, "more", "a"))  # the other is idle: the adapter is loaded there as well
    assert clients[0].asked == ["more"]
    clients[0].on_adapter(AdapterEvent("a", "loading"))
    tasks += [await ask(made, "base")]
    assert clients[0].asked == ["more", "base"]
    await finish(clients, tasks)


async def test_adapters_are_divided_among_idle_engines_and_a_burst_loads_one_once():
    made, clients = engines(2)
    for name in "abcd":  # one at a time: nobody is ever busy
        task = await ask(made, name, name)
        chosen = next(client for client in clients if name in client.asked)
        chosen.on_adapter(AdapterEvent(name, "host", 1))
        await finish(clients, [task])
    assert [len(client.asked) for client in clients] == [2, 2]
    made, clients = engines(2)
    tasks = [await ask(made, str(i), "e") for i in range(4)]  # before any event
    assert sorted(len(client.asked) for client in clients) == [0, 4]
    await finish(clients, tasks)


async def test_where_an_adapter_could_not_be_loaded_is_no_better_than_elsewhere():
    made, clients = engines(2)
    clients[0].on_adapter(AdapterEvent("a", "failed", error="no memory"))
    tasks = [await ask(made, "again", "a")]
    assert clients[1].asked == ["again"]
    clients[0].on_adapter(AdapterEvent("b", "a state of a later version"))  # nothing breaks
    await finish(clients, tasks)


async def test_an_engine_that_does_not_serve_is_passed_over():
    made, clients = engines(2)
    clients[0].reason = "stuck"
    tasks = [await ask(made, str(i)) for i in range(3)]
    assert len(clients[1].asked) == 3 and made.unhealthy_reason() is None
    clients[1].ready = None
    clients[1].reason = "gone"
    assert made.unhealthy_reason() == "stuck; gone"
    with pytest.raises(Unavailable, match="stuck"):
        async for _ in made.submit(EngineRequest("x", [1], SamplingParams(max_new_tokens=1))):
            pass
    await finish(clients, tasks)


async def test_what_a_lost_engine_never_had_goes_to_another_one_once():
    made, clients = engines(3)
    lose = {0, 2}

    def losing(index):
        async def submit(request):
            clients[index].asked.append(request.request_id)
            if index in lose:
                raise NotTaken("the engine was killed by signal 9; try again")
            yield SequenceOutput(request.request_id, [1], finish_reason="length")

        return submit

    for index, client in enumerate(clients):
        client.submit = losing(index)
    request = EngineRequest("a", [1], SamplingParams(max_new_tokens=1))
    assert [output.finish_reason async for output in made.submit(request)] == ["length"]
    assert [client.asked for client in clients] == [["a"], ["a"], []]
    lose.add(1)
    with pytest.raises(NotTaken):  # it may be the request's doing after all: not a third time
        _ = [output async for output in made.submit(request)]
    assert sum(len(client.asked) for client in clients) == 4
    clients[1].reason = clients[2].reason = "gone"
    with pytest.raises(NotTaken, match="signal 9"):
        _ = [output async for output in made.submit(request)]
    assert all((one.num_open, one.num_tokens) == (0, 0) for one in made.members)


async def test_what_an_engine_had_is_not_tried_elsewhere():
    made, clients = engines(2)

    async def submit(request):
        raise Unavailable("the engine stopped while this request was open")
        yield

    clients[0].submit = submit
    with pytest.raises(Unavailable, match="while this request was open"):
        _ = [output async for output in made.submit(EngineRequest("a", [1], SamplingParams(max_new_tokens=1)))]
    assert not clients[1].asked


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
    made.on_ready = lambda: seen.append("first")
    made.on_joined = lambda: (seen.append("joined"), made.tell(Pin(ref("p"))))
    made.on_adapter = events.append
    made.tell(Pin(ref("p")))
    for client, name, state in [(clients[0], "a", "device"), (clients[0], "b", "device"), (clients[1], "b", "host")]:
        client.on_adapter(AdapterEvent(name, state, 7))
    events.clear()
    clients[0].ready = None
    clients[0].on_lost()
    assert sorted((event.hash, event.state, event.bytes) for event in events) == [("a", "absent", 0), ("b", "host", 7)]
    clients[0].ready = clients[1].ready
    clients[0].on_ready()
    assert seen == ["joined"] and len(clients[0].told) == 2 and len(clients[1].told) == 1
    for client in clients:
        client.ready = None
        client.on_lost()
    clients[1].ready = clients[1].last_ready
    clients[1].on_ready()
    assert seen == ["joined", "first"]  # nobody holds anything


def test_engines_with_different_bases_are_refused():
    reasons = []
    made = Engines([EngineOptions(model_dir="x")] * 2, Metrics(), max_open=9, make_client=StillClient, on_fatal=reasons.append)
    first, second = made.clients
    first.on_ready()
    second.ready = SimpleNamespace(layout=SimpleNamespace(fingerprint="another"))
    second.on_ready()
    assert reasons == ["the engines do not serve the same base model"]
    assert [member.is_serving for member in made.members] == [True, False]


def test_the_server_ends_when_no_engine_can_start():
    reasons = []
    made = Engines([EngineOptions(model_dir="x")] * 2, Metrics(), max_open=9, make_client=StillClient, on_fatal=reasons.append)
    first, second = made.clients
    assert first.on_fatal("no memory") is True and reasons == []  # tried again beside the other
    second.on_ready()
    assert first.on_fatal("no memory") is True and reasons == []
    made = Engines([EngineOptions(model_dir="x")] * 2, Metrics(), max_open=9, make_client=StillClient, on_fatal=reasons.append)
    assert [client.on_fatal("unknown architecture") for client in made.clients] == [True, False]
    assert reasons == ["unknown architecture"]


def test_numbers_are_added_up():
    made, clients = engines(2)
    for client, running in zip(clients, (3, 4), strict=True):
        client.metrics.observe_engine({"num_running": running, "max_batch_size": 8})
        client.metrics.engine_up.set(1)
    metrics = clients[0].metrics._metrics
    text = metrics.render().decode()
    assert "lorax_batch_current_size 7.0" in text and "manylora_batch_size_max 16.0" in text and "manylora_engine_up 2.0" in text
    assert "manylora_load_ratio 0.4375" in text  # 7 of 16


def test_what_a_dead_engine_counted_stays_and_what_it_held_goes():
    made, clients = engines(2)
    for client in clients:
        client.metrics.observe_engine({"num_running": 4, "max_batch_size": 8, "num_output_tokens": 100})
    clients[0].on_lost()
    text = clients[0].metrics._metrics.render().decode()
    assert "lorax_batch_current_size 4.0" in text and "manylora_batch_size_max 8.0" in text and "manylora_load_ratio 0.5" in text
    assert "manylora_output_tokens_total 200.0" in text
    clients[0].metrics.observe_engine({"num_running": 1, "max_batch_size": 8, "num_output_tokens": 5})  # from zero
    text = clients[0].metrics._metrics.render().decode()
    assert "manylora_output_tokens_total 205.0" in text and "manylora_load_ratio 0.3125" in text

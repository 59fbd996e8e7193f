"""The wire between the processes: order, threads, a peer that goes or never comes."""

import asyncio
import threading
import time
from pathlib import Path

import msgspec
import pytest

from server.ipc.messages import Abort, Prefetch, Shutdown, Starting, StepOutputs
from server.ipc.sockets import ApiSocket, EngineSocket, PeerLost
from server.types import AdapterRef, SequenceOutput


async def connected(tmp_path: Path) -> tuple[EngineSocket, ApiSocket]:
    address = f"ipc://{tmp_path}/s"
    api, engine = EngineSocket(address), ApiSocket(address)
    engine.send(Starting("load", 0.0))
    assert await asyncio.wait_for(api.receive(), 5) == Starting("load", 0.0)
    return api, engine


async def test_messages_keep_their_order_both_ways(tmp_path: Path) -> None:
    api, engine = await connected(tmp_path)
    sent = [Abort([str(n)]) for n in range(1000)] + [Prefetch(AdapterRef("h", "p", "n")), Shutdown()]
    for message in sent:
        api.send(message)
    received = []
    while len(received) < len(sent):
        received += engine.receive(1.0)
    assert received == sent
    assert engine.receive(0.0) == []
    engine.close()
    api.close()


async def test_any_thread_may_send_while_another_receives(tmp_path: Path) -> None:
    api, engine = await connected(tmp_path)

    def send_many(name: str) -> None:
        for n in range(200):
            engine.send(StepOutputs([SequenceOutput(f"{name}-{n}")]))

    threads = [threading.Thread(target=send_many, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    got = [(await asyncio.wait_for(api.receive(), 5)).outputs[0].request_id for _ in range(600)]
    for thread in threads:
        thread.join()
    for name in "abc":
        assert [one for one in got if one.startswith(name)] == [f"{name}-{n}" for n in range(200)]
    engine.close()
    engine.send(Starting("after the end", 0.0))  # a heartbeat that comes too late is no error
    api.close()


async def test_the_engine_notices_that_the_api_is_gone(tmp_path: Path) -> None:
    api, engine = await connected(tmp_path)
    engine.receive(0.1)
    api.close()
    started_at = time.monotonic()
    with pytest.raises(PeerLost):
        while time.monotonic() - started_at < 5:
            engine.receive(0.05)
    engine.close()


def test_the_engine_gives_up_on_an_api_that_never_comes(tmp_path: Path) -> None:
    engine = ApiSocket(f"ipc://{tmp_path}/nobody", connect_timeout_s=0.1)
    with pytest.raises(PeerLost):
        for _ in range(50):
            engine.receive(0.05)
    engine.close(linger_s=0)


async def test_sending_to_no_engine_is_an_error(tmp_path: Path) -> None:
    api = EngineSocket(f"ipc://{tmp_path}/s")
    with pytest.raises(PeerLost):
        api.send(Shutdown())
    api.close()


async def test_the_last_message_of_an_engine_arrives(tmp_path: Path) -> None:
    api, engine = await connected(tmp_path)
    engine.send(Starting("last words", 1.0))
    engine.close()
    assert await asyncio.wait_for(api.receive(), 5) == Starting("last words", 1.0)
    api.close()


async def test_another_version_is_an_error_not_a_guess(tmp_path: Path) -> None:
    api, engine = await connected(tmp_path)
    engine._out.send(msgspec.msgpack.encode({"type": "FromTheFuture"}))
    with pytest.raises(msgspec.ValidationError):
        await asyncio.wait_for(api.receive(), 5)
    engine.close()
    api.close()

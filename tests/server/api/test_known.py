"""Short work on what is known: what comes of it when it is late."""

import asyncio
import gc
import threading

import pytest

from server.api import known
from server.api.known import Flight
from server.api.source_threads import SourceThreads


async def test_what_fails_once_nobody_waits_is_not_said_to_be_unheard() -> None:
    faults: list[dict] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: faults.append(context))
    flight, threads, began, may_fail = Flight(), SourceThreads(), threading.Event(), threading.Event()
    flight.num_waiting = 1

    def fail() -> None:
        began.set()
        may_fail.wait(30)
        raise ValueError("late")

    waits = asyncio.create_task(flight.run_in_time(threads, "local", "known", fail))
    while not began.is_set():
        await asyncio.sleep(0.01)
    waits.cancel()
    await asyncio.wait({waits})
    assert waits.cancelled()
    del waits  # or its traceback would keep what failed
    may_fail.set()
    threads.close()
    await asyncio.to_thread(threads._pools["local", "known"].shutdown)
    await asyncio.sleep(0.05)
    gc.collect()
    assert not faults


async def test_what_fails_late_is_not_said_to_be_unheard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "PATIENCE_S", 0.3)
    faults: list[dict] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: faults.append(context))
    flight, threads, may_fail = Flight(), SourceThreads(), threading.Event()
    flight.num_waiting = 1

    def fail() -> None:
        may_fail.wait(30)
        raise ValueError("late")

    assert await flight.run_in_time(threads, "local", "known", fail) is None and threads.is_late("local", "known")
    may_fail.set()
    while threads.is_late("local", "known"):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.01)  # its future here hears of it in a turn of its own
    gc.collect()
    assert not faults
    threads.close()

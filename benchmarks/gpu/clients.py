"""Clients of a server in several processes: each request is sent at its own time, whether or not earlier ones are answered.

Owns the load and its clocks: when a token arrived is noted by the process that read it, in monotonic seconds, which all processes of a
machine share. Knows nothing of what is measured with it. No torch here: a client process is up in a second.
"""

import asyncio
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from typing import Any

import httpx

_START_IN_S = 0.3
_READY_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Ask:
    """A request to make, `at` seconds after the load begins. `adapter` None is the base, under `Load.base_name`."""

    at: float
    prompt: str
    num_new: int
    adapter: str | None


@dataclass(frozen=True)
class Load:
    """All requests of a measurement. Streamed or not, all are greedy and go on after end tokens."""

    url: str
    base_name: str
    asks: Sequence[Ask]
    stream: bool
    num_processes: int
    timeout_s: float


@dataclass
class Answer:
    """What came of a request; times are seconds after the load began. `event_times`: of each event with text, streamed ones alone."""

    index: int  # in Load.asks
    sent_at: float
    done_at: float = 0.0
    num_tokens: int = 0
    event_times: list[float] = field(default_factory=list)
    error: str | None = None


class LoadFailed(Exception):
    """Requests were not answered with all their tokens, or a client process died; the message shows one."""


def run_load(load: Load) -> list[Answer]:
    """Every answer, in the order of the asks. LoadFailed if one is missing or short."""
    context = multiprocessing.get_context("spawn")
    results: Queue[list[Answer]] = context.Queue()
    barrier, start_at = context.Barrier(load.num_processes + 1), context.Value("d", 0.0)
    shares = [range(first, len(load.asks), load.num_processes) for first in range(load.num_processes)]
    processes = [context.Process(target=_client, args=(load, share, barrier, start_at, results), daemon=True) for share in shares]
    for process in processes:
        process.start()
    try:
        barrier.wait(_READY_TIMEOUT_S)
        start_at.value = time.monotonic() + _START_IN_S
        barrier.wait(_READY_TIMEOUT_S)
        last_at = max((ask.at for ask in load.asks), default=0.0)
        answers = [answer for _ in processes for answer in results.get(timeout=last_at + load.timeout_s + _READY_TIMEOUT_S)]
    except Exception as error:
        raise LoadFailed(f"the client processes did not all answer ({type(error).__name__})") from error
    finally:
        for process in processes:
            process.terminate()
            process.join()
    answers.sort(key=lambda answer: answer.index)
    failed = [
        answer
        for answer in answers
        if answer.error or answer.num_tokens != load.asks[answer.index].num_new or (load.stream and not answer.event_times)
    ]
    if failed or len(answers) != len(load.asks):
        shown = failed[0].error or f"{failed[0].num_tokens} tokens" if failed else f"{len(answers)} answers"
        raise LoadFailed(f"{len(failed)} of {len(load.asks)} requests failed, the first with: {shown}")
    return answers


def _client(load: Load, share: Sequence[int], barrier: Barrier, start_at: "Synchronized[float]", results: "Queue[list[Answer]]") -> None:
    results.put(asyncio.run(_run_share(load, share, barrier, start_at)))
    results.close()
    results.join_thread()


async def _run_share(load: Load, share: Sequence[int], barrier: Barrier, start_at: "Synchronized[float]") -> list[Answer]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=load.url, timeout=load.timeout_s, limits=limits) as client:
        # Connections for all that go out at once are opened before the clock runs.
        await asyncio.gather(*(client.get("/health") for _ in range(sum(load.asks[index].at == 0 for index in share) or 1)))
        barrier.wait(_READY_TIMEOUT_S)
        barrier.wait(_READY_TIMEOUT_S)
        return list(await asyncio.gather(*(_ask(client, load, index, start_at.value) for index in share)))


async def _ask(client: httpx.AsyncClient, load: Load, index: int, start_at: float) -> Answer:
    ask = load.asks[index]
    body: dict[str, Any] = {
        "model": ask.adapter or load.base_name,
        "prompt": ask.prompt,
        "max_tokens": ask.num_new,
        "temperature": 0,
        "ignore_eos_token": True,
    }
    if load.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    await asyncio.sleep(max(0.0, start_at + ask.at - time.monotonic()))
    answer = Answer(index, time.monotonic() - start_at)
    try:
        if load.stream:
            await _read_stream(client, body, answer, start_at)
        else:
            reply = await client.post("/v1/completions", json=body)
            if reply.status_code == 200:
                answer.num_tokens = reply.json()["usage"]["completion_tokens"]
            else:
                answer.error = f"{reply.status_code} {reply.text[:300]}"
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__} {error}"
    answer.done_at = time.monotonic() - start_at
    return answer


async def _read_stream(client: httpx.AsyncClient, body: dict[str, Any], answer: Answer, start_at: float) -> None:
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        if reply.status_code != 200:
            answer.error = f"{reply.status_code} {(await reply.aread())[:300]!r}"
            return
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now = time.monotonic() - start_at
            event = json.loads(line[6:])
            if "error" in event:
                answer.error = str(event["error"])[:300]
            elif event.get("usage"):
                answer.num_tokens = event["usage"]["completion_tokens"]
            else:
                answer.event_times.append(now)

"""Strangers' templates in a process of their own, with limits on time and memory.

`TemplateWorkers` is the API's side: it hands a template to a free worker and kills the worker that takes too long. `main` is the worker:
frames of (4 bytes length, msgpack) on stdin and stdout. Nothing of the API's memory, environment or files is handed over.
"""

import asyncio
import os
import resource
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, BinaryIO

import msgspec

from server.api.text.templates import MAX_TEMPLATE_CHARS, render
from server.errors import Overloaded, TemplateFailed, ValidationFailed

MEMORY_BYTES = 1 << 30
_START_TIMEOUT_S = 30.0
_CPU_LIMIT_S = 120
_SLOW_FOR_S = 10.0  # so long a template that took too long is refused without another try
_LENGTH = struct.Struct(">I")


class _Job(msgspec.Struct):
    template: str
    variables: dict[str, Any]


class _Answer(msgspec.Struct):
    text: str | None = None
    error: str | None = None


class TemplateWorkers:
    """A few worker processes, started when first needed; `close` ends them."""

    def __init__(self, *, timeout_s: float, num_workers: int = 2, max_wait_s: float = 10.0) -> None:
        self._timeout_s, self._max_wait_s = timeout_s, max_wait_s
        self._idle: asyncio.LifoQueue[asyncio.subprocess.Process | None] = asyncio.LifoQueue()
        for _ in range(num_workers):
            self._idle.put_nowait(None)
        self._processes: set[asyncio.subprocess.Process] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._turns: dict[str, tuple[asyncio.Lock, int]] = {}  # template -> lock, callers that hold it or wait for it
        self._slow_until: dict[str, float] = {}

    async def render(self, template: str, variables: dict[str, Any]) -> str:
        """The prompt. TemplateFailed as templates.render has it, and when the time or the memory is used up; Overloaded if no worker came
        free in time; ValidationFailed for variables that cannot be handed over.

        A template has one worker at a time, so that an endless one leaves the others to the other templates."""
        if len(template) > MAX_TEMPLATE_CHARS:
            raise TemplateFailed(f"the chat template is longer than {MAX_TEMPLATE_CHARS} characters")
        try:
            job = msgspec.msgpack.encode(_Job(template, variables))
        except (OverflowError, TypeError, ValueError, RecursionError) as error:
            raise ValidationFailed(f"`chat_template_kwargs`: {error}", param="chat_template_kwargs") from None
        self._refuse_slow(template)
        async with self._turn(template):
            self._refuse_slow(template)
            answer = await self._answer(template, job)
        if answer.error is not None:
            raise TemplateFailed(answer.error)
        return answer.text or ""

    def _refuse_slow(self, template: str) -> None:
        if self._slow_until.get(template, 0.0) > time.monotonic():
            raise TemplateFailed(f"the adapter's chat template took more than {self._timeout_s:g} s a moment ago")

    @asynccontextmanager
    async def _turn(self, template: str) -> AsyncIterator[None]:
        lock, num_callers = self._turns.get(template, (asyncio.Lock(), 0))
        self._turns[template] = lock, num_callers + 1
        try:
            await self._soon(lock.acquire())
            try:
                yield
            finally:
                lock.release()
        finally:
            lock, num_callers = self._turns.pop(template)
            if num_callers > 1:
                self._turns[template] = lock, num_callers - 1

    async def _soon(self, waiting: Any) -> Any:
        try:
            async with asyncio.timeout(self._max_wait_s):
                return await waiting
        except TimeoutError:
            raise Overloaded("the workers of chat templates are busy") from None

    async def _answer(self, template: str, job: bytes) -> _Answer:
        worker = await self._soon(self._idle.get())
        try:
            if worker is None:
                worker = await self._start()
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await _ask(worker, job)
            except TimeoutError:
                now = time.monotonic()
                self._slow_until = {known: until for known, until in self._slow_until.items() if until > now}
                self._slow_until[template] = now + _SLOW_FOR_S
                raise TemplateFailed(f"the adapter's chat template took more than {self._timeout_s:g} s") from None
            except (asyncio.IncompleteReadError, ConnectionError):
                raise TemplateFailed("the adapter's chat template used too much memory") from None
        except BaseException:  # cancelled too: the worker is in the middle of a job that nobody waits for
            self._kill(worker)
            self._idle.put_nowait(None)
            raise
        self._idle.put_nowait(worker)
        return answer

    async def _start(self) -> asyncio.subprocess.Process:
        """A worker that has answered once, so that its start does not count against the first template."""
        pipe = asyncio.subprocess.PIPE
        environment = {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __name__, stdin=pipe, stdout=pipe, env=environment, start_new_session=True
        )  # fmt: skip
        self._processes.add(process)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await _ask(process, msgspec.msgpack.encode(_Job("", {})))
        except BaseException:
            self._kill(process)
            raise
        return process

    def _kill(self, process: asyncio.subprocess.Process | None) -> None:
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        task = asyncio.create_task(self._forget(process))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _forget(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        self._processes.discard(process)

    async def close(self) -> None:
        """End all workers."""
        for process in self._processes:
            self._kill(process)
        await asyncio.gather(*self._ending)


async def _ask(process: asyncio.subprocess.Process, job: bytes) -> _Answer:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(_LENGTH.pack(len(job)) + job)
    await process.stdin.drain()
    (length,) = _LENGTH.unpack(await process.stdout.readexactly(_LENGTH.size))
    return msgspec.msgpack.decode(await process.stdout.readexactly(length), type=_Answer)


def _allow_cpu_seconds(seconds: int) -> None:
    """From now on; for the case that the API is gone and cannot end a template that never ends."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds, resource.RLIM_INFINITY))


def main(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Answer jobs until the API closes stdin."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while header := stdin.read(_LENGTH.size):
        _allow_cpu_seconds(_CPU_LIMIT_S)
        job = msgspec.msgpack.decode(stdin.read(_LENGTH.unpack(header)[0]), type=_Job)
        try:
            answer = _Answer(text=render(job.template, job.variables))
        except TemplateFailed as error:
            answer = _Answer(error=error.message)
        data = msgspec.msgpack.encode(answer)
        stdout.write(_LENGTH.pack(len(data)) + data)
        stdout.flush()


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)

"""Strangers' templates in a process of their own, with limits on time and memory.

`TemplateWorkers` is the API's side: it hands a template to a free worker and kills the worker that takes too long. `main` is the worker:
frames of (4 bytes length, msgpack) on stdin and stdout. Nothing of the API's memory, environment or files is handed over.
"""

import asyncio
import os
import resource
import struct
import sys
from typing import Any, BinaryIO

import msgspec

from server.api.text.templates import render
from server.errors import TemplateFailed

MEMORY_BYTES = 1 << 30
_START_TIMEOUT_S = 30.0
_CPU_LIMIT_S = 120
_LENGTH = struct.Struct(">I")


class _Job(msgspec.Struct):
    template: str
    variables: dict[str, Any]


class _Answer(msgspec.Struct):
    text: str | None = None
    error: str | None = None


class TemplateWorkers:
    """A few worker processes, started when first needed; `close` ends them."""

    def __init__(self, *, timeout_s: float, num_workers: int = 2) -> None:
        self._timeout_s = timeout_s
        self._idle: asyncio.LifoQueue[asyncio.subprocess.Process | None] = asyncio.LifoQueue()
        for _ in range(num_workers):
            self._idle.put_nowait(None)
        self._processes: set[asyncio.subprocess.Process] = set()

    async def render(self, template: str, variables: dict[str, Any]) -> str:
        """The prompt. TemplateFailed as templates.render has it, and when the time or the memory is used up."""
        worker = await self._idle.get()
        try:
            if worker is None:
                worker = await self._start()
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await _ask(worker, _Job(template, variables))
            except TimeoutError:
                raise TemplateFailed(f"the adapter's chat template took more than {self._timeout_s:g} s") from None
            except (asyncio.IncompleteReadError, ConnectionError):
                raise TemplateFailed("the adapter's chat template used too much memory") from None
        except BaseException:  # cancelled too: the worker is in the middle of a job that nobody waits for
            self._kill(worker)
            self._idle.put_nowait(None)
            raise
        self._idle.put_nowait(worker)
        if answer.error is not None:
            raise TemplateFailed(answer.error)
        return answer.text or ""

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
                await _ask(process, _Job("", {}))
        except BaseException:
            self._kill(process)
            raise
        return process

    def _kill(self, process: asyncio.subprocess.Process | None) -> None:
        if process is not None and process.returncode is None:
            process.kill()

    async def close(self) -> None:
        """End all workers."""
        for process in self._processes:
            self._kill(process)
            await process.wait()


async def _ask(process: asyncio.subprocess.Process, job: _Job) -> _Answer:
    assert process.stdin is not None and process.stdout is not None
    data = msgspec.msgpack.encode(job)
    process.stdin.write(_LENGTH.pack(len(data)) + data)
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

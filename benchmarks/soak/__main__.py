"""`python -m benchmarks.soak`: requests and orders at random; says what was wrong, lost or leaked, and exits with 1 unless all are zero."""

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from benchmarks.gpu.models import write_model
from benchmarks.gpu.rows import ROOT
from benchmarks.gpu.serve import RandomServer
from benchmarks.soak.leaks import Watch, as_rows, leaked, memory_growth
from benchmarks.soak.marks import MODEL
from benchmarks.soak.names import Name, Popularity
from benchmarks.soak.orders import Orders
from benchmarks.soak.requests import Requests, make_prompts
from benchmarks.soak.tally import Tally
from sizing.printing import run_tool

ADMIN_KEY = "the-admin-key-of-a-soak"
_ORDERS = 0.1  # share of what is done that changes a name
_BASE = 0.05  # share of the requests that name no adapter
# Little room, so that adapters push each other out of every tier and sequences preempt each other.
OPTIONS = {
    "device": "cpu", "num_threads": 1, "max_total_tokens": 256, "num_blocks": 64, "max_batch_size": 16, "max_batch_prefill_tokens": 128,
    "adapter_device_bytes": 40 * 80_000, "adapter_host_bytes": 120 * 80_000, "store_max_bytes": 200 * 80_000,
}  # fmt: skip


class Soak:
    """One run: a server, its names, and clients that work in rounds; between rounds all is at rest and looked at."""

    def __init__(self, server: RandomServer, work: Path, client: httpx.AsyncClient, flags: argparse.Namespace) -> None:
        self._flags, self._client, self.tally = flags, client, Tally()
        self.orders = Orders(client, work / "adapters", self.tally)
        self._requests = Requests(client, make_prompts(flags.seed), self.tally)
        self._watch = Watch(client, server.pid, [work / "store" / "staging", *(work / "store" / "registry").glob("model-*/staging")])
        self._names = [Name(f"adapter-{index}", published=index % 2 == 0) for index in range(flags.adapters)]
        self._popularity = Popularity(random.Random(flags.seed).sample(self._names, len(self._names)))

    async def run(self) -> dict[str, Any]:
        """The result."""
        flags, looks = self._flags, []
        started_at = time.monotonic()
        await asyncio.gather(*(self._create(index) for index in range(flags.clients)))
        for number in range(flags.rounds):
            jobs = iter(range(flags.requests * number // flags.rounds, flags.requests * (number + 1) // flags.rounds))
            await asyncio.gather(*(self._work(jobs) for _ in range(flags.clients)))
            looks.append(await self._watch.look(flags.requests * (number + 1) // flags.rounds))
            self._report(number, looks[-1].resident_bytes, time.monotonic() - started_at)
        counters = await self._watch.metrics()
        for name in self._names:
            await self.orders.remove(name)
        await self._notice_removal()
        empty = await self._watch.look(flags.requests)
        return {
            "seconds": round(time.monotonic() - started_at, 1),
            "requests": flags.requests, "adapters": flags.adapters, "contents": self.orders.num_contents, "done": dict(self.tally.done),
            "preemptions": int(counters["manylora_preemptions_total"]), "steps": int(counters["manylora_engine_steps_total"]),
            "cached_tokens": int(counters["manylora_cached_prompt_tokens_total"]),
            "wrong": self.tally.num_wrong, "lost": self.tally.num_lost, "leaked": leaked(looks, empty),
            "growth_bytes": memory_growth(looks), "looks": as_rows([*looks, empty]), "examples": self.tally.examples,
        }  # fmt: skip

    async def _create(self, index: int) -> None:
        for name in self._names[index :: self._flags.clients]:
            await self.orders.create(name)

    async def _work(self, jobs: Any) -> None:
        """One client: takes the next request as soon as its last one has ended, and now and then changes a name first."""
        for job in jobs:
            rng = random.Random(f"{self._flags.seed} {job}")
            if rng.random() < _ORDERS:
                await self.orders.change(self._popularity.choose(rng), rng)
            await self._requests.ask(None if rng.random() < _BASE else self._popularity.choose(rng), rng)

    async def _notice_removal(self) -> None:
        """A folder that is gone is noticed when it is asked for: its memory is freed then."""
        for name in self._names:
            if not name.published:
                await self._requests.ask(name, random.Random(0))

    def _report(self, number: int, resident_bytes: dict[str, int], seconds: float) -> None:
        memory = ", ".join(f"{name} {num_bytes >> 20} MB" for name, num_bytes in resident_bytes.items())
        print(
            f"round {number + 1}/{self._flags.rounds} after {seconds:.0f} s: {self.orders.num_contents} contents made, "
            f"wrong {self.tally.num_wrong}, lost {self.tally.num_lost}; {memory}", flush=True,
        )  # fmt: skip


def measure(flags: argparse.Namespace, work: Path) -> dict[str, Any]:
    """A server from its start to its end, and the run between."""
    for folder in ("adapters", "store"):
        (work / folder).mkdir()
    log, environment = work / "server.log", {"MANYLORA_ADMIN_KEY": ADMIN_KEY}
    with RandomServer(write_model(work, MODEL), work / "adapters", work / "store", log, OPTIONS, **environment) as server:
        server.wait_healthy(time.monotonic() + 300)

        async def run() -> dict[str, Any]:
            headers, limits = {"authorization": f"Bearer {ADMIN_KEY}"}, httpx.Limits(max_connections=flags.clients + 4)
            async with httpx.AsyncClient(base_url=server.url, headers=headers, limits=limits, timeout=120) as client:
                return await Soak(server, work, client, flags).run()

        result = asyncio.run(run())
        result["exit_status"] = server.stop()
    if flags.keep_log:
        flags.keep_log.write_bytes(log.read_bytes())
    return result


def is_clean(result: dict[str, Any]) -> bool:
    """Nothing wrong, nothing lost, nothing leaked, and an end as it should be."""
    return not (result["wrong"] or result["lost"] or any(result["leaked"].values()) or result["exit_status"])


def save(result: dict[str, Any]) -> Path:
    """Keep the result under the day and the commit that it was measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip() or "unknown"
    day = datetime.now(UTC).date().isoformat()
    path = ROOT / "benchmarks" / "results" / f"{day}-soak-{commit}.json"
    path.write_text(json.dumps(result | {"commit": commit, "day": day}, indent=1) + "\n")
    return path


def main(argv: Sequence[str]) -> int:
    """Run, print, and say by the exit status whether all is zero."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--adapters", type=int, default=300)
    parser.add_argument("--clients", type=int, default=24, help="requests that are open at a time")
    parser.add_argument("--rounds", type=int, default=20, help="times that all is let come to rest and looked at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-log", type=Path, help="copy the server's log there")
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results")
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="soak-") as work:
        result = measure(flags, Path(work))
    result |= {"benchmark": "soak", "seed": flags.seed, "clients": flags.clients, "machine": _machine()}
    if flags.save:
        print(f"saved {save(result).name}")
    print(f"{result['requests']} requests over {result['adapters']} adapters ({result['contents']} contents) in {result['seconds']} s")
    print(f"wrong {result['wrong']}, lost {result['lost']}, leaked " + ", ".join(f"{n} {name}" for name, n in result["leaked"].items()))
    print(json.dumps({name: value for name, value in result.items() if name != "looks"}))
    return 0 if is_clean(result) else 1


def _machine() -> dict[str, Any]:
    return {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))

"""What the server holds while nothing runs: blocks, sequences, adapters' bytes, descriptors, threads, memory, files under way.

Owns the looking and the rules of what is a leak. Two looks are compared that were both taken at rest; memory is judged by its trend over
many, since allocators and bounded caches fill up at first.
"""

import asyncio
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil

# What a process may grow by without it being called a leak, over the judged looks: caches of names, hashes and metrics are bounded by
# thousands of entries, and are not full yet after so many requests.
ALLOWED_GROWTH_BYTES = 16 << 20
WARM_UP_REQUESTS = 4000  # until then allocators and caches fill up
_AT_REST = ("manylora_sequences_in_flight", "manylora_tokens_held", "manylora_kv_blocks_used")
_REST_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Look:
    """What is held at rest. Descriptors, threads and resident bytes by process."""

    requests: int  # made before
    blocks: int
    sequences: int
    adapters: int  # in the tiers
    adapter_bytes: int
    descriptors: dict[str, int]
    threads: dict[str, int]  # pools fill up as they are needed: shown, not judged
    resident_bytes: dict[str, int]
    staged: int  # files and folders of work under way, in the store and the registry


class Watch:
    """Looks at one server: its process `pid`, its engine's, its metrics, its folders."""

    def __init__(self, client: httpx.AsyncClient, pid: int, folders: list[Path]) -> None:
        self._client, self._pid, self._folders = client, pid, folders

    async def metrics(self) -> dict[str, float]:
        """Unlabelled series by name."""
        text = (await self._client.get("/metrics")).text
        lines = (line.split() for line in text.splitlines() if not line.startswith("#") and "{" not in line)
        return {name: float(value) for name, value, *_ in lines}

    async def look(self, requests: int) -> Look:
        """Once nothing runs, or after a minute what is then still held. `requests`: made so far."""
        seen = await self._rest()
        processes = self._processes()
        return Look(
            requests=requests,
            blocks=int(seen["manylora_kv_blocks_used"]),
            sequences=int(seen["manylora_sequences_in_flight"]),
            adapters=int(seen["manylora_adapters_device"] + seen["manylora_adapters_host"]),
            adapter_bytes=int(seen["manylora_adapter_bytes_device"] + seen["manylora_adapter_bytes_host"]),
            descriptors={name: held_descriptors(process) for name, process in processes.items()},
            threads={name: process.num_threads() for name, process in processes.items()},
            resident_bytes={name: process.memory_info().rss for name, process in processes.items()},
            staged=sum(1 for folder in self._folders for _ in folder.iterdir()),
        )

    async def _rest(self) -> dict[str, float]:
        """The metrics once they say that nothing runs; the engine's are half a second old, so two of them must say so."""
        give_up_at = asyncio.get_running_loop().time() + _REST_TIMEOUT_S
        num_still = 0
        while True:
            seen = await self.metrics()
            num_still = num_still + 1 if not any(seen[name] for name in _AT_REST) else 0
            if num_still == 2 or asyncio.get_running_loop().time() > give_up_at:
                return seen
            await asyncio.sleep(0.7)

    def _processes(self) -> dict[str, psutil.Process]:
        api = psutil.Process(self._pid)
        engines = [child for child in api.children() if "--options" in child.cmdline()]
        return {"api": api} | {f"engine{index}": child for index, child in enumerate(sorted(engines, key=lambda one: one.pid))}


def held_descriptors(process: psutil.Process) -> int:
    """Descriptors that a process holds by itself: without the open connections to its ports, which are their clients', who keep some for
    later."""
    connections = process.net_connections(kind="tcp")
    ports = {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}
    clients = [one for one in connections if one.status == psutil.CONN_ESTABLISHED and one.laddr.port in ports]
    return process.num_fds() - len(clients)


def leaked(looks: list[Look], empty: Look) -> dict[str, int]:
    """What was not given back. `looks`: at rest, one a round; `empty`: at rest, after every name was removed."""
    first, last = looks[0], looks[-1]

    def grown(one: dict[str, int], other: dict[str, int]) -> int:
        return sum(max(0, other[name] - one.get(name, 0)) for name in other)

    return {
        "bytes": empty.adapter_bytes + sum(max(0, growth - ALLOWED_GROWTH_BYTES) for growth in memory_growth(looks).values()),
        "descriptors": grown(first.descriptors, last.descriptors),
        "blocks": sum(look.blocks for look in (*looks, empty)),
        "sequences": sum(look.sequences for look in (*looks, empty)),
        "adapters": empty.adapters,
        "staged": empty.staged,
    }


def memory_growth(looks: list[Look]) -> dict[str, int]:
    """Resident bytes that each process gained over the looks after the warm-up, by their trend; none where there are too few."""
    judged = [look for look in looks if look.requests >= WARM_UP_REQUESTS]
    if len(judged) < 4:
        return {}
    growth = {}
    for name in judged[0].resident_bytes:
        slope = statistics.linear_regression(range(len(judged)), [look.resident_bytes.get(name, 0) for look in judged]).slope
        growth[name] = int(slope * (len(judged) - 1))
    return growth


def as_rows(looks: list[Look]) -> list[dict]:
    """For the result's file."""
    return [asdict(look) for look in looks]

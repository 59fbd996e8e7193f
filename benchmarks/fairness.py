"""`python -m benchmarks.fairness`: the scheduler as it is, and with two other orders, against arrivals that are not fair.

Scheduler, KV blocks and adapter tiers are the product's; clock, step and reads are modelled, so it says who waits for whom, not how fast
a GPU is. A step takes what was measured on an H100 with Mistral-7B's shape (LOG.md, 2026-11-23): 6.4 ms and 18 us a row on the base, 7 us
for each adapter of rank 8 on q and v, and 25 us a prompt token (14.5 GFLOP at 585 TFLOP/s). That each of two readers takes 10 ms an adapter
is assumed. All orders load adapters beside the steps; vLLM does so within them, which its rows here do not pay for. The last line of the
output is JSON.
"""

import heapq
import random
import statistics
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

from benchmarks.fairness_orders import ORDERS
from benchmarks.simulation import end, read_flags
from server.engine.chunk import Chunk
from server.engine.fairness import OUTPUT_PRICE, PROMPT_PRICE
from server.engine.scheduler import Scheduler
from server.engine.waiting import WaitingQueue
from server.memory.blocks import BlockPool
from server.memory.tier import Carrier
from server.memory.tiers import AdapterTiers
from server.types import AdapterRef, EngineRequest, SamplingParams
from sizing.printing import run_tool


@dataclass(frozen=True, slots=True)
class Machine:
    """What is modelled. Seconds, tokens, adapters."""

    step_s: float = 0.0064
    row_s: float = 0.000018
    adapter_s: float = 0.000007
    prompt_token_s: float = 0.000025
    read_s: float = 0.010
    num_readers: int = 2
    max_batch_size: int = 64
    max_batch_tokens: int = 2048
    num_blocks: int = 2400  # of 16 tokens

    def seconds(self, chunks: list[Chunk]) -> float:
        """Of a step."""
        adapters = {chunk.sequence.adapter_hash for chunk in chunks} - {""}
        num_prompt = sum(chunk.num_tokens for chunk in chunks if chunk.num_tokens > 1)
        return self.step_s + self.row_s * len(chunks) + self.adapter_s * len(adapters) + self.prompt_token_s * num_prompt


@dataclass(frozen=True, slots=True)
class Traffic:
    """`load`: work that comes, over what the machine can do with full batches. `cv`: of the gaps between arrivals, 1 is Poisson.
    An adapter belongs to a tenant; those of a tenant are asked for by Zipf's law (1.0)."""

    name: str
    load: float
    cv: float = 1.0
    num_tenants: int = 20
    num_adapters: int = 200
    room: int = 48  # adapters on the device at once: vLLM's max_loras
    noisy: float = 1.0  # the first tenant's requests, in those of any other
    hot: float = 0.0  # share of requests that are for the first adapters of all, as many as there is room for
    duration_s: float = 60.0
    mean_prompt_len: int = 256
    mean_output_len: int = 128


TRAFFIC = (
    Traffic("Poisson", 0.8),
    Traffic("bursts, cv 4", 0.8, cv=4.0),
    Traffic("one tenant at ten times the load", 1.3, noisy=10.0),
    Traffic("ten times the load, in bursts", 1.3, cv=4.0, noisy=10.0),
    Traffic("four hot adapters that never pause", 1.2, hot=0.97, room=4),
    Traffic("room for a quarter of the adapters that would run", 0.8, room=12),
)
FIRST_TOKEN_LIMIT_S = 6.0  # S-LoRA's


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request, and when it comes."""

    at: float
    tenant: int
    adapter: int
    prompt_len: int
    output_len: int

    @property
    def work(self) -> float:
        """As the fair order charges it."""
        return PROMPT_PRICE * self.prompt_len + OUTPUT_PRICE * self.output_len


def arrivals(traffic: Traffic, machine: Machine, seed: int) -> Iterator[Arrival]:
    """In order of arrival; the same for the same seed."""
    rng = random.Random(f"{seed} {traffic.name}")
    a_step_s = machine.step_s + machine.row_s * machine.max_batch_size + machine.adapter_s * traffic.room
    request_s = a_step_s * traffic.mean_output_len / machine.max_batch_size + machine.prompt_token_s * traffic.mean_prompt_len
    gap_s, shape = request_s / traffic.load, 1.0 / traffic.cv**2
    tenants = [traffic.noisy, *([1.0] * (traffic.num_tenants - 1))]
    each = traffic.num_adapters // traffic.num_tenants
    ranks = list(accumulate(1.0 / (rank + 1) for rank in range(each)))
    now = 0.0
    while (now := now + rng.gammavariate(shape, gap_s / shape)) < traffic.duration_s:
        if rng.random() < traffic.hot:
            adapter = rng.randrange(traffic.room)
            tenant = adapter % traffic.num_tenants
        else:
            tenant = rng.choices(range(traffic.num_tenants), tenants)[0]
            adapter = tenant + traffic.num_tenants * rng.choices(range(each), cum_weights=ranks)[0]
        lengths = (min(int(rng.expovariate(1 / mean)) + 1, 8 * mean) for mean in (traffic.mean_prompt_len, traffic.mean_output_len))
        yield Arrival(now, tenant, adapter, *lengths)


class Clock:
    """Modelled seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ModelledReaders:
    """server.memory.readers by the modelled clock."""

    is_late = False

    def __init__(self, read_one: Callable[[AdapterRef], Any], num_readers: int, clock: Clock, read_s: float) -> None:
        self._read_one, self._num_readers, self._clock, self._read_s = read_one, num_readers, clock, read_s
        self._reading: list[tuple[float, str, AdapterRef]] = []
        self.arrived = threading.Event()

    @property
    def has_idle(self) -> bool:
        """Whether a read would start at once."""
        return len(self._reading) < self._num_readers

    @property
    def next_at(self) -> float | None:
        """When the next read ends."""
        return self._reading[0][0] if self._reading else None

    def read(self, ref: AdapterRef) -> None:
        """Ask for an adapter."""
        heapq.heappush(self._reading, (self._clock.now + self._read_s, ref.hash, ref))

    def take(self) -> list[tuple[AdapterRef, Any, float, None]]:
        """What was read by now."""
        done = []
        while self._reading and self._reading[0][0] <= self._clock.now:
            ref = heapq.heappop(self._reading)[2]
            done.append((ref, self._read_one(ref), self._read_s, None))
        return done

    def close(self) -> None:
        """Nothing runs."""


@dataclass(slots=True)
class Run:
    """What came of it: of each arrival, when it had its first token; of each tenant, the work done for it while requests came."""

    first_token_at: dict[int, float]
    done: dict[int, float]
    ended_at: float


def play(requests: list[Arrival], order: WaitingQueue, machine: Machine, room: int) -> Run:
    """All requests to their ends. `room`: adapters that the device holds."""
    clock, made = Clock(), []

    def make_readers(read_one: Callable[[AdapterRef], Any], num_readers: int) -> Any:
        made.append(ModelledReaders(read_one, num_readers, clock, machine.read_s))
        return made[0]

    carrier = Carrier(lambda ref: SimpleNamespace(bytes=1), lambda host: host)
    tiers = AdapterTiers(carrier, 1 << 30, room, num_readers=machine.num_readers, readers=make_readers)
    limits = {"max_batch_tokens": machine.max_batch_tokens, "max_batch_size": machine.max_batch_size}
    pool = BlockPool(machine.num_blocks, 16)
    scheduler = Scheduler(pool, tiers, **limits, prefix_caching=False, queue=order, clock=clock)
    run, last_arrival, coming = Run({}, defaultdict(float), 0.0), requests[-1].at, 0
    while coming < len(requests) or scheduler.sequences:
        while coming < len(requests) and requests[coming].at <= clock.now:
            scheduler.add(_request(coming, requests[coming]))
            coming += 1
        scheduler.collect_failed()
        chunks = scheduler.schedule()
        if not chunks:
            following = [at for at in (made[0].next_at, requests[coming].at if coming < len(requests) else None) if at is not None]
            if not following:
                raise RuntimeError(f"{scheduler.num_waiting} wait, and nothing will happen")
            clock.now = max(clock.now, min(following))
            continue
        clock.now += machine.seconds(chunks)
        for chunk in chunks:
            _advance(scheduler, chunk, run, clock.now, counts=clock.now <= last_arrival)
    run.ended_at = clock.now
    return run


def _request(index: int, arrival: Arrival) -> EngineRequest:
    name = f"adapter {arrival.adapter}"
    params = SamplingParams(max_new_tokens=arrival.output_len)
    return EngineRequest(str(index), [0] * arrival.prompt_len, params, AdapterRef(name, "", name), tenant=str(arrival.tenant))


def _advance(scheduler: Scheduler, chunk: Chunk, run: Run, now: float, *, counts: bool) -> None:
    sequence = chunk.sequence
    if counts:
        price = OUTPUT_PRICE * chunk.samples + PROMPT_PRICE * (chunk.num_tokens if sequence.num_computed < sequence.prompt_len else 0)
        run.done[int(sequence.request.tenant)] += price
    scheduler.advance(chunk)
    if chunk.samples:
        sequence.learn(1)
        run.first_token_at.setdefault(int(sequence.request.request_id), now)
    if sequence.is_ending:
        scheduler.remove(sequence.request.request_id)


def fair_shares(demands: list[float], total: float) -> list[float]:
    """`total` divided max-min fairly: nobody has more than it asks for, and who has less than another has all that it asks for."""
    shares = [0.0] * len(demands)
    for place, index in enumerate(sorted(range(len(demands)), key=demands.__getitem__)):
        shares[index] = min(demands[index], total / (len(demands) - place))
        total -= shares[index]
    return shares


def jain(values: list[float]) -> float:
    """Jain's index: 1 if all are equal, 1/n if one has all."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def describe(requests: list[Arrival], run: Run, traffic: Traffic) -> dict[str, float]:
    """The figures of a run. Waits are from arrival to the first token."""
    waits = [run.first_token_at[index] - request.at for index, request in enumerate(requests)]
    demands = [sum(request.work for request in requests if request.tenant == tenant) for tenant in range(traffic.num_tenants)]
    shares = fair_shares(demands, sum(run.done.values()))
    asked = Counter(request.adapter for request in requests)
    coldest = {adapter for adapter, count in asked.items() if count == min(asked.values())}
    quiet = [wait for wait, request in zip(waits, requests, strict=True) if request.tenant or traffic.noisy == 1.0]
    good = sum(request.output_len for wait, request in zip(waits, requests, strict=True) if wait <= FIRST_TOKEN_LIMIT_S)
    return {
        "jain": jain([run.done.get(tenant, 0.0) / shares[tenant] for tenant in range(traffic.num_tenants) if shares[tenant]]),
        "coldest_wait_s": max(wait for wait, request in zip(waits, requests, strict=True) if request.adapter in coldest),
        "longest_wait_s": max(waits),
        "quiet_p99_s": statistics.quantiles(quiet, n=100)[98],
        "goodput": good / traffic.duration_s,
        "tokens_s": sum(request.output_len for request in requests) / run.ended_at,
    }


def compare(traffic: Traffic, machine: Machine, seed: int) -> list[dict[str, Any]]:
    """A row for each order; prints them."""
    requests, rows = list(arrivals(traffic, machine, seed)), []
    print(f"{traffic.name}: {len(requests)} requests in {traffic.duration_s:.0f} s")
    for name, order in ORDERS.items():
        row = describe(requests, play(requests, order(), machine, traffic.room), traffic)
        rows.append({"traffic": traffic.name, "order": name, "num_requests": len(requests)} | {k: round(v, 3) for k, v in row.items()})
        print(f"{name:>18}: " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
    return rows


def main() -> None:
    """All traffic with all orders; then JSON."""
    flags, machine = read_flags("fairness", __doc__, seed_help="other arrivals"), Machine()
    rows = [row for traffic in TRAFFIC for row in compare(traffic, machine, flags.seed)]
    result = {
        "machine": asdict(machine),
        "traffic": [asdict(traffic) for traffic in TRAFFIC],
        "first_token_limit_s": FIRST_TOKEN_LIMIT_S,
        "rows": rows,
    }
    end("fairness", flags, result)


if __name__ == "__main__":
    sys.exit(run_tool(main))

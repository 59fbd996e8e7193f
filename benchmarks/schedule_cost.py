"""`python -m benchmarks.schedule_cost`: what the scheduler costs the host in a step, beside the 6 to 11 ms of a step on an H100.

256 rows run; 2,000 sequences wait over 1,000 adapters and 100 tenants (Zipf). Two rows end in a step and as many requests come. The model
is a rule (its token is always 1). The last line of the output is JSON.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import time
from types import SimpleNamespace

from server.engine.scheduler import Scheduler
from server.memory.blocks import BlockPool
from server.memory.tier import Carrier
from server.memory.tiers import AdapterTiers
from server.types import AdapterRef, EngineRequest, SamplingParams
from sizing.printing import run_tool

NUM_RUNNING, NUM_WAITING, NUM_ADAPTERS, NUM_TENANTS = 256, 2000, 1000, 100


class Load:
    """Keeps `NUM_WAITING` sequences queued."""

    def __init__(self, room: int, *, one_tenant: bool) -> None:
        """`room`: adapters that the device holds. `one_tenant`: of the base alone."""
        self._rng = random.Random(0)
        self._weights = [1 / (rank + 1) for rank in range(NUM_ADAPTERS)]
        self._one_tenant = one_tenant
        tiers = AdapterTiers(Carrier(lambda ref: SimpleNamespace(bytes=1), lambda host: host), NUM_ADAPTERS, room)
        self.scheduler = Scheduler(BlockPool(40_000, 16), tiers, max_batch_tokens=4096, max_batch_size=NUM_RUNNING)
        self._num_made = 0

    def fill(self) -> None:
        """New requests in place of those that ended."""
        rng, scheduler = self._rng, self.scheduler
        while len(scheduler.sequences) < NUM_RUNNING + NUM_WAITING:
            self._num_made += 1
            params = SamplingParams(max_new_tokens=rng.randrange(64, 192))
            tokens = [rng.randrange(30_000) for _ in range(128)]
            if self._one_tenant:
                scheduler.add(EngineRequest(str(self._num_made), tokens, params))
                continue
            name = str(rng.choices(range(NUM_ADAPTERS), self._weights)[0])
            ref = AdapterRef(name, "", name)
            scheduler.add(EngineRequest(str(self._num_made), tokens, params, ref, tenant=str(rng.randrange(NUM_TENANTS))))

    def step(self) -> tuple[float, float, int]:
        """Seconds of `schedule`, seconds of all of the scheduler's work in the step, rows."""
        scheduler, clock = self.scheduler, time.thread_time  # what others do on the machine is no part of it
        began_at = clock()
        scheduler.collect_failed()
        before = clock()
        chunks = scheduler.schedule()
        scheduled_s = clock() - before
        for chunk in chunks:
            scheduler.advance(chunk)
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.samples:
                sequence.learn(1)
            scheduler.publish(sequence)
            if sequence.is_ending:
                scheduler.remove(sequence.request.request_id)
        return scheduled_s, clock() - began_at, len(chunks)


def measure(room: int, *, one_tenant: bool, num_steps: int) -> dict[str, float]:
    """Microseconds a step, medians and the worst one in a hundred."""
    load = Load(room, one_tenant=one_tenant)
    times: list[tuple[float, float, int]] = []
    gc.collect()
    gc.freeze()  # as the engine does once it is warm
    for index in range(num_steps + 300):
        load.fill()
        if index == 0:
            deadline = time.monotonic() + 60
            while load.scheduler.tiers.host.count < load.scheduler.num_waiting and time.monotonic() < deadline and not one_tenant:
                load.scheduler.tiers.arrived.wait(0.01)
                load.scheduler.collect_failed()
                if not load.scheduler._parked:
                    break
        times.append(load.step())
    load.scheduler.tiers.close()
    schedule_us, all_us = ([round(1e6 * row[column], 1) for row in times[300:]] for column in (0, 1))
    return {
        "schedule_us": statistics.median(schedule_us),
        "schedule_p99_us": statistics.quantiles(schedule_us, n=100)[98],
        "all_us": statistics.median(all_us),
        "rows": statistics.fmean(row[2] for row in times[300:]),
    }


def main() -> None:
    """Three loads; then JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedule_cost", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    flags = parser.parse_args()
    loads = {"base alone": (1, True), "room for all adapters": (NUM_ADAPTERS, False), "room for 64 adapters": (64, False)}
    rows = {}
    for name, (room, one_tenant) in loads.items():
        rows[name] = measure(room, one_tenant=one_tenant, num_steps=flags.steps)
        print(f"{name:>22}: " + "  ".join(f"{key} {value:.0f}" for key, value in rows[name].items()), flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    sys.exit(run_tool(main))

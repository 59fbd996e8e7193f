"""Schedulers without a model, threads or a clock of their own: time is what the test says, an adapter is read when it is asked for."""

import threading
from types import SimpleNamespace

from server.engine.scheduler import Scheduler
from server.memory.blocks import BlockPool
from server.memory.tier import Carrier
from server.memory.tiers import AdapterTiers
from server.types import AdapterRef, EngineRequest, SamplingParams


class Clock:
    """Seconds that pass when the test lets them."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class InstantReaders:
    """Reads at once, in the caller's thread."""

    has_idle, is_late = True, False

    def __init__(self, read_one, num_threads):
        self._read_one, self._done = read_one, []
        self.arrived = threading.Event()

    def read(self, ref):
        try:
            self._done.append((ref, self._read_one(ref), 0.0, None))
        except Exception as error:
            self._done.append((ref, None, 0.0, error))
        self.arrived.set()

    def take(self):
        done, self._done = self._done, []
        return done

    def close(self):
        pass


class World:
    """A scheduler and its model, which always says 1. A step takes `step_s`."""

    def __init__(self, num_blocks=64, block_size=4, device_bytes=100, step_s=0.01, max_batch_tokens=64, max_batch_size=8, **options):
        self.clock, self.step_s = Clock(), step_s
        carrier = Carrier(lambda ref: SimpleNamespace(bytes=int(ref.path)), lambda host: host)
        self.tiers = AdapterTiers(carrier, 10**9, device_bytes, readers=InstantReaders)
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(
            self.pool, self.tiers, max_batch_tokens=max_batch_tokens, max_batch_size=max_batch_size, clock=self.clock, **options
        )
        self.finished, self.failed, self.started = [], [], []
        self._num_requests = 0

    def add(self, tenant="", adapter=None, prompt_len=5, max_new=4, size=10, weight=1.0, name=None):
        """Queue a request of its own prompt; its name."""
        self._num_requests += 1
        name = name or str(self._num_requests)
        ref = AdapterRef(adapter, str(size), adapter) if adapter else None
        tokens = [self._num_requests % 1000, *range(prompt_len - 1)]
        request = EngineRequest(name, tokens, SamplingParams(max_new_tokens=max_new), ref, tenant=tenant, weight=weight)
        self.scheduler.add(request)
        return name

    def step(self):
        """{request: tokens} of one step."""
        scheduler = self.scheduler
        self.failed += scheduler.collect_failed()
        before = set(scheduler.running)
        chunks = scheduler.schedule()
        self.started += [chunk.sequence for chunk in chunks if chunk.sequence not in before]
        for chunk in chunks:
            scheduler.advance(chunk)
            if chunk.samples:
                chunk.sequence.learn(1)
            scheduler.publish(chunk.sequence)
            if chunk.sequence.is_ending:
                scheduler.remove(chunk.sequence.request.request_id)
                self.finished.append(chunk.sequence)
        self.clock.now += self.step_s
        return {chunk.sequence.request.request_id: chunk.num_tokens for chunk in chunks}

    def run(self, max_steps=10_000):
        """Step until nothing is left."""
        for _ in range(max_steps):
            if not self.scheduler.sequences:
                return
            self.step()
        raise AssertionError(f"{len(self.scheduler.sequences)} sequences are left after {max_steps} steps")

    @property
    def service(self):
        """{tenant: prompt and output tokens, as they are charged} of all that has started, without what the prefix cache gave."""
        total = {}
        for sequence in {*self.finished, *self.scheduler.sequences.values()}:
            tenant = sequence.request.tenant
            total[tenant] = total.get(tenant, 0.0) + sequence.num_charged - sequence.num_cached + 2 * sequence.num_outputs
        return total


def names(sequences):
    """Their requests' names, in this order."""
    return [sequence.request.request_id for sequence in sequences]

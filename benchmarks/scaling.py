"""`python -m benchmarks.scaling`: a day of bursty traffic against the fleet's scaling policy, with the server's signal and with two others.

A model, no measurement: it says which signal follows such traffic, not how fast an instance is. Every signal drives the same target
tracking (as Auto Scaling documents it) and is given several targets; the cheapest one that keeps the wait is what is compared, and what it
would be with a target that is a tenth too high. The last line of the output is JSON. docs/scaling.md says what came of it.
"""

import heapq
import math
import random
import statistics
import sys
import tomllib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.simulation import end, read_flags
from sizing.instances import INSTANCES
from sizing.printing import run_tool

ROOT = Path(__file__).parent.parent
DAY_S = 24 * 3600
PERIOD_S, MOST_LOAD = 10, 2.0  # of infra.scaling's policy
WAIT_LIMIT_S = 5.0  # the p95 wait that a target must keep to be compared by its cost


@dataclass(frozen=True, slots=True)
class Machine:
    """One instance, an 8B model in bf16 on an L4: a step reads all weights (300 GB/s), and each sequence adds a little."""

    step_s: float = 0.056  # 16.8 GB over 300 GB/s
    step_per_sequence_s: float = 0.0006
    max_batch: int = 64
    max_tokens: int = 36_000  # KV cache: 22 GiB less weights and activations, 128 KiB a token
    prompt_weight: float = 1 / 24  # work of a prompt's token, in decoded tokens of a full batch
    boot_s: float = 775.0


@dataclass(frozen=True, slots=True)
class Request:
    """Arrival in seconds, lengths in tokens."""

    at: float
    prompt_len: int
    output_len: int


def traffic(seed: int, *, duration_s: int = DAY_S, peak_rate: float = 5.0) -> Iterator[Request]:
    """Requests in order of arrival: a working day's curve, bursts of two to four times the rate for 4 to 15 minutes, and from 22 h to 6 h
    another kind of work: few requests with long prompts and long answers."""
    rng = random.Random(seed)
    bursts = [(rng.uniform(0, DAY_S), rng.uniform(240, 900), rng.uniform(2, 4)) for _ in range(14)]
    for second in range(duration_s):
        hour = second / 3600
        is_night = hour < 6 or hour >= 22
        rate = 0.8 if is_night else peak_rate * (0.15 + 0.85 * math.sin(math.pi * (hour - 6) / 16) ** 2)
        rate *= max([factor for start, length, factor in bursts if start <= second < start + length], default=1.0)
        prompt, output = (1500, 500) if is_night else (350, 130)
        for at in sorted(rng.random() for _ in range(_poisson(rng, rate))):
            prompt_len = min(int(rng.lognormvariate(math.log(prompt), 0.8)) + 1, 6000)
            yield Request(second + at, prompt_len, min(int(rng.lognormvariate(math.log(output), 0.7)) + 1, 2000))


class Instance:
    """Sequences share it evenly: `served` counts what each running one was given, so that one number moves them all."""

    def __init__(self, machine: Machine, ready_at: float) -> None:
        self.machine, self.ready_at, self.leaving = machine, ready_at, False
        self.queue: deque[Request] = deque()
        self._running: list[tuple[float, int, int, float]] = []  # (served at the end, tie, prompt tokens, served at the start)
        self._served, self._tie, self._prompts, self._starts, self._queued = 0.0, 0, 0, 0.0, 0

    @property
    def num_open(self) -> int:
        """Requests running and queued."""
        return len(self._running) + len(self.queue)

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    def add(self, request: Request) -> None:
        """Take a request into the queue."""
        self.queue.append(request)
        self._queued += request.prompt_len

    def run(self, now: float) -> list[float]:
        """One second; the waits of those that began in it."""
        if self._running:
            machine = self.machine
            self._served += 1.0 / (machine.step_s + machine.step_per_sequence_s * len(self._running))
        while self._running and self._running[0][0] <= self._served:
            _, _, prompt_len, start = heapq.heappop(self._running)
            self._prompts, self._starts = self._prompts - prompt_len, self._starts - start
        waits = []
        while self.queue and len(self._running) < self.machine.max_batch:
            request = self.queue[0]
            if self._running and self._tokens() + request.prompt_len > self.machine.max_tokens:
                break
            self.queue.popleft()
            self._tie += 1
            work = request.output_len + request.prompt_len * self.machine.prompt_weight
            heapq.heappush(self._running, (self._served + work, self._tie, request.prompt_len, self._served))
            self._prompts, self._starts = self._prompts + request.prompt_len, self._starts + self._served
            self._queued -= request.prompt_len
            waits.append(max(now - request.at, 0.0))
        return waits

    def _tokens(self) -> float:
        return self._prompts + len(self._running) * self._served - self._starts

    def load_ratio(self) -> float:
        """As server.metrics.load_ratio."""
        return max((self._tokens() + self._queued) / self.machine.max_tokens, self.num_open / self.machine.max_batch)

    def cpu_percent(self) -> float:
        """Of four cores: the engine's loop keeps one busy whenever anything runs, and the API grows with the tokens that it sends."""
        share = self.num_running / self.machine.max_batch
        return 4.0 + (25.0 if self._running else 0.0) + 14.0 * share


class TargetTracking:
    """Amazon EC2 Auto Scaling's user guide, "Target tracking scaling policies": out after three periods above the target, in after 15
    minutes below nine tenths of it; instances that warm up count as capacity and not in the metric."""

    def __init__(self, target: float, period_s: int, *, min_size: int, max_size: int) -> None:
        self.target, self.period_s, self._min, self._max = target, period_s, min_size, max_size
        self._values: deque[float] = deque(maxlen=max(3, 900 // period_s))

    def decide(self, value: float, num_serving: int, num_wanted: int) -> int:
        """Called each period with the average over the serving instances; the new capacity."""
        self._values.append(value)
        recent = list(self._values)
        if len(recent) >= 3 and min(recent[-3:]) > self.target:
            return max(num_wanted, min(math.ceil(num_serving * value / self.target), self._max))
        is_full = len(recent) == self._values.maxlen
        if is_full and max(recent) < 0.9 * self.target and num_wanted == num_serving:
            self._values.clear()
            return max(math.ceil(num_serving * value / self.target), self._min)
        return num_wanted


@dataclass(frozen=True, slots=True)
class Signal:
    """What a policy looks at. `of`: an instance's value, averaged over the period; None: the requests that it was sent in it. `most`: the
    policy takes a higher average for this."""

    name: str
    period_s: int
    targets: tuple[float, ...]
    of: Callable[[Instance], float] | None
    most: float = math.inf


SIGNALS = (
    Signal("LoadRatio", PERIOD_S, (0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), Instance.load_ratio, most=MOST_LOAD),
    Signal("CPU, %", 60, (30, 31, 32, 33, 34), Instance.cpu_percent),
    Signal("requests a minute", 60, (10, 15, 20, 25, 30, 45), None),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one run. Waits: seconds from arrival to the first step."""

    signal: str
    target: float
    p50_wait_s: float
    p95_wait_s: float
    p99_wait_s: float
    instance_hours: float
    most_instances: int
    num_requests: int


def simulate(signal: Signal, target: float, requests: list[Request], machine: Machine, *, max_size: int = 16) -> Outcome:
    """The requests against a fleet of one instance at first."""
    policy = TargetTracking(target, signal.period_s, min_size=1, max_size=max_size)
    fleet, wanted, seconds, most = [Instance(machine, 0.0)], 1, 0, 1
    waits: list[float] = []
    sent: dict[int, int] = {}
    sums: dict[int, float] = {}
    arrivals, now = deque(requests), 0
    while arrivals or any(instance.num_open for instance in fleet):
        serving = [instance for instance in fleet if instance.ready_at <= now and not instance.leaving]
        while arrivals and arrivals[0].at < now + 1:
            least = min(serving, key=lambda instance: instance.num_open)
            least.add(arrivals.popleft())
            sent[id(least)] = sent.get(id(least), 0) + 1
        for instance in fleet:
            waits += instance.run(now + 1)
        for instance in serving:
            if signal.of is not None:
                sums[id(instance)] = sums.get(id(instance), 0.0) + signal.of(instance)
        now += 1
        fleet = [instance for instance in fleet if not (instance.leaving and not instance.num_open)]
        seconds, most = seconds + len(fleet), max(most, len(fleet))
        if now % signal.period_s == 0:
            per_instance = (
                sent.get(id(instance), 0) if signal.of is None else sums[id(instance)] / signal.period_s for instance in serving
            )
            wanted = policy.decide(min(statistics.fmean(per_instance), signal.most), len(serving), wanted)
            sent, sums = {}, {}
            _resize(fleet, serving, wanted, machine, now)
    cuts = statistics.quantiles(waits, n=100, method="inclusive")
    return Outcome(signal.name, target, cuts[49], cuts[94], cuts[98], seconds / 3600, most, len(waits))


def _resize(fleet: list[Instance], serving: list[Instance], wanted: int, machine: Machine, now: int) -> None:
    num_here = sum(not instance.leaving for instance in fleet)
    for _ in range(wanted - num_here):
        fleet.append(Instance(machine, now + machine.boot_s))
    for instance in serving[: max(num_here - wanted, 0)]:  # the oldest: it drains, and is paid for until it has
        instance.leaving = True


def _poisson(rng: random.Random, mean: float) -> int:
    limit, product, count = math.exp(-mean), rng.random(), 0
    while product > limit:
        product, count = product * rng.random(), count + 1
    return count


def ways() -> dict[str, float]:
    """How a new instance comes to be -> seconds from the decision until it serves (projections, as in infra/boot-phases.toml)."""
    phases = tomllib.loads((ROOT / "infra" / "boot-phases.toml").read_text())["seconds"]
    plain = float(sum(phases.values()))
    return {"plain image": plain, "baked image": plain - phases["install"], "running warm pool": 30.0}


def best(outcomes: list[Outcome]) -> Outcome:
    """The cheapest that keeps the p95 wait; without one, the shortest wait."""
    kept = [outcome for outcome in outcomes if outcome.p95_wait_s <= WAIT_LIMIT_S]
    return min(kept, key=lambda outcome: outcome.instance_hours) if kept else min(outcomes, key=lambda outcome: outcome.p95_wait_s)


def compare(way: str, boot_s: float, requests: list[Request]) -> list[dict[str, object]]:
    """The chosen run of each signal; prints all."""
    machine, chosen = Machine(boot_s=boot_s), []
    print(f"{way}: {boot_s:.0f} s until a new instance serves")
    for signal in SIGNALS:
        outcomes = [simulate(signal, target, requests, machine) for target in signal.targets]
        least = best(outcomes)
        for outcome in outcomes:
            mark = "<" if outcome is least else ""
            waits = f"p50 {outcome.p50_wait_s:7.1f}  p95 {outcome.p95_wait_s:7.1f}  p99 {outcome.p99_wait_s:7.1f} s"
            print(f"{outcome.signal:>18} {outcome.target:>5}: {waits}  {outcome.instance_hours:6.1f} instance hours {mark}", flush=True)
        off = simulate(signal, 1.1 * least.target, requests, machine)
        row = {"way": way, "boot_s": boot_s, **asdict(least), "p95_wait_s_a_tenth_off": off.p95_wait_s}
        chosen.append({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
    return chosen


def main() -> None:
    """Every way and signal; then JSON."""
    flags = read_flags("scaling", __doc__, seed_help="another day")
    requests = list(traffic(flags.seed))
    rows = [row for way, boot_s in ways().items() for row in compare(way, boot_s, requests)]
    result = {
        "num_requests": len(requests),
        "machine": asdict(Machine()) | {"boot_s": None},
        "usd_per_hour": INSTANCES["g6.xlarge"].usd_per_hour,
        "wait_limit_s": WAIT_LIMIT_S,
        "rows": rows,
    }
    end("scaling", flags, result)


if __name__ == "__main__":
    sys.exit(run_tool(main))

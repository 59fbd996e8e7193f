"""Whether a model with its adapters and sequences fits an instance, on how many of its GPUs, what it makes there and what that costs.

Every GPU has an engine of its own with a whole copy of the base (there is no tensor parallelism), and sequences are shared out among them.
The planner (infra.plan) asks for one instance or for all; a configuration that does not fit is told the nearest that does.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sizing.errors import SizingError
from sizing.instances import INSTANCES, Instance
from sizing.memory import EngineLimits, EngineMemory, predict
from sizing.quantization import SCHEMES
from sizing.shape import ModelShape
from sizing.throughput import Throughput, throughput

ARTICLE_FACTOR = 1.5  # "Host concurrent LLMs with LoRAX" (AWS, 2025): GPU memory for model and adapters, cache included
_SMALLER = ("fp8", "int8", "int4")  # what is tried for a model that fits nowhere as it is


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What is to be there at once: `num_adapters` of `bytes_of_adapter`, and `concurrency` sequences with a prompt of `prompt_len` and an
    answer of `output_len` tokens."""

    num_adapters: int = 1
    bytes_of_adapter: int = 0
    concurrency: int = 1
    prompt_len: int = 256
    output_len: int = 128

    @property
    def context(self) -> int:
        """Tokens of a sequence at its end."""
        return self.prompt_len + self.output_len


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as it is to be run. `num_engines`: GPUs that are used at most, one engine each; None: all."""

    shape: ModelShape
    limits: EngineLimits
    scheme: str | None = None
    dtype: str = "bf16"
    num_engines: int | None = None

    def gpus_of(self, instance: Instance) -> int:
        """GPUs of an instance that have an engine."""
        return min(instance.num_gpus, self.num_engines or instance.num_gpus)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A model on an instance. `num_gpus`: the fewest of its GPUs that hold the demand; None: it does not fit, `reason` says why and
    `missing` how many bytes each GPU lacks. `memory` is one GPU's, `adapters` and `kv` what the demand takes of its arena; `sequences` run
    at once on one GPU beside the adapters; `speed` is one GPU's at its share of the demand, `full` with all those sequences."""

    instance: Instance
    num_gpus: int | None
    memory: EngineMemory
    adapters: int
    kv: int
    sequences: int
    missing: int
    reason: str
    speed: Throughput
    full: Throughput | None
    num_engines: int

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.num_gpus is not None

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second of the demand, on the fewest GPUs that hold it."""
        return self.speed.tokens_per_s * (self.num_gpus or 0)

    @property
    def full_tokens_per_s(self) -> float:
        """Output tokens a second with every GPU full."""
        return self.full.tokens_per_s * self.num_engines if self.full else 0.0

    @property
    def full_sequences(self) -> int:
        """Sequences that run at once on all GPUs."""
        return self.sequences * self.num_engines if self.fits else 0

    @property
    def usd_per_million(self) -> float | None:
        """USD for a million output tokens, with every GPU full all the time."""
        if self.instance.usd_per_hour is None or not self.full_tokens_per_s:
            return None
        return self.instance.usd_per_hour / (self.full_tokens_per_s * 3600) * 1e6

    def usd_per_adapter(self, num_adapters: int) -> float | None:
        """USD an hour that one adapter's share comes to."""
        return None if self.instance.usd_per_hour is None else self.instance.usd_per_hour / max(1, num_adapters)


def check_demand(model: Model, demand: Demand) -> None:
    """SizingError if the engine's options rule the demand out on any instance, naming what is over."""
    if demand.context > model.limits.max_sequence_len:
        tokens = f"{demand.prompt_len} + {demand.output_len} tokens"
        raise SizingError(f"prompt and output: {tokens} are more than max_total_tokens {model.limits.max_sequence_len}")
    for name in ("concurrency", "output_len", "prompt_len"):
        if getattr(demand, name) < 1:
            raise SizingError(f"{name} must be at least 1. Given: {getattr(demand, name)}")
    if demand.num_adapters < 0:
        raise SizingError(f"adapters must be at least 0. Given: {demand.num_adapters}")


def fit(model: Model, demand: Demand, instance: Instance) -> Fit:
    """The model on an instance; on the fewest of its GPUs that hold the demand."""
    memory = predict(model.shape, model.limits, instance.card.memory_bytes, instance.card.num_sms, scheme=model.scheme, dtype=model.dtype)
    engines = model.gpus_of(instance)
    num_gpus = next((count for count in range(1, engines + 1) if not _faults(memory, model, demand, count)), None)
    shared_by = num_gpus or engines
    missing, reason = max(_faults(memory, model, demand, shared_by), default=(0, ""))
    sequences = _sequences(memory, model, demand)
    for_adapters, for_tokens = _blocks(memory, model, demand, shared_by)
    return Fit(
        instance=instance,
        num_gpus=num_gpus,
        memory=memory,
        adapters=for_adapters * memory.block_bytes,
        kv=for_tokens * memory.block_bytes,
        sequences=sequences,
        missing=missing,
        reason=reason,
        speed=_speed(model, demand, instance, min(-(-demand.concurrency // shared_by), model.limits.max_batch_size)),
        full=_speed(model, demand, instance, sequences) if num_gpus else None,
        num_engines=engines,
    )


def _speed(model: Model, demand: Demand, instance: Instance, rows: int) -> Throughput:
    return throughput(
        model.shape,
        instance.card,
        rows=rows,
        prompt_len=demand.prompt_len,
        output_len=demand.output_len,
        num_adapters=demand.num_adapters,
        bytes_of_adapter=demand.bytes_of_adapter,
        scheme=model.scheme,
        dtype=model.dtype,
        kv_cache_dtype=model.limits.kv_cache_dtype,
    )


def _blocks(memory: EngineMemory, model: Model, demand: Demand, num_gpus: int) -> tuple[int, int]:
    """Blocks of one of `num_gpus` GPUs for every adapter, and for its share of the sequences; never fewer than one of the greatest length
    takes, without which the engine does not start."""
    rows = -(-demand.concurrency // num_gpus)
    longest = memory.blocks_of_sequence(model.limits.max_sequence_len)
    for_tokens = max(rows * memory.blocks_of_sequence(demand.context), longest)
    return demand.num_adapters * memory.blocks_of_adapter(demand.bytes_of_adapter), for_tokens


def _faults(memory: EngineMemory, model: Model, demand: Demand, num_gpus: int) -> list[tuple[int, str]]:
    """(bytes that are missing, why it does not fit) on one of `num_gpus` GPUs; empty if it fits."""
    for_adapters, for_tokens = _blocks(memory, model, demand, num_gpus)
    size, faults = memory.block_bytes, []
    asked = memory.num_blocks * size  # by the options, or what there is
    short = (for_adapters + for_tokens) * size - min(asked, memory.room)
    if short > 0:
        faults.append((short, f"{short / 1e9:.2f} GB short on each GPU"))
    elif asked > max(memory.room, size):
        over = asked - memory.room
        faults.append((over, f"the KV blocks and adapter bytes that [server] names are {over / 1e9:.2f} GB more than each GPU has"))
    over = for_adapters * size - memory.adapter_bytes
    if over > 0 and not faults:
        share = f"the adapters' share of {memory.adapter_bytes / 1e9:.2f} GB"
        faults.append((over, f"adapters are {over / 1e9:.2f} GB over {share}: raise server.adapter_device_bytes, or plan fewer"))
    if -(-demand.concurrency // num_gpus) > model.limits.max_batch_size:
        faults.append((1, f"a GPU runs {model.limits.max_batch_size} sequences at once (server.max_batch_size)"))
    return faults


def _sequences(memory: EngineMemory, model: Model, demand: Demand) -> int:
    """Sequences of the demand's length that run at once on one GPU beside the adapters."""
    blocks = memory.num_blocks - demand.num_adapters * memory.blocks_of_adapter(demand.bytes_of_adapter)
    return max(0, min(model.limits.max_batch_size, blocks // memory.blocks_of_sequence(demand.context)))


def all_fits(model: Model, demand: Demand, instances: Iterable[Instance] = tuple(INSTANCES.values())) -> list[Fit]:
    """The model on each instance, in the table's order."""
    return [fit(model, demand, instance) for instance in instances]


def cheapest(fits: Iterable[Fit]) -> Fit | None:
    """The one that fits for the least an hour, of known price."""
    return min((each for each in fits if each.fits), key=lambda each: each.instance.usd_per_hour or float("inf"), default=None)


def nearest(model: Model, demand: Demand, instances: Iterable[Instance] = tuple(INSTANCES.values())) -> tuple[Fit, str | None] | None:
    """The cheapest instance that the model fits as it is, or else with the fewest bits that are cut: (fit, scheme). None: nothing does."""
    among = list(instances)
    for scheme in (None, *(name for name in _SMALLER if SCHEMES[name].bits < SCHEMES[model.scheme or "bf16"].bits)):
        changed = model if scheme is None else replace(model, scheme=scheme)
        if found := cheapest(all_fits(changed, demand, among)):
            return found, scheme
    return None


def article_bytes(model: Model, demand: Demand, weights: int) -> int:
    """What the article's rule asks for: one and a half times model and adapters."""
    return round(ARTICLE_FACTOR * (weights + demand.num_adapters * demand.bytes_of_adapter))


def saving(num_variants: int) -> float:
    """The share of the cost that is saved by one instance in place of one for each variant of the model (the article: five save 80%)."""
    return 1.0 - 1.0 / max(1, num_variants)

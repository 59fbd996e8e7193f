"""A plan as text for people and as JSON for programs. Numbers are sizing's; here they are only rounded and put side by side."""

from dataclasses import dataclass
from typing import Any

from sizing.fit import Demand, Fit, Model, article_bytes, saving
from sizing.instances import PRICE_REGION, PRICES_OF, UNCONFIRMED, Instance
from sizing.throughput import MEASURED

_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was asked, and what came of it. `fit`: on the instance; `fits`: on all; `nearest`: where it does not fit, what does and under
    which scheme; `cost`: the deployment's line, if it is the deployment's plan."""

    model: Model
    demand: Demand
    instance: Instance
    fit: Fit
    fits: list[Fit]
    nearest: tuple[Fit, str | None] | None
    variants: int
    cost: str | None = None

    @property
    def scheme(self) -> str:
        """What the weights are stored in."""
        return self.model.scheme or self.model.shape.quantization or self.model.dtype


def parts_of(plan: Plan) -> list[tuple[str, int, str]]:
    """(part, bytes of one GPU, what it is), largest things first as they are taken; they add up to the card."""
    memory, demand, own = plan.fit.memory, plan.demand, plan.fit
    aside = memory.set_aside
    rest = memory.room - own.adapters - own.kv
    rows = -(-demand.concurrency // (own.num_gpus or own.num_engines))
    kv = f"sequences: {rows} of {demand.prompt_len} + {demand.output_len} tokens"
    if rows * memory.blocks_of_sequence(demand.context) * memory.block_bytes < own.kv:
        kv = f"one sequence of max_total_tokens, {plan.model.limits.max_sequence_len}: more than what is asked"
    if plan.model.limits.kv_cache_dtype != "auto":
        kv += f"; {plan.model.limits.kv_cache_dtype}"
    return [
        ("weights", memory.weights.total, f"{plan.model.shape.num_params / 1e9:.2f} billion, {plan.scheme}"),
        ("adapters", own.adapters, f"{demand.num_adapters} of {demand.bytes_of_adapter / 1e6:.1f} MB, in blocks"),
        ("KV", own.kv, kv),
        ("graphs", aside.graphs, "captured decode steps"),
        ("headroom", memory.context + aside.spare + aside.activations, "CUDA itself, workspaces, a step's own memory"),
        ("free" if rest >= 0 else "MISSING", rest, "more sequences, prefixes and adapters" if rest >= 0 else "of the card"),
    ]


def as_text(plan: Plan) -> str:
    """The whole plan."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_instances(plan), "", *_notes(plan)])


def _head(plan: Plan) -> list[str]:
    shape, demand = plan.model.shape, plan.demand
    what = f"{shape.name} ({shape.model_type}, {shape.num_params / 1e9:.2f} billion parameters, {plan.scheme})"
    return [f"{what} on {plan.instance.name}; adapters: {demand.num_adapters}, sequences at once: {demand.concurrency}"]


def _memory(plan: Plan) -> list[str]:
    card = plan.instance.card
    lines = [f"{f'one {card.name}, GB':12} {card.memory_bytes / _GB:8.2f}"]
    lines += [f"  {part:10} {num_bytes / _GB:8.2f}  {what}" for part, num_bytes, what in parts_of(plan)]
    rule = article_bytes(plan.model, plan.demand, plan.fit.memory.weights.total)
    holds = "fits" if rule <= card.memory_bytes else "does not fit"
    return [*lines, f"the article's rule, 1.5 times model and adapters: {rule / _GB:.2f} GB, which {holds} one {card.name}"]


def _instances(plan: Plan) -> list[str]:
    above = f"{'':14} {'needed':>8} {'as asked':>9} {'when full':>10} {'when full':>9} {'':6} {'when full':>13}"
    names = f"{'GPUs':>8} {'tokens/s':>9} {'sequences':>10} {'tokens/s':>9} {'USD/h':>6} {'USD/M tokens':>13} {'USD/h, adapter':>15}"
    lines = [above, f"{'instance':14} {names}"]
    for each in plan.fits:
        name = f"{'*' if each.instance.name == plan.instance.name else ' '}{each.instance.name}"
        gpus = f"{each.num_gpus or '-'} of {each.instance.num_gpus}"
        if not each.fits:
            lines.append(f"{name:14} {gpus:>8} does not fit: {each.reason}")
            continue
        share = _usd(each.usd_per_adapter(plan.demand.num_adapters), 4)
        full = f"{each.full_sequences:>10} {each.full_tokens_per_s:>9.0f}"
        price = f"{_usd(each.instance.usd_per_hour, 2):>6} {_usd(each.usd_per_million, 2):>13} {share:>15}"
        lines.append(f"{name:14} {gpus:>8} {each.tokens_per_s:>9.0f} {full} {price}")
    return lines


def _notes(plan: Plan) -> list[str]:
    speed, price = plan.fit.speed, plan.instance.usd_per_hour
    files = ", ".join(sorted({row["file"] for row in MEASURED["decode"]}))
    kind = "a projection" if speed.is_projection else "measured on this card"
    unsure = f"; {', '.join(sorted(UNCONFIRMED))} to be refreshed" if UNCONFIRMED else ""
    lines = [
        f"tokens/s is {kind}: a decode step of {speed.step_ms:.1f} ms, bound by {speed.bound}, at {speed.base_efficiency:.2f} of the "
        f"bandwidth for the base, {speed.adapters_efficiency:.2f} for adapters and {speed.launch_us:.1f} us a group for their kernels; "
        f"prompts at {speed.prompts_efficiency:.2f} of the arithmetic; as on an {MEASURED['gpu']} ({files}).",
        f"prices: on demand, {PRICE_REGION}, {PRICES_OF}{unsure}; `python -m infra.plan --refresh` looks them up.",
    ]
    if price is not None and plan.fit.fits:
        lines.append(
            f"{plan.variants} variants on an instance each: {plan.variants * price:.2f} USD an hour; as adapters on one: {price:.2f}, "
            f"{100 * saving(plan.variants):.0f}% less."
        )
    if plan.cost:
        lines.append(f"the whole deployment: {plan.cost}")
    if not plan.fit.fits:
        lines.append(nearest_text(plan))
    return lines


def nearest_text(plan: Plan) -> str:
    """What fits in place of the instance."""
    text = f"DOES NOT FIT {plan.instance.name}: {plan.fit.reason}. "
    if plan.nearest is None:
        return text + "No instance of the table holds it, in no number of bits."
    found, scheme = plan.nearest
    how = f" with quantize {scheme}" if scheme else ""
    return text + f"The nearest that fits: {found.instance.name}{how}, on {found.num_gpus} of its {found.instance.num_gpus} GPUs."


def _usd(value: float | None, digits: int) -> str:
    return "?" if value is None else f"{value:.{digits}f}"


def as_json(plan: Plan) -> dict[str, Any]:
    """The same, unrounded."""
    own, price = plan.fit, plan.instance.usd_per_hour
    return {
        "model": {"name": plan.model.shape.name, "parameters": plan.model.shape.num_params, "scheme": plan.scheme},
        "demand": {
            "adapters": plan.demand.num_adapters,
            "adapter_bytes": plan.demand.bytes_of_adapter,
            "concurrency": plan.demand.concurrency,
            "prompt_tokens": plan.demand.prompt_len,
            "output_tokens": plan.demand.output_len,
        },
        "instance": plan.instance.name,
        "fits": own.fits,
        "memory": {
            "card": own.memory.card,
            "parts": {part.lower(): num_bytes for part, num_bytes, _ in parts_of(plan)},
            "arena": own.memory.arena,
            "kv_blocks": own.memory.num_blocks,
            "kv_cache_dtype": plan.model.limits.kv_cache_dtype,
            "article_rule": article_bytes(plan.model, plan.demand, own.memory.weights.total),
        },
        "instances": [_instance_json(each, plan.demand.num_adapters) for each in plan.fits],
        "nearest": None if plan.nearest is None else {"instance": plan.nearest[0].instance.name, "quantize": plan.nearest[1]},
        "speed": {
            "step_ms": own.speed.step_ms,
            "bound": own.speed.bound,
            "base_efficiency": own.speed.base_efficiency,
            "adapters_efficiency": own.speed.adapters_efficiency,
            "prompts_efficiency": own.speed.prompts_efficiency,
            "projection": own.speed.is_projection,
        },
        "prices": {"as_of": PRICES_OF, "region": PRICE_REGION, "unconfirmed": sorted(UNCONFIRMED)},
        "variants": {
            "number": plan.variants,
            "usd_per_hour_each_alone": None if price is None else plan.variants * price,
            "usd_per_hour": price,
            "saving": saving(plan.variants),
        },
    }


def _instance_json(each: Fit, num_adapters: int) -> dict[str, Any]:
    return {
        "type": each.instance.name,
        "gpus": each.instance.num_gpus,
        "gpus_used": each.num_gpus,
        "missing": each.missing,
        "reason": each.reason,
        "tokens_per_s": each.tokens_per_s,
        "full_sequences": each.full_sequences,
        "full_tokens_per_s": each.full_tokens_per_s,
        "usd_per_hour": each.instance.usd_per_hour,
        "usd_per_million_tokens": each.usd_per_million,
        "usd_per_hour_and_adapter": each.usd_per_adapter(num_adapters),
    }

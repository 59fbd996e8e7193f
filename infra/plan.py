"""`python -m infra.plan`: what a model with its adapters takes, which instances it fits, what they make and what that costs.

Without arguments it plans config/dev.toml, with --env another environment; any argument stands in for what the configuration says. Ends
with 0 if it fits the instance, 1 if not, 2 for what cannot be planned. `--refresh` looks the instances' prices up (needs credentials).

Owns the way from the configuration to sizing's numbers, and the check that every synth makes (`check`, called by app.py before anything is
made). Knows nothing of CDK and reads no weights.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.config import ConfigError, KitConfig
from infra.cost import cost_text
from infra.plan_table import Plan, as_json, as_text
from sizing.adapters import adapter_bytes
from sizing.errors import SizingError
from sizing.fit import Demand, Model, all_fits, check_demand, fit, nearest
from sizing.instances import check_region, instance_named
from sizing.memory import EngineLimits
from sizing.models import known_shape, shape_of_file
from sizing.printing import run_tool
from sizing.quantization import scheme_named
from sizing.shape import ModelShape

ROOT = Path(__file__).resolve().parent.parent
# The server's settings that say how much the engine needs -> the limits of sizing.
_LIMITS = {
    "block_size": "block_size",
    "num_blocks": "num_blocks",
    "kv_cache_bytes": "kv_cache_bytes",
    "max_batch_prefill_tokens": "max_batch_tokens",
    "max_batch_size": "max_batch_size",
    "max_total_tokens": "max_sequence_len",
    "adapter_device_bytes": "adapter_device_bytes",
    "cuda_graphs": "cuda_graphs",
}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def check(config: KitConfig, root: Path = ROOT, region: str | None = None) -> Plan:
    """The plan of a configuration that fits. ConfigError names what cannot be planned, or has the table and the nearest that fits.

    `region`: the command line's, where the configuration names none."""
    asked = asked_by(config, root) | ({"region": region} if config.region is None else {})
    for key, name in (("instance_type", config.fleet.instance_type), *(("fallback_types", each) for each in config.fleet.fallback_types)):
        plan = make_plan(asked | {"instance": name})
        if not plan.fit.fits:
            raise ConfigError(f"fleet.{key}: {name} cannot hold what is planned\n\n{as_text(plan)}")
    return make_plan(asked)


def asked_by(config: KitConfig, root: Path = ROOT) -> dict[str, Any]:
    """What a configuration asks of the planner, by the names that `make_plan` takes."""
    wanted, server = config.plan, config.server
    return {
        "model": config.model.id,
        "config_file": root / wanted.config_file if wanted.config_file else None,
        "quantize": server.get("quantize"),
        "dtype": server.get("dtype", "auto"),
        "kv_cache_dtype": server.get("kv_cache_dtype", "auto"),
        "limits": {_LIMITS[name]: _plain(value) for name, value in server.items() if name in _LIMITS},
        "num_engines": server.get("num_engines"),
        "instance": config.fleet.instance_type,
        "region": config.region,
        "cost": cost_text(config),
        **{name: getattr(wanted, name) for name in ("adapters", "rank", "targets", "adapter_bytes", "concurrency", "variants")},
        "prompt_len": wanted.prompt_tokens,
        "output_len": wanted.output_tokens,
    }


def make_plan(asked: Mapping[str, Any]) -> Plan:
    """The plan of what is asked. ConfigError names what cannot be: an unknown shape, a rank, an instance, a region."""
    try:
        instance = instance_named(asked["instance"])
        if asked["region"]:
            check_region(instance, asked["region"])
        shape = _shape(asked)
        dtype = scheme_named(asked["dtype"]).name
        scheme = scheme_named(asked["quantize"]).name if asked["quantize"] else None
        item_bytes = round(scheme_named(dtype).bits / 8)
        one = asked["adapter_bytes"] or adapter_bytes(shape, asked["rank"], asked["targets"], item_bytes)
        limits = EngineLimits.of(shape, asked["limits"] | {"kv_cache_dtype": asked["kv_cache_dtype"]})
        model = Model(shape=shape, limits=limits, scheme=scheme, dtype=dtype, num_engines=asked["num_engines"])
        demand = Demand(
            num_adapters=asked["adapters"],
            bytes_of_adapter=one,
            **{name: asked[name] for name in ("concurrency", "prompt_len", "output_len")},
        )
        check_demand(model, demand)
        own = fit(model, demand, instance)
        return Plan(
            model=model,
            demand=demand,
            instance=instance,
            fit=own,
            fits=all_fits(model, demand),
            nearest=None if own.fits else nearest(model, demand),
            variants=asked["variants"],
            cost=asked["cost"],
        )
    except SizingError as error:
        raise ConfigError(str(error)) from None


def _shape(asked: Mapping[str, Any]) -> ModelShape:
    if asked["config_file"]:
        return shape_of_file(Path(asked["config_file"]), asked["model"])
    try:
        return known_shape(asked["model"])
    except SizingError as error:
        raise SizingError(f"{error}. Name it: plan.config_file, or --config") from None


def _plain(value: Any) -> Any:
    """A setting's value as a number: bytes may be written as 4GiB."""
    if not isinstance(value, str):
        return value
    text = value.lower().removesuffix("b").replace(" ", "")
    digits = text.rstrip("kmgti")
    return int(float(digits) * _UNITS[text[len(digits) :]])


def main(argv: Sequence[str]) -> int:
    """See the module."""
    arguments = _parse(argv)
    try:
        if arguments.refresh:
            return _refresh(arguments.region)
        overrides = dict(pair.partition("=")[::2] for pair in arguments.context)
        asked = asked_by(KitConfig.load(arguments.env, ROOT, overrides))
        plan = make_plan(asked | _given(arguments))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(as_json(plan), indent=1) if arguments.json else as_text(plan))
    return 0 if plan.fit.fits else 1


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line says, in the place of the configuration's. Another model is no longer the deployment: its cost is left out."""
    names = ("model", "quantize", "dtype", "kv_cache_dtype", "adapters", "rank", "adapter_bytes", "concurrency", "prompt_len", "output_len")
    given = {name: getattr(arguments, name) for name in (*names, "instance", "region", "variants") if getattr(arguments, name) is not None}
    if arguments.targets:
        given["targets"] = tuple(arguments.targets.split(","))
    if arguments.config:
        given |= {"config_file": arguments.config, "model": arguments.model or arguments.config.resolve().name}
    elif arguments.model:
        given["config_file"] = None
    if {"rank", "targets"} & set(given) and "adapter_bytes" not in given:
        given["adapter_bytes"] = None
    return given | ({"cost": None} if given else {})


def _refresh(region: str | None) -> int:
    """Look the prices up and write them. ConfigError if the Pricing API cannot be asked."""
    from infra.prices import refresh

    for line in refresh(region):
        print(line)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m infra.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="dev", help="the environment that is planned: config/ENV.toml (dev)")
    parser.add_argument("-c", "--context", action="append", default=[], metavar="KEY=VALUE", help="a key of it, as cdk takes it")
    parser.add_argument("--model", help="a model of sizing/models.toml, by its name there or on the hub")
    parser.add_argument("--config", type=Path, help="another model: its config.json, or a folder with it and perhaps its safetensors")
    parser.add_argument("--quantize", metavar="SCHEME", help="bf16, fp8, int8, int4, awq, gptq, hqq, nf4, ... (sizing/quantization.py)")
    parser.add_argument("--dtype", help="of what is not quantized: bfloat16, float16 or float32 (bfloat16)")
    parser.add_argument("--kv-cache-dtype", help="of keys and values: auto (the model's) or fp8")
    parser.add_argument("--adapters", type=int, metavar="N", help="adapters on a GPU at once")
    parser.add_argument("--rank", type=int, help="their rank")
    parser.add_argument("--targets", metavar="NAMES", help="linears that they target: all-linear, or q_proj,v_proj,...")
    parser.add_argument("--adapter-bytes", type=int, metavar="BYTES", help="what one takes, measured; in place of rank and targets")
    parser.add_argument("--concurrency", type=int, metavar="N", help="sequences at once")
    parser.add_argument("--prompt", dest="prompt_len", type=int, metavar="TOKENS", help="tokens of a prompt")
    parser.add_argument("--output", dest="output_len", type=int, metavar="TOKENS", help="tokens of an answer")
    parser.add_argument("--instance", metavar="TYPE", help="the instance type that must hold it")
    parser.add_argument("--region", help="the region that must have it; with --refresh: whose prices")
    parser.add_argument("--variants", type=int, metavar="N", help="variants that would have an instance each otherwise (5)")
    parser.add_argument("--json", action="store_true", help="the plan as JSON, bytes and USD unrounded")
    parser.add_argument("--refresh", action="store_true", help="write sizing/prices.toml anew through the Pricing API, and end")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))

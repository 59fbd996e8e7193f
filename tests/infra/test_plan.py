"""The planner: what a configuration asks, what is refused before anything is made, and the table that people and programs get."""

import dataclasses
import json
import shutil

import pytest

from infra.config import ConfigError, KitConfig
from infra.plan import asked_by, check, main, make_plan
from infra.plan_table import as_json, as_text, parts_of
from sizing.fit import saving
from sizing.models import MODELS
from tests.infra.conftest import ROOT

BUCKET = {"model.source": "bucket", "model.id": "mistral-7b-instruct-v0.3"}


def config(env="dev", **overrides):
    return KitConfig.load(env, ROOT, {key.replace("__", "."): value for key, value in overrides.items()})


@pytest.mark.parametrize("env", sorted(path.stem for path in (ROOT / "config").glob("*.toml")))
def test_every_committed_environment_fits(env):
    assert check(config(env), ROOT).fit.fits


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            {"model.source": "bucket", "model.id": "our-own"},
            "model our-own: its shape is not known: .*Name it: plan.config_file, or --config",
        ),
        ({"plan.rank": 200}, "rank: 200 is over the limit: the kernels take 512 ranks at once and 3 .*Allowed: 1 to 170"),
        ({"plan.targets": ["c_attn"]}, "targets: smollm2-135m-instruct has no linear c_attn. Allowed: all-linear, down_proj"),
        ({"region": "eu-west-1"}, "region eu-west-1 has no g6 instances by the table of 2026-11 .*Allowed: ap-northeast-1"),
        ({"plan.prompt_tokens": 4096}, "prompt and output: 4096 . 128 tokens are more than max_total_tokens 4096"),
        ({"server.max_total_tokens": 9000}, "max_sequence_len 9000 is beyond the 8192 positions"),
        ({"plan.config_file": "config/none.json"}, "config/none.json cannot be read"),
        ({"plan.config_file": "pyproject.toml"}, "pyproject.toml is not JSON"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(overrides, said):
    with pytest.raises(ConfigError, match=said):
        check(KitConfig.load("dev", ROOT, overrides), ROOT)


@pytest.mark.parametrize("name", ["m7i.xlarge", "t3.medium"])
def test_an_instance_without_a_gpu_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"fleet: instance_type: {name} has no GPU: .*Allowed: g6.xlarge"):
        config(fleet__instance_type=name)


def test_the_command_lines_region_counts_where_the_configuration_names_none():
    with pytest.raises(ConfigError, match="region eu-west-1 has no g6 instances"):
        check(config(), ROOT, "eu-west-1")
    assert check(config(region="us-west-2"), ROOT, "eu-west-1").fit.fits


def test_what_does_not_fit_comes_with_the_table_and_the_nearest_that_does():
    with pytest.raises(ConfigError) as caught:
        check(KitConfig.load("dev", ROOT, BUCKET | {"model.id": "llama-2-13b-hf"}), ROOT)
    text = str(caught.value)
    assert text.startswith("fleet.instance_type: g6.xlarge cannot hold what is planned\n\n")
    assert "weights       26.03" in text and "MISSING" in text and "*g6.xlarge" in text
    assert text.endswith("The nearest that fits: g6e.xlarge, on 1 of its 1 GPUs.")


def test_a_fallback_must_hold_it_too():
    overrides = BUCKET | {"model.id": "llama-2-13b-hf", "fleet.instance_type": "g6e.xlarge", "fleet.fallback_types": ["g6.12xlarge"]}
    with pytest.raises(ConfigError, match="fleet.fallback_types: g6.12xlarge cannot hold what is planned"):
        check(KitConfig.load("dev", ROOT, overrides), ROOT)


def test_the_servers_settings_count():
    limits = {
        "server.max_batch_prefill_tokens": 4096,
        "server.kv_cache_bytes": "2GiB",
        "server.block_size": 32,
        "server.cuda_graphs": False,
    }
    plan = check(KitConfig.load("dev", ROOT, limits | {"server.adapter_device_bytes": "1GB"}), ROOT)
    memory = plan.fit.memory
    assert memory.set_aside.graphs == 0 and memory.block_size == 32 and plan.model.limits.max_batch_tokens == 4096
    assert memory.arena == pytest.approx((2 << 30) + 1e9, rel=0.01)


def test_the_caches_type_counts(capsys):
    plain, small = (check(KitConfig.load("dev", ROOT, {"server.kv_cache_dtype": kv}), ROOT) for kv in ("auto", "fp8"))
    assert plain.fit.memory.block_bytes == 2 * small.fit.memory.block_bytes
    assert main(["--kv-cache-dtype", "fp8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] == as_json(small)["memory"] != as_json(plain)["memory"]
    assert "tokens; fp8" in as_text(small) and "; fp8" not in as_text(plain)
    with pytest.raises(ConfigError, match="kv_cache_dtype must be one of auto, fp8. Given: 'fp8_e5m2'"):
        KitConfig.load("dev", ROOT, {"server.kv_cache_dtype": "fp8_e5m2"})


def test_the_parts_are_the_whole_card():
    plan = check(config("prod"), ROOT)
    assert sum(num_bytes for _, num_bytes, _ in parts_of(plan)) == plan.fit.memory.card


def test_a_config_file_is_a_shape(tmp_path):
    shutil.copytree(ROOT / "config", tmp_path / "config")
    (tmp_path / "config" / "ours.json").write_text(json.dumps(MODELS["llama-3.2-1b"]["config"]))
    ours = KitConfig.load("dev", tmp_path, {"model.source": "bucket", "model.id": "ours", "plan.config_file": "config/ours.json"})
    shape = check(ours, tmp_path).model.shape
    assert (shape.name, shape.num_params) == ("ours", 1_235_814_400)


def test_headers_are_read_where_there_are_weights(tmp_path):
    """A folder whose files hold a tied head a second time, and a tensor that the shape does not know."""
    values = MODELS["smollm2-135m"]["config"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    asked = asked_by(config()) | {"config_file": tmp_path, "model": "mine"}
    bare = make_plan(asked).fit.memory.weights.total
    shapes = {"model.embed_tokens.weight": [49152, 576], "lm_head.weight": [49152, 576], "rest": [bare // 2 - 49152 * 576 + 1000]}
    header, start = {}, 0
    for name, shape in shapes.items():
        size = 2 * (shape[0] * (shape[1] if len(shape) > 1 else 1))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    assert make_plan(asked).fit.memory.weights.total == bare + 2000
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 32)
    with pytest.raises(ConfigError, match="model mine: model.safetensors has no safetensors header"):
        make_plan(asked)


def test_without_arguments_it_plans_dev(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert text.startswith("smollm2-135m-instruct (llama, 0.13 billion parameters, bf16) on g6.xlarge; adapters: 25, sequences at once: 16")
    for wanted in ("weights", "adapters", "KV", "graphs", "headroom", "the article's rule", "*g6.xlarge", "g6e.48xlarge", "tokens/s is a"):
        assert wanted in text
    assert "5 variants on an instance each: 4.02 USD an hour; as adapters on one: 0.80, 80% less." in text
    assert "the whole deployment: 0.91 to 1.74 USD an hour" in text


def test_arguments_stand_in_for_the_configuration(capsys):
    argv = ["--model", "meta-llama/Llama-2-13b-hf", "--adapters", "5", "--rank", "8", "--targets", "q_proj,v_proj", "--concurrency", "4"]
    assert main([*argv, "--instance", "g6e.2xlarge", "--variants", "10", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["instance"] == "g6e.2xlarge" and said["fits"] and said["model"]["parameters"] == 13_015_864_320
    assert said["demand"]["adapter_bytes"] == pytest.approx(2 * 40 * 2 * 8 * 2 * 5120, rel=0.01)
    assert said["variants"]["saving"] == saving(10) and said["nearest"] is None
    assert [each["type"] for each in said["instances"] if each["gpus_used"] is None][:1] == ["g6.xlarge"]
    assert main([*argv, "--quantize", "int4"]) == 0  # on dev's g6.xlarge
    assert main(argv) == 1
    assert "The nearest that fits: g6e.xlarge" in capsys.readouterr().out


def test_what_an_adapter_takes_may_be_measured(capsys):
    assert main(["--adapter-bytes", "5000000", "--adapters", "1000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["demand"]["adapter_bytes"] == 5_000_000
    with pytest.raises(ConfigError, match="plan: adapter_bytes is measured and rank and targets are arithmetic"):
        config(plan__adapter_bytes=1000, plan__rank=8)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "nobody/knows"], "error: model nobody/knows: its shape is not known"),
        (["--quantize", "int3"], "error: quantize: there is no scheme 'int3'"),
        (["--kv-cache-dtype", "int8"], "error: kv_cache_dtype must be one of auto, fp8. Given: int8"),
        (["--instance", "c7i.large"], "error: c7i.large has no GPU"),
        (["--region", "af-south-1"], "error: region af-south-1 has no g6 instances"),
        (["--rank", "1000"], "error: rank: 1000 is over the limit"),
        (["--adapters", "-1"], "error: adapters must be at least 0"),
        (["-c", "flet.max=3"], "error: the configuration of env dev"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(argv, said, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith(said)


def test_a_price_that_is_not_known_is_no_number(capsys):
    plan = make_plan(asked_by(config()))
    unknown = dataclasses.replace(plan.fit, instance=dataclasses.replace(plan.instance, usd_per_hour=None))
    assert unknown.usd_per_million is None and unknown.usd_per_adapter(25) is None

"""The configuration: every fault is refused at synth, by the key's name, with what is allowed."""

import tomllib
from pathlib import Path

import pytest

from docs.server_settings import PATH, server_settings
from infra.config import ConfigError, KitConfig
from infra.server_settings import OWNED, SETTINGS, environment_value
from server.settings import Settings, read_settings
from sizing.instances import INSTANCES

ROOT = Path(__file__).resolve().parent.parent.parent
EXISTING = {
    "network.vpc_id": "vpc-0123456789abcdef0",
    "network.private_subnet_ids": ["subnet-1", "subnet-2"],
    "network.availability_zones": ["us-east-1a", "us-east-1b"],
}
REFUSED = [
    ({"name": "a" * 30}, "name: String should match pattern"),
    ({"name": "Upper"}, "name: "),
    ({"region": "us-est-1"}, "region: us-est-1 is not a region. Near it: us-west-1, us-east-1"),
    ({"flet.max": 3}, "flet: unknown key (did you mean fleet?)"),
    ({"fleet.mx": 3}, "fleet.mx: unknown key (did you mean max?). Allowed: desired, drain_s"),
    ({"tags.aws:x": "y"}, "tags: aws:x: a tag's key"),
    ({"kms_key_arn": "alias/mine"}, "kms_key_arn: "),
    ({"fleet.instance_type": "m5.large"}, "m5.large has no GPU: it is no G6, Gr6 or G6e instance. Allowed: g6.xlarge"),
    ({"fleet.fallback_types": ["g6.xlarge", "g5.xlarge"]}, "fallback_types: g5.xlarge"),
    ({"fleet.min": 3, "fleet.max": 2}, "min <= desired <= max must hold. Given: 3, 3, 2"),
    ({"fleet.min": 0}, "min = 0 and scale_to_zero = true go together"),
    ({"fleet.root_gib": 50}, "fleet.root_gib: Input should be greater than or equal to 100. Given: 50"),
    ({"fleet.warm_pool.state": "hibernated"}, "fleet.warm_pool.state: Input should be 'stopped' or 'running'"),
    ({"fleet.warm_pool.min_size": 1, "fleet.spot_percent": 50}, "warm_pool cannot be had together with spot_percent"),
    ({"fleet.schedules": [{"name": "Night", "cron": "cron(0 22 * * *)"}]}, "schedule Night changes nothing"),
    ({"fleet.schedules": [{"name": "Night", "cron": "22:00", "min": 1}]}, "fleet.schedules.0.cron: "),
    ({"fleet.schedules": [{"name": "Night", "cron": "cron(0 22 * * ? *)", "min": 1}]}, "fleet.schedules.0.cron: "),
    ({"network.cidr": "10.0.0.0/8"}, "cidr must be a private range of /16 to /22. Given: 10.0.0.0/8"),
    ({"network.cidr": "10.0.0.1/16"}, "cidr must be an IPv4 range"),
    ({"network.admin_cidr": "0.0.0.0/0", "network.key_pair": "k"}, "admin_cidr must be /24 or narrower"),
    ({"network.admin_cidr": "10.1.0.0/23", "network.key_pair": "k"}, "admin_cidr must be /24 or narrower"),
    ({"network.admin_cidr": "10.1.0.0/24"}, "key_pair is missing"),
    ({"network.key_pair": "k"}, "admin_cidr is missing"),
    ({"network.admin_cidr": "8.8.8.8/32", "network.key_pair": "k"}, "set public_fleet = true"),
    ({"network.public_fleet": True, "network.nat": "one"}, "nat one is of no use with public_fleet = true"),
    ({"network.nat": "none"}, "network.nat none leaves no way to install the server at boot: set image.kind to baked or ami"),
    ({"network.nat": "none", "image.kind": "baked", "network.interface_endpoints": False}, "interface_endpoints must not be false"),
    ({"network.nat": "none", "image.kind": "baked", "model.hub": True}, "model.hub cannot be had with network.nat none"),
    ({"network.vpc_id": "vpc-0123456789abcdef0"}, "vpc_id needs private_subnet_ids and availability_zones"),
    ({**EXISTING, "network.cidr": "10.42.0.0/16"}, "cidr belongs to a VPC of our own"),
    ({**EXISTING, "region": "eu-west-1"}, "network.availability_zones must lie in region eu-west-1"),
    ({"network.private_subnet_ids": ["subnet-1"]}, "private_subnet_ids needs vpc_id"),
    ({"network.availability_zones": ["us-east-1a"]}, "availability_zones must name max_azs (2) zones. Given: 1"),
    ({"storage.kind": "nfs"}, "storage.kind: Input should be 'efs', 'fsx' or 's3files'. Given: 'nfs'"),
    ({"storage.fsx.capacity_gib": 1200}, "the section fsx is given and kind is efs"),
    ({"storage.kind": "fsx", "storage.fsx.capacity_gib": 3000}, "capacity_gib must be 1200 or a multiple of 2400. Given: 3000"),
    ({"storage.kind": "fsx", "storage.fsx.throughput": 250}, "throughput is fixed"),
    ({"storage.kind": "s3files", "storage.backup": True}, "backup is for kind efs alone"),
    ({"image.kind": "ami"}, "kind ami and ami_id go together"),
    ({"image.kind": "ami", "image.ami_id": "ami-0123456789abcdef0", "image.ami_line": "base"}, "remove ami_line"),
    ({"scaling.idle_minutes": 10}, "scaling.idle_minutes needs fleet.scale_to_zero = true"),
    ({**EXISTING, "endpoint.private": True}, "endpoint.vpc_endpoint_ids must name execute-api endpoints"),
    ({"fleet.min": 0, "fleet.scale_to_zero": True, "fleet.scale_in_protection": True}, "scale_to_zero cannot be had together with"),
    ({"fleet.drain_s": 7200}, "fleet.drain_s: Input should be less than or equal to 3600"),  # the load balancer's deregistration delay
    ({"image.schedule": "rate(7 days)"}, "schedule needs kind baked"),
    ({"image.version": "newest"}, "image.version: "),
    ({"model.source": "bucket"}, "id is missing; it names the model of source bucket"),
    ({"model.id": "other"}, "id must be smollm2-135m-instruct with source embedded"),
    ({"model.source": "hub", "model.id": "a/b", "model.revision": "0" * 40}, "source hub needs hub = true"),
    ({"model.source": "hub", "model.id": "a/b", "model.hub": True}, "source hub needs id = owner/name and revision = a commit"),
    ({"model.hub_owners": ["a"]}, "hub_owners needs hub = true"),
    ({"model.adapters_prefix": "models/lora/"}, "prefix and adapters_prefix must not lie in each other"),
    ({"model.prefix": "/models/"}, "model.prefix: "),
    ({"server.max_batch_size": 0}, "server: max_batch_size must be >= 1. Given: 0"),
    ({"server.max_batch_size": True}, "server: max_batch_size must be of type integer. Given: True"),
    ({"server.max_bach_size": 1}, "server: max_bach_size is not a setting of the server. Allowed: "),
    ({"server.port": 80}, "server: port is set by the kit; the key for it: none"),
    ({"server.model_id": "x"}, "server: model_id is set by the kit; the key for it: model.id"),
    ({"server.admin_key": "0123456789abcdef"}, "server: admin_key is set by the kit; the key for it: none"),
    ({"server.log_level": "loud"}, "server: log_level must be one of debug, info, warning, error"),
    ({"server.served_model_name": "a$(id)"}, "server: served_model_name must not hold quotes"),
    ({"server.store_max_bytes": "many"}, "server: store_max_bytes must be a number of bytes such as 4GiB"),
    ({"endpoint.auth": "none"}, "endpoint.auth: Input should be 'api_key', 'iam', 'jwt' or 'lambda'"),
    ({"endpoint.auth": "lambda"}, "auth lambda needs lambda_arn"),
    ({"endpoint.domain": "api.example.com"}, "domain and certificate_arn go together"),
    ({"endpoint.timeout_s": 901}, "endpoint.timeout_s: Input should be less than or equal to 900"),
    ({"endpoint.auth": "iam", "endpoint.quota_per_day": 5}, "quota_per_day needs auth api_key"),
    ({"observability.log_days": 31}, "observability.log_days: Input should be 1, 3, 5"),
    ({"observability.monthly_budget_usd": 10}, "monthly_budget_usd needs alarm_email"),
    ({"observability.tracing": "otlp"}, "tracing otlp and otlp_endpoint go together"),
    ({"observability.alarm_email": "nobody"}, "observability.alarm_email: "),
]


@pytest.mark.parametrize(("overrides", "said"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, dict) else None)
def test_what_cannot_be_is_refused_by_name(overrides, said):
    with pytest.raises(ConfigError) as error:
        KitConfig.load("dev", ROOT, overrides)
    assert said in str(error.value)


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        KitConfig.load("dev", ROOT, {"fleet.mx": 1, "storage.kind": "nfs", "region": "moon"})
    assert all(key in str(error.value) for key in ("fleet.mx", "storage.kind", "region"))


def test_an_unknown_environment_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"env staging: .*staging.toml does not exist. Allowed: dev, prod"):
        KitConfig.load("staging", ROOT)


def test_a_broken_file_is_refused_with_its_line(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "dev.toml").write_text("name = \n")
    with pytest.raises(ConfigError, match="line 1"):
        KitConfig.load("dev", tmp_path)


@pytest.mark.parametrize("env", ["dev", "prod"])
def test_committed_environments_load(env):
    config = KitConfig.load(env, ROOT)
    assert config.retain_data == (env == "prod")


def test_defaults_alone_are_a_configuration(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "bare.toml").write_text("")
    assert KitConfig.load("bare", tmp_path).fleet.instance_type == "g6.xlarge"


def test_overrides_of_the_command_line_are_read_as_toml():
    overrides = {"fleet.max": "9", "retain_data": "true", "model.source": "bucket", "model.id": "mistral", "tags.team": "search"}
    config = KitConfig.load("dev", ROOT, overrides)
    assert (config.fleet.max, config.retain_data, config.model.id, config.tags) == (9, True, "mistral", {"team": "search"})


def test_the_list_of_server_settings_is_the_servers():
    assert PATH.read_text() == server_settings(), "run `make docs`"
    assert set(OWNED) <= set(SETTINGS) == set(Settings.model_fields)


def test_a_secret_is_refused_even_if_the_kit_does_not_set_it(monkeypatch):
    monkeypatch.setitem(SETTINGS, "some_token", {"type": "secret"})
    with pytest.raises(ConfigError, match="some_token is a secret, and what is set here can be read in user-data"):
        KitConfig.load("dev", ROOT, {"server.some_token": "0123456789abcdef"})


def test_the_server_reads_what_the_configuration_let_through():
    values = {"max_batch_size": 32, "store_max_bytes": "4GiB", "prefix_caching": False, "preloaded_adapter_ids": ["a", "b"]}
    config = KitConfig.load("dev", ROOT, {"server": values})
    environment = {f"MANYLORA_{name.upper()}": environment_value(value) for name, value in config.server.items()}
    settings = read_settings(["--model-id", "x"], environment)
    assert (settings.max_batch_size, settings.store_max_bytes, settings.prefix_caching) == (32, 4 << 30, False)
    assert settings.preloaded_adapter_ids == ["a", "b"]


def test_the_regions_are_those_of_aws_cdk_lib():
    from aws_cdk import region_info

    from infra.regions import REGIONS

    assert {region.name for region in region_info.RegionInfo.regions if region.partition == "aws"} == REGIONS


def test_instances_hold_together():
    table = tomllib.loads((ROOT / "sizing" / "instances.toml").read_text())
    for instance in INSTANCES.values():
        per_gpu = instance.gpu_memory_gib / instance.num_gpus
        assert 0.9 * table["gpus"][instance.gpu]["memory_gb"] / 1.0737 < per_gpu < table["gpus"][instance.gpu]["memory_gb"]
        assert instance.usd_per_hour is None or 0.2 < instance.usd_per_hour / instance.num_gpus < 10

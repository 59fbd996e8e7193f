"""user-data as text: its variables are the script's, its environment is the server's, both ways; small, clean, without a secret."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra.artifact import read_content
from infra.config import KitConfig
from infra.server_settings import OWNED, SETTINGS
from infra.user_data import MAX_BYTES, SCRIPT, render, server_environment
from server.settings import Settings, read_settings
from tests.infra.test_fleet import user_data_of

ROOT = Path(__file__).parents[2]
AMI = ROOT / "ami"


class Shared:
    """The part of a file system that the environment depends on."""

    def __init__(self, shows_bucket: bool = False) -> None:
        self.shows_bucket = shows_bucket


def environment(overrides=None, *, shows_bucket=False):
    config = KitConfig.load("dev", ROOT, overrides)
    return server_environment(config, shared_files=Shared(shows_bucket), bucket_name="bucket", port=8080, region="eu-west-1")


@pytest.mark.parametrize(
    "overrides",
    [{}, {"model.hub": True, "model.hub_owners": ["org", "team"]}, {"endpoint.cors_origins": ["https://a.example"]}, {"fleet.drain_s": 60}],
)
@pytest.mark.parametrize("shows_bucket", [True, False])
def test_every_variable_is_a_setting_that_the_server_takes(overrides, shows_bucket):
    settings = read_settings([], environment(overrides, shows_bucket=shows_bucket))
    assert settings.port == 8080 and settings.hostname == "0.0.0.0" and settings.device == "cuda"
    assert settings.drain_timeout_s == overrides.get("fleet.drain_s", 900)
    assert settings.allowed_hub_owners == overrides.get("model.hub_owners", [])


def test_every_setting_has_a_way_in():
    """Either the kit sets it, and says which key to use instead, or a deployer may set it in [server]; nothing else exists."""
    assert set(SETTINGS) == set(Settings.model_fields)
    everything = {"endpoint.cors_origins": ["https://a.example"], "endpoint.tenants": True, "observability.tracing": "xray"}
    own = {name.removeprefix("MANYLORA_").lower() for name in environment(everything)}
    assert own <= set(Settings.model_fields)
    assert set(OWNED) <= set(Settings.model_fields)
    elsewhere = {"revision", "s3_endpoint_url", "admin_key", "gateway_key"}  # a hub model's; none in the kit; fetched at start
    assert set(OWNED) - own == elsewhere


@pytest.mark.parametrize(
    ("overrides", "endpoint"),
    [
        ({}, None),
        ({"observability.tracing": "xray"}, "http://127.0.0.1:4318"),
        ({"observability.tracing": "otlp", "observability.otlp_endpoint": "http://collector:4318"}, "http://collector:4318"),
    ],
)
def test_traces_go_where_the_configuration_says(overrides, endpoint):
    assert read_settings([], environment(overrides)).otlp_endpoint == endpoint
    agent = json.loads((AMI / "cloudwatch-agent.json").read_text())
    assert agent["traces"]["traces_collected"]["otlp"]["http_endpoint"] == "127.0.0.1:4318"


def test_a_deployers_setting_arrives():
    found = environment({"server.max_batch_size": 32, "server.prefix_caching": False, "server.preloaded_adapter_ids": ["sql", "pirate"]})
    settings = read_settings([], found)
    assert settings.max_batch_size == 32 and not settings.prefix_caching and settings.preloaded_adapter_ids == ["sql", "pirate"]


@pytest.mark.parametrize("env", ["dev", "prod"])
def test_the_rendered_script_is_small_and_parses(synth, env, tmp_path):
    script = user_data_of(synth({}, env)["service"])
    assert len(script.encode()) < MAX_BYTES - 4096  # references become longer
    path = tmp_path / "user-data.sh"
    path.write_text(script)
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    assert not re.search(r"(?i)(password|hf_[a-z0-9]{8}|AKIA[0-9A-Z]{8}|BEGIN [A-Z ]*KEY)", script)


def variables() -> dict[str, str]:
    block = SCRIPT.read_text().split("# >>> variables\n")[1].split("# <<< variables")[0]
    return dict.fromkeys(re.findall(r"^([A-Z][A-Z0-9_]*)=", block, re.MULTILINE), "x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v | {"NEW_ONE": "x"}, "undeclared ['NEW_ONE']"),
        (lambda v: {name: value for name, value in v.items() if name != "MOUNT_KIND"}, "missing ['MOUNT_KIND']"),
        (lambda v: v | {"REGION": "it's"}, "REGION"),
        (lambda v: v | {"MANYLORA_X": "a\nb"}, "MANYLORA_X"),
    ],
)
def test_what_the_script_does_not_know_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        render(change(variables()))


def test_every_variable_of_the_script_is_used():
    text = SCRIPT.read_text().split("# <<< variables")[1]
    for name in variables():
        assert name.startswith("MANYLORA_") or re.search(rf"\b{name}\b", text), name


@pytest.mark.parametrize("path", sorted([*AMI.glob("*.sh"), *(ROOT / "tests").rglob("*.sh")]), ids=lambda path: path.name)
def test_shell_is_clean(path):
    program = Path(sys.executable).with_name("shellcheck")
    found = str(program) if program.exists() else shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run([found, str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_units_ask_only_for_variables_that_user_data_writes():
    script = SCRIPT.read_text()
    written = {"NOTIFY_SOCKET", *re.findall(r'(\w+)="%s"\\n', script)}  # the first one is systemd's
    written |= set(re.search(r"for name in (REGION[A-Z_ ]*); do", script)[1].split())
    for unit in AMI.glob("*.service"):
        used = set(re.findall(r"\$\{(\w+)\}", unit.read_text()))
        assert used <= written, f"{unit.name}: {used - written}"


def test_the_server_waits_for_a_model_that_comes_with_the_second_try():
    """systemd.service(5): without RestartMode=direct each failed try fails the start of what requires the unit, for good."""
    server, model = ((AMI / name).read_text().splitlines() for name in ("manylora.service", "manylora-model.service"))
    assert "Requires=manylora-model.service" in server and "After=manylora-model.service" in server
    assert {"Type=oneshot", "Restart=on-failure", "RestartMode=direct"} <= set(model[model.index("[Service]") :])
    assert {"StartLimitIntervalSec=3600", "StartLimitBurst=5"} <= set(model[: model.index("[Service]")])


def test_an_upgrade_of_packages_restarts_none_of_our_units():
    text = (AMI / "needrestart.conf").read_text()
    pattern, value = re.search(r"^\$nrconf\{override_rc\}\{qr\((.+?)\)\} = (\d);$", text, re.MULTILINE).groups()
    assert value == "0" and all(re.search(pattern, unit.name) for unit in AMI.glob("*.service"))
    assert "needrestart.conf" in (AMI / "configure.sh").read_text() and "ami/needrestart.conf" in read_content()


def test_the_servers_unit_gives_a_drain_its_time():
    unit = (AMI / "manylora.service").read_text()
    assert "KillMode=mixed" in unit and "KillSignal=SIGTERM" in unit and "Restart=always" in unit
    assert "TimeoutStopSec" in (AMI / "configure.sh").read_text()
    assert "STOP_S=$((${MANYLORA_DRAIN_TIMEOUT_S%.*} + 30))" in SCRIPT.read_text()

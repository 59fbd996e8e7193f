"""The grace period is the sum of the boot's phases, and measured phases come back into the table."""

import shutil
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from infra.boot_phases import TABLE, grace_s, read_measured, write_measured
from infra.config import KitConfig
from infra.user_data import SCRIPT

ROOT = Path(__file__).parents[2]


def config(**overrides):
    return KitConfig.load("dev", ROOT, overrides)


def test_the_phases_are_those_that_the_script_times():
    phases = set(tomllib.loads(TABLE.read_text())["seconds"])
    timed = {line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("step ")}
    assert phases == timed | {"launch"}


def test_the_grace_period_is_their_sum_with_a_margin():
    table = {"margin": 2.0, "seconds": {"launch": 60, "install": 400, "ready": 130}}
    assert grace_s(config(), table) == 1200
    assert grace_s(config(**{"image.kind": "baked"}), table) == 420  # the install is behind it: 380, to whole minutes
    assert grace_s(config(**{"fleet.grace_s": 777}), table) == 777
    assert grace_s(config(), {"margin": 9.0, "seconds": {"launch": 4000}}) == 7200


def test_a_projection_says_so():
    table = tomllib.loads(TABLE.read_text())
    assert table["measured"] is False or "measured" in TABLE.read_text().split("measured = true")[1].splitlines()[0] + "measured"


class CloudWatch:
    """Datapoints by phase; parameters as the service wants them."""

    def __init__(self, maxima) -> None:
        self._maxima = maxima

    def get_metric_statistics(self, **asked):
        assert asked["Namespace"] == "Manylora" and asked["MetricName"] == "BootSeconds" and asked["Statistics"] == ["Maximum"]
        dimensions = {item["Name"]: item["Value"] for item in asked["Dimensions"]}
        assert dimensions["AutoScalingGroupName"] == "group"
        return {"Datapoints": [{"Maximum": value, "Timestamp": datetime.now(UTC)} for value in self._maxima.get(dimensions["Step"], [])]}


def test_measured_phases_replace_projections_and_comments_stay(tmp_path):
    path = tmp_path / "boot-phases.toml"
    shutil.copy(TABLE, path)
    before = tomllib.loads(path.read_text())["seconds"]
    measured = read_measured(CloudWatch({"mount": [3.2, 8.7], "model": [41.0]}), "group", list(before))
    assert measured == {"mount": 8.7, "model": 41.0}
    write_measured(path, measured, "group")
    table = tomllib.loads(path.read_text())
    assert table["measured"] is True and table["seconds"] == before | {"mount": 9, "model": 41}
    assert "# with amazon-efs-utils" in path.read_text()


def test_nothing_measured_is_an_error_that_says_so(monkeypatch, capsys):
    pytest.importorskip("boto3")
    from infra import boot_phases

    monkeypatch.setattr("boto3.client", lambda *_, **__: CloudWatch({}))
    monkeypatch.setattr("sys.argv", ["boot_phases", "--group", "group"])
    assert boot_phases.main() == 1 and "published no BootSeconds" in capsys.readouterr().err

"""The app as `npx cdk` runs it: context in, templates or a refusal out."""

import json
import os
import subprocess
import sys

import pytest

from tests.infra.conftest import ROOT, context


def run_app(tmp_path, **given):
    """app.py with `given` as `-c` values; (exit status, stderr)."""
    environment = os.environ | {"CDK_OUTDIR": str(tmp_path), "CDK_CONTEXT_JSON": json.dumps(context() | given)}
    environment.pop("CDK_DEFAULT_REGION", None)
    result = subprocess.run([sys.executable, "app.py"], cwd=ROOT, env=environment, capture_output=True, text=True)
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"flet.max": "3"}, "error: the configuration of env dev"),
        ({"env": "staging"}, "error: env staging"),
        ({"fleet.instance_type": "p5.48xlarge"}, "p5.48xlarge is no G6, Gr6 or G6e instance"),
        ({"region": "eu-west-1"}, "error: region eu-west-1 has no g6 instances"),
        ({"model.source": "bucket", "model.id": "llama-2-13b-hf"}, "The nearest that fits: g6e.xlarge"),
    ],
)
def test_a_refusal_is_one_message_and_no_trace(tmp_path, given, said):
    status, stderr = run_app(tmp_path, **given)
    assert status != 0 and said in stderr and "Traceback" not in stderr
    assert not list(tmp_path.glob("*.template.json"))


def test_keys_of_the_command_line_reach_the_templates(tmp_path, model_dir):
    status, stderr = run_app(tmp_path, **{"name": "mine", "fleet.max": "7"})
    assert status == 0, stderr
    template = json.loads((tmp_path / "mine-service.template.json").read_text())
    (group,) = [item for item in template["Resources"].values() if item["Type"] == "AWS::AutoScaling::AutoScalingGroup"]
    assert group["Properties"]["MaxSize"] == "7"


def test_the_command_line_is_pinned_to_one_that_reads_our_assembly():
    from importlib import metadata

    package = json.loads((ROOT / "package.json").read_text())
    lock = json.loads((ROOT / "package-lock.json").read_text())
    version = package["devDependencies"]["aws-cdk"]
    assert version.startswith("2.") and lock["packages"]["node_modules/aws-cdk"]["version"] == version
    assert metadata.version("aws-cdk-lib").startswith("2.")
    assert json.loads((ROOT / "cdk.json").read_text())["app"] == "${CDK_PYTHON:-.venv/bin/python} app.py"

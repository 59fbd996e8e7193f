"""Every option at least once, each with each other in pairs; what leaves with a destroy and what stays; the linters' gates."""

import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.infra.conftest import ROOT, resources

KEY = "arn:aws:kms:us-east-1:111122223333:key/11111111-2222-3333-4444-555555555555"
EXISTING = {
    "network.vpc_id": "vpc-0123456789abcdef0",
    "network.private_subnet_ids": ["subnet-01234567", "subnet-89abcdef"],
    "network.availability_zones": ["us-east-1a", "us-east-1b"],
}
LAMBDA = "arn:aws:lambda:us-east-1:111122223333:function:authorize"
POOL = "arn:aws:cognito-idp:us-east-1:111122223333:userpool/us-east-1_abcdefghi"
HUB = {"model.source": "hub", "model.hub": True, "model.id": "a/b", "model.revision": "0" * 40}
# Each list is one choice; each entry of it one way to choose.
CHOICES = {
    "network": [{}, {"network.public_fleet": True}, EXISTING, {"network.interface_endpoints": True}],
    "image": [{}, {"image.kind": "baked"}, {"image.kind": "ami", "image.ami_id": "ami-0123456789abcdef0"}, {"image.ami_line": "pytorch"}],
    "storage": [
        {},
        {"storage.kind": "fsx"},
        {"storage.kind": "fsx", "storage.fsx.deployment": "PERSISTENT_2"},
        {"storage.kind": "s3files"},
        {"storage.backup": True, "storage.efs.throughput": "bursting", "storage.efs.transition_days": 0},
    ],
    "fleet": [
        {},
        {"fleet.warm_pool.state": "stopped"},
        {"fleet.warm_pool.state": "running", "fleet.scale_in_protection": True},
        {"fleet.spot_percent": 50, "fleet.fallback_types": ["g6.2xlarge"], "fleet.max": 4},
        {"fleet.min": 0, "fleet.scale_to_zero": True, "fleet.schedules": [{"name": "Day", "cron": "cron(0 7 * * mon-fri)", "min": 1}]},
        {"fleet.instance_type": "g6e.12xlarge", "fleet.desired": 2},
    ],
    "auth": [
        {},
        {"endpoint.quota_per_day": 1000},
        {"endpoint.auth": "iam"},
        {"endpoint.auth": "jwt"},
        {"endpoint.auth": "jwt", "endpoint.jwt_user_pool_arn": POOL},
        {"endpoint.auth": "lambda", "endpoint.lambda_arn": LAMBDA},
    ],
    "edge": [
        {},
        {"endpoint.private": True, "endpoint.vpc_endpoint_ids": ["vpce-0123456789abcdef0"]},
        {"endpoint.waf": True, "endpoint.cors_origins": ["https://example.com"]},
        {"endpoint.domain": "llm.example.com", "endpoint.certificate_arn": "arn:aws:acm:us-east-1:111122223333:certificate/1"},
        {"endpoint.account_logging_role": "existing", "endpoint.timeout_s": 300},
    ],
    "model": [{}, {"model.source": "bucket", "model.id": "mistral"}, HUB],
    "watch": [
        {},
        {"observability.alarm_email": "a@example.com", "observability.monthly_budget_usd": 100},
        {"observability.tracing": "xray"},
        {"observability.tracing": "otlp", "observability.otlp_endpoint": "https://collector.example.com"},
    ],
    "data": [{}, {"retain_data": True}, {"kms_key_arn": KEY}, {"region": "us-east-1", "tags": {"team": "search"}}],
}


def pairwise() -> list[dict]:
    """Configurations in which each pair of entries of two choices occurs: 40 (36 would be the fewest). Greedy, always the same."""
    names = list(CHOICES)
    wanted = {
        ((one, i), (other, j))
        for one, other in itertools.combinations(names, 2)
        for i in range(len(CHOICES[one]))
        for j in range(len(CHOICES[other]))
    }
    draw, rows = random.Random(1), []
    while wanted:
        best = max((_row(min(wanted), wanted, draw) for _ in range(5)), key=lambda row: len(wanted & _pairs(row)))
        wanted -= _pairs(best)
        rows.append({key: value for name in names for key, value in CHOICES[name][best[name]].items()})
    return rows


def _row(seed: tuple, wanted: set, draw: random.Random) -> dict[str, int]:
    """With the pair `seed`; choice by choice, in a drawn order, the entry that makes most of the pairs that are wanted."""
    row, rest = dict(seed), [name for name in CHOICES if name not in dict(seed)]
    draw.shuffle(rest)
    for name in rest:
        gains = [(len(wanted & _pairs(row | {name: i})), draw.random(), i) for i in range(len(CHOICES[name]))]
        row[name] = max(gains)[2]
    return row


def _pairs(row: dict[str, int]) -> set:
    return set(itertools.combinations([(name, row[name]) for name in CHOICES if name in row], 2))


ROWS = pairwise()


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_options_synthesize_in_pairs(synth, row):
    templates = synth(ROWS[row])
    assert set(templates) == {"data", "service"} | ({"image"} if ROWS[row].get("image.kind") == "baked" else set())
    for template in templates.values():
        assert len(template.get("Resources", {})) < 450 and len(json.dumps(template)) < 900_000  # CloudFormation: 500, 1 MB


@pytest.mark.parametrize(
    ("overrides", "env"),
    [
        ({}, "dev"),
        ({}, "prod"),
        ({"storage.kind": "fsx", "endpoint.auth": "jwt", "model.source": "bucket", "model.id": "m"}, "dev"),
        ({"storage.kind": "s3files", "endpoint.auth": "lambda", "endpoint.lambda_arn": LAMBDA, "fleet.warm_pool.state": "stopped"}, "dev"),
        ({"image.kind": "baked", "network.nat": "none", "endpoint.private": True}, "dev"),
        ({**EXISTING, "endpoint.auth": "iam", "retain_data": True}, "dev"),
        ({"kms_key_arn": KEY, "fleet.min": 0, "fleet.scale_to_zero": True, **HUB}, "dev"),
        ({"kms_key_arn": KEY, "storage.kind": "s3files", "fleet.spot_percent": 50, "observability.tracing": "xray"}, "dev"),
    ],
    ids=str,
)
def test_cdk_nag_has_nothing_to_say(synthesize, overrides, env):
    from cdk_nag import AwsSolutionsChecks

    out = synthesize(overrides, env, lambda app: [AwsSolutionsChecks(app, verbose=True)])  # raises on a finding
    report = out / "validation-report.json"
    findings = json.loads(report.read_text())["pluginReports"] if report.exists() else []
    assert not [violation for finding in findings for violation in finding["violations"] if violation.get("severity") != "suppressed"]


def test_cdk_nag_would_have_something_to_say(tmp_path):
    import aws_cdk as cdk
    from aws_cdk import aws_s3 as s3
    from cdk_nag import AwsSolutionsChecks

    app = cdk.App(outdir=str(tmp_path))
    s3.Bucket(cdk.Stack(app, "Careless"), "Bucket")
    cdk.Validations.of(app).add_plugins(AwsSolutionsChecks(app))
    with pytest.raises(RuntimeError, match="AwsSolutions-S1"):
        app.synth()


@pytest.mark.parametrize(("overrides", "env"), [({}, "dev"), ({}, "prod"), (ROWS[0], "dev")], ids=["dev", "prod", "pairs"])
def test_cfn_lint_has_no_findings(synthesize, overrides, env):
    paths = [str(path) for path in synthesize(overrides, env).glob("*.template.json")]
    result = subprocess.run([str(Path(sys.executable).parent / "cfn-lint"), "--", *paths], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("overrides", [{}, *ROWS[1::4]], ids=str)
def test_nothing_is_left_after_a_destroy(synth, overrides):
    if overrides.get("retain_data"):
        pytest.skip("keeps its data, see the next test")
    for part, template in synth(overrides).items():
        for name, item in template.get("Resources", {}).items():
            assert item.get("DeletionPolicy", "Delete") == "Delete", f"{part}/{name} ({item['Type']}) stays"
        emptied = len(resources(template, "Custom::S3AutoDeleteObjects"))
        assert emptied == len(resources(template, "AWS::S3::Bucket"))


@pytest.mark.parametrize("overrides", [{}, ROWS[2]], ids=str)
def test_every_function_logs_to_a_group_of_its_stack(synth, overrides):
    for part, template in synth(overrides).items():
        for name, function in resources(template, "AWS::Lambda::Function").items():
            group = function["Properties"].get("LoggingConfig", {}).get("LogGroup", {}).get("Ref")
            assert group in template["Resources"], f"{part}/{name} would leave a log group behind"
        for name, group in resources(template, "AWS::Logs::LogGroup").items():
            assert "RetentionInDays" in group["Properties"], f"{part}/{name}"


def test_retain_data_keeps_data_and_nothing_else(synth, synthesize):
    templates = synth({"retain_data": True})
    kept = {
        item["Type"]
        for template in templates.values()
        for item in template["Resources"].values()
        if item.get("DeletionPolicy", "Delete") != "Delete"
    }
    assert kept <= {"AWS::S3::Bucket", "AWS::S3::BucketPolicy", "AWS::EFS::FileSystem"} and "AWS::EFS::FileSystem" in kept
    assert "KeptOnDestroy" in templates["data"]["Outputs"]
    manifest = json.loads((synthesize({"retain_data": True}) / "manifest.json").read_text())
    stacks = [item for item in manifest["artifacts"].values() if item["type"] == "aws:cloudformation:stack"]
    assert len(stacks) == 2 and all(stack["properties"]["terminationProtection"] for stack in stacks)


def test_nothing_is_looked_up(synthesize):
    for overrides in ({}, EXISTING, {"region": "eu-west-1", "network.max_azs": 3}):
        assert "missing" not in json.loads((synthesize(overrides) / "manifest.json").read_text())


def test_tags_are_on_what_costs(synth):
    for template in synth({"tags": {"team": "search"}}).values():
        for name, item in template["Resources"].items():
            if item["Type"] in ("AWS::S3::Bucket", "AWS::EC2::VPC", "AWS::AutoScaling::AutoScalingGroup", "AWS::EC2::NatGateway"):
                tags = {tag["Key"]: tag["Value"] for tag in item["Properties"]["Tags"]}
                assert tags["team"] == "search", name


def test_no_secret_and_no_account_is_in_a_template(synth):
    for template in synth().values():
        text = json.dumps(template)
        assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|hf_[A-Za-z0-9]{20}", text)
        assert not re.search(r"\b[0-9]{12}\b(?!\.)", text.replace("000000000000", ""))

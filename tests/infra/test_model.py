"""The base model: where instances get it, and the deploy that stops when it is not there."""

import importlib.util
import json
import sys
import types

import aws_cdk as cdk
import boto3
import pytest
from aws_cdk import assertions
from aws_cdk import aws_iam as iam
from moto import mock_aws

from infra.config import ConfigError, KitConfig
from infra.model import _CHECK, BaseModel
from infra.network import Network
from infra.storage import Bucket, make_shared_files
from tests.infra.conftest import ROOT, context, resources

BUCKET, PREFIX = "models-bucket", "models/mistral/"
FROM_BUCKET = {"model.source": "bucket", "model.id": "mistral"}


def make(embedded_dir, **overrides):
    """(BaseModel, template) in a stack of its own, with a role that reads."""
    config = KitConfig.load("dev", ROOT, overrides)
    stack = cdk.Stack(cdk.App(context=context()), "Test")
    bucket = Bucket(stack, "Bucket", config=config)
    files = make_shared_files(stack, config=config, network=Network(stack, "Network", config=config), bucket=bucket)
    model = BaseModel(stack, "BaseModel", config=config, bucket=bucket, shared_files=files, embedded_dir=embedded_dir)
    model.grant_read(iam.Role(stack, "Instance", assumed_by=iam.ServicePrincipal("ec2.amazonaws.com")))
    origin = stack.resolve(model.origin)
    return model, origin, assertions.Template.from_stack(stack).to_json()


def test_the_embedded_model_is_an_asset_that_instances_may_read(embedded_dir):
    model, origin, template = make(embedded_dir)
    assert model.check is None and json.dumps(origin).endswith('.zip"}') and "s3://" in json.dumps(origin)
    (policy,) = [item for name, item in resources(template, "AWS::IAM::Policy").items() if name.startswith("Instance")]
    (statement,) = policy["Properties"]["PolicyDocument"]["Statement"]
    assert statement["Action"] == "s3:GetObject" and json.dumps(statement["Resource"]).count(".zip") == 1


def test_an_embedded_model_that_was_not_made_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="model.source: the embedded model is not at .* Run `make model`"):
        make(tmp_path)


def test_a_model_of_the_bucket_is_checked_before_the_fleet(embedded_dir):
    _, origin, template = make(embedded_dir, **FROM_BUCKET)
    assert "models/mistral" in json.dumps(origin)
    (check,) = resources(template, "Custom::BaseModelCheck").values()
    assert check["Properties"]["Prefix"] == "models/mistral/" and "infra.push_model" in json.dumps(check["Properties"]["Hint"])


@pytest.mark.parametrize("kind", ["fsx", "s3files"])
def test_a_file_system_that_shows_the_bucket_is_read_in_place(embedded_dir, kind):
    _, origin, _ = make(embedded_dir, **FROM_BUCKET, **{"storage.kind": kind})
    assert origin == "/mnt/manylora/models/mistral"


def test_a_model_of_the_hub_is_pinned_by_its_commit(embedded_dir):
    revision = "0123456789abcdef0123456789abcdef01234567"
    overrides = {"model.source": "hub", "model.hub": True, "model.id": "owner/name", "model.revision": revision}
    model, origin, _ = make(embedded_dir, **overrides)
    assert origin == f"hub://owner/name@{revision}" and model.check is None


class Answers(types.ModuleType):
    """Stands for cfnresponse, the module that Lambda gives to inlined code."""

    SUCCESS, FAILED = "SUCCESS", "FAILED"

    def __init__(self):
        super().__init__("cfnresponse")
        self.sent = []

    def send(self, event, context, status, data, physical_id, no_echo=False, reason=None):
        self.sent.append((status, reason))


@pytest.fixture
def check(monkeypatch):
    """(handler's answer to a request, S3 client) against moto."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    answers = Answers()
    monkeypatch.setitem(sys.modules, "cfnresponse", answers)
    spec = importlib.util.spec_from_file_location("check_model", _CHECK)
    module = importlib.util.module_from_spec(spec)
    with mock_aws():
        spec.loader.exec_module(module)
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)

        def ask(kind="Create", bucket=BUCKET):
            properties = {"Bucket": bucket, "Prefix": PREFIX, "Hint": "Put it there."}
            module.handler({"RequestType": kind, "ResourceProperties": properties}, None)
            return answers.sent[-1]

        yield ask, client


def put(client, manifest, **files):
    body = manifest if isinstance(manifest, str) else json.dumps(manifest)
    client.put_object(Bucket=BUCKET, Key=PREFIX + "manifest.json", Body=body)
    for name, content in files.items():
        client.put_object(Bucket=BUCKET, Key=PREFIX + name, Body=content)


def test_check_passes_a_whole_model_and_any_deletion(check):
    ask, client = check
    assert ask("Delete") == ("SUCCESS", None)
    put(client, {"files": {"config": {"bytes": 2}, "weights": {"bytes": 3}}}, config=b"{}", weights=b"abc")
    assert ask() == ("SUCCESS", None)


def test_check_names_what_is_missing(check):
    ask, client = check
    status, reason = ask()
    assert status == "FAILED" and f"s3://{BUCKET}/{PREFIX}manifest.json does not exist. Put it there." in reason
    put(client, {"files": {"weights": {"bytes": 3}}})
    assert f"s3://{BUCKET}/{PREFIX}weights has no bytes, the manifest says 3" in ask("Update")[1]
    put(client, {"files": {"weights": {"bytes": 3}}}, weights=b"ab")
    assert "weights has 2 bytes, the manifest says 3" in ask()[1]
    for broken in ("not json", "[]", "{}"):
        put(client, broken)
        assert "manifest.json is not a manifest" in ask()[1]


def test_check_says_what_to_do_where_s3_denies_a_missing_key(check, monkeypatch):
    """The role's right to list is bound to the prefix, and with such a right S3 answers 403, not 404, to who asks for what is not there."""
    ask, client = check

    def denied(**_):
        raise client.exceptions.ClientError({"Error": {"Code": "AccessDenied"}}, "GetObject")

    monkeypatch.setattr(client, "get_object", denied)
    monkeypatch.setattr(boto3, "client", lambda service: client)
    assert "manifest.json does not exist. Put it there." in ask()[1]


def test_check_answers_when_the_bucket_cannot_be_read(check):
    ask, _ = check
    status, reason = ask(bucket="another-bucket")
    assert status == "FAILED" and reason


def test_check_fits_into_a_template():
    assert len(_CHECK.read_text()) < 4096

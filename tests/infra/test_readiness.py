"""The account's readiness: each question against moto, the quota against botocore's model (moto has none for EC2)."""

from types import SimpleNamespace

import boto3
import pytest
from botocore.stub import Stubber
from moto import mock_aws

from infra import readiness
from infra.config import KitConfig
from infra.image import parent_parameter
from infra.readiness import BOOTSTRAP_PARAMETER, CHECKS, ON_DEMAND, ROOT, SPOT, Account, Finding, State, inspect

REGION = "us-east-1"
AMI = "ami-12c6146b"  # moto has it


@pytest.fixture
def account(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    with mock_aws():
        yield Account(boto3.session.Session(), REGION)


def config_of(**keys):
    return KitConfig.load("dev", ROOT, {name.replace("__", "."): value for name, value in keys.items()})


def the(account, config, name) -> Finding:
    (finding,) = inspect(account, config, [name])
    return finding


def quota(account, code: str, value: float) -> Stubber:
    stubber = Stubber(account["service-quotas"])
    stubber.add_response("get_service_quota", {"Quota": {"QuotaCode": code, "Value": value}}, {"ServiceCode": "ec2", "QuotaCode": code})
    stubber.activate()
    return stubber


@pytest.mark.parametrize(("value", "state"), [(0.0, State.MISSING), (4.0, State.LATER), (8.0, State.READY)])
def test_the_quota_is_held_against_the_fleets_least_and_most(account, value, state):
    """dev: 1 to 2 g6.xlarge of 4 vCPUs."""
    quota(account, ON_DEMAND[0], value)
    finding = the(account, config_of(), "quota")
    assert finding.state is state, finding.text
    assert ("--desired-value 8" in finding.text) == (state is not State.READY)


def test_what_runs_already_counts_against_the_quota(account):
    client = account["ec2"]
    client.run_instances(ImageId=AMI, InstanceType="g4dn.xlarge", MinCount=1, MaxCount=1)
    client.run_instances(ImageId=AMI, InstanceType="m5.xlarge", MinCount=1, MaxCount=1)  # of another family
    quota(account, ON_DEMAND[0], 8.0)
    finding = the(account, config_of(), "quota")
    assert finding.state is State.LATER and "is 8, 4 of it in use" in finding.text and "--desired-value 12" in finding.text


def test_spot_instances_have_a_quota_of_their_own(account):
    stubber = quota(account, ON_DEMAND[0], 4.0)
    stubber.add_response("get_service_quota", {"Quota": {"Value": 0.0}}, {"ServiceCode": "ec2", "QuotaCode": SPOT[0]})
    found = inspect(account, config_of(fleet__max="3", fleet__spot_percent="100"), ["quota"])
    assert [item.state for item in found] == [State.READY, State.LATER], found
    stubber.assert_no_pending_responses()


def test_an_answer_that_is_refused_is_a_finding_with_awss_words(account):
    stubber = Stubber(account["service-quotas"])
    stubber.add_client_error("get_service_quota", "AccessDeniedException", "not authorized to perform: servicequotas:GetServiceQuota")
    stubber.activate()
    finding = the(account, config_of(), "quota")
    assert finding.state is State.MISSING and "servicequotas:GetServiceQuota" in finding.text


def offer(account, monkeypatch, *zones):
    """moto's offerings follow its own data; what the check makes of them is tried with these."""
    monkeypatch.setattr(
        account["ec2"],
        "describe_instance_type_offerings",
        lambda **given: {"InstanceTypeOfferings": [{"InstanceType": "g6.xlarge", "Location": zone} for zone in zones]},
    )


def test_the_zones_that_the_stacks_take_must_offer_the_type(account, monkeypatch):
    offer(account, monkeypatch, "us-east-1a", "us-east-1b")
    assert the(account, config_of(), "zones").state is State.READY
    offer(account, monkeypatch, "us-east-1b", "us-east-1c")
    finding = the(account, config_of(), "zones")
    assert finding.state is State.MISSING and 'network.availability_zones = ["us-east-1b", "us-east-1c"]' in finding.text
    offer(account, monkeypatch)
    assert "another region" in the(account, config_of(), "zones").text


def test_the_offerings_are_asked_as_ec2_takes_it(account):
    """moto checks the parameters and answers by zone; which types it knows changes with its version."""
    assert the(account, config_of(), "zones").name == "zones"
    assert "could not be asked" not in the(account, config_of(), "zones").text


@pytest.mark.parametrize(("version", "state"), [(None, State.MISSING), ("5", State.MISSING), ("30", State.READY)])
def test_the_bootstrap_stack(account, version, state):
    if version:
        account["ssm"].put_parameter(Name=BOOTSTRAP_PARAMETER, Value=version, Type="String")
    finding = the(account, config_of(), "bootstrap")
    assert finding.state is state and ("cdk bootstrap" in finding.text) == (state is State.MISSING)


def test_the_image(account, monkeypatch):
    config = config_of()
    missing = the(account, config_of(image__version="ami-0123456789abcdef0"), "image")
    assert missing.state is State.MISSING and "cannot be seen" in missing.text
    assert the(account, config_of(image__version=AMI), "image").state is State.READY
    baked = the(account, config_of(image__kind="baked"), "image")
    assert baked.state is State.MISSING and "StartImagePipeline" in baked.text
    real, name = readiness._parameter, parent_parameter(config)
    monkeypatch.setattr(readiness, "_parameter", lambda account, asked: AMI if asked == name else real(account, asked))
    assert the(account, config, "image").state is State.READY


def test_the_embedded_model(account, monkeypatch, tmp_path):
    monkeypatch.setattr(readiness, "EMBEDDED_DIR", tmp_path)
    assert "make model" in the(account, config_of(), "model").text
    (tmp_path / "manifest.json").write_text("{}")
    assert the(account, config_of(), "model").state is State.READY


def test_a_model_in_the_bucket(account):
    config = config_of(model__source="bucket", model__id="mistral")
    assert "not deployed" in the(account, config, "model").text
    account["s3"].create_bucket(Bucket="models-of-a-test")
    template = '{"Resources": {"T": {"Type": "AWS::SNS::Topic"}}, "Outputs": {"BucketName": {"Value": "models-of-a-test"}}}'
    account["cloudformation"].create_stack(StackName="manylora-data", TemplateBody=template)
    finding = the(account, config, "model")
    assert finding.state is State.MISSING and "push_model" in finding.text
    account["s3"].put_object(Bucket="models-of-a-test", Key="models/mistral/manifest.json", Body=b"{}")
    assert the(account, config, "model").state is State.READY


def test_a_model_of_the_hub_is_asked_for_with_the_secrets_token(account, monkeypatch):
    import huggingface_hub

    asked = []

    class Hub:
        def __init__(self, token):
            self.token = token

        def model_info(self, name, revision):
            asked.append((name, revision, self.token))
            if self.token is False:
                raise OSError("401 gated")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    keys = {"model__source": "hub", "model__hub": "true", "model__id": "owner/gated", "model__revision": "a" * 40}
    assert "accept the model's terms" in the(account, config_of(**keys), "model").text
    arn = account["secretsmanager"].create_secret(Name="hub", SecretString="a token")["ARN"]
    assert the(account, config_of(**keys, model__hub_secret_arn=arn), "model").state is State.READY
    assert asked == [("owner/gated", "a" * 40, False), ("owner/gated", "a" * 40, "a token")]


def test_the_accounts_one_role_for_logs(account, monkeypatch):
    monkeypatch.setattr(account["apigateway"], "get_account", lambda: {})
    assert the(account, config_of(), "gateway role").state is State.READY
    assert the(account, config_of(endpoint__account_logging_role="existing"), "gateway role").state is State.MISSING
    monkeypatch.setattr(account["apigateway"], "get_account", lambda: {"cloudwatchRoleArn": "arn:aws:iam::1:role/other"})
    assert the(account, config_of(), "gateway role").state is State.LATER
    assert the(account, config_of(endpoint__account_logging_role="existing"), "gateway role").state is State.READY


def test_the_command_says_each_finding_and_fails_on_what_is_missing(account, monkeypatch, capsys):
    said = {"quota": Finding("quota", State.LATER, "later"), "bootstrap": Finding("bootstrap", State.READY, "version 30")}
    monkeypatch.setattr(readiness, "inspect", lambda account, config: list(said.values()))
    assert readiness.main(["--region", REGION]) == 0
    said["image"] = Finding("image", State.MISSING, "no image")
    assert readiness.main(["--region", REGION]) == 1
    assert "missing  image         no image" in capsys.readouterr().out
    assert readiness.main(["--env", "nobody"]) == 1


def test_every_check_yields_findings_of_its_name(account, monkeypatch):
    monkeypatch.setattr(readiness, "EMBEDDED_DIR", ROOT)
    quota(account, ON_DEMAND[0], 8.0)
    found = inspect(account, config_of())
    assert [item.name for item in found] == list(CHECKS)
    assert isinstance(found[0], Finding) and SimpleNamespace(**vars(found[0])).text

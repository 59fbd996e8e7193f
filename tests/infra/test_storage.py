"""Bucket and shared file systems. Every registered kind runs through the contract."""

import json

import aws_cdk as cdk
import pytest
from aws_cdk import assertions
from aws_cdk import aws_iam as iam

from infra.config import KitConfig
from infra.network import Network
from infra.storage import SHARED_FILES, Bucket, make_shared_files
from infra.storage.base import MOUNT_POINT
from tests.infra.conftest import ROOT, context, resources

KINDS = sorted(SHARED_FILES)
KEY = "arn:aws:kms:us-east-1:111122223333:key/11111111-2222-3333-4444-555555555555"


def make(kind, **overrides):
    """(file system, template) in a stack of its own, with a role that may mount."""
    config = KitConfig.load("dev", ROOT, {"storage.kind": kind, **overrides})
    stack = cdk.Stack(cdk.App(context=context()), "Test")
    network = Network(stack, "Network", config=config)
    bucket = Bucket(stack, "Bucket", config=config)
    files = make_shared_files(stack, config=config, network=network, bucket=bucket)
    role = iam.Role(stack, "Instance", assumed_by=iam.ServicePrincipal("ec2.amazonaws.com"))
    bucket.grant_read(role)
    files.grant_mount(role)
    return files, assertions.Template.from_stack(stack).to_json()


@pytest.fixture(scope="module")
def made():
    return {kind: make(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_contract_mount_variables(made, kind):
    files, _ = made[kind]
    variables = files.mount_variables()
    assert set(variables) == {"MOUNT_KIND", "MOUNT_SOURCE", "MOUNT_OPTIONS", "MOUNT_POINT"}
    assert variables["MOUNT_POINT"] == MOUNT_POINT and "_netdev" in variables["MOUNT_OPTIONS"]
    assert isinstance(files.shows_bucket, bool)


@pytest.mark.parametrize("kind", KINDS)
def test_contract_only_the_fleet_reaches_it(made, kind):
    _, template = made[kind]
    (storage_group,) = [name for name in resources(template, "AWS::EC2::SecurityGroup") if "StorageSecurityGroup" in name]
    rules = [rule["Properties"] for rule in resources(template, "AWS::EC2::SecurityGroupIngress").values()]
    rules = [rule for rule in rules if rule["GroupId"]["Fn::GetAtt"][0] == storage_group]
    sources = {rule["SourceSecurityGroupId"]["Fn::GetAtt"][0] for rule in rules}
    assert any("FleetSecurityGroup" in source for source in sources)
    assert all("FleetSecurityGroup" in source or source == storage_group for source in sources)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("retain", [False, True])
def test_contract_data_is_gone_or_kept(kind, retain):
    files, template = make(kind, retain_data=retain)
    named = [f"AWS::{name}" for name in ("EFS::FileSystem", "FSx::FileSystem", "S3Files::FileSystem", "S3::Bucket")]
    kept = [item for item in template["Resources"].values() if item["Type"] in named]
    assert len(kept) == 3 and len(files.resources) == 1
    assert {item["DeletionPolicy"] for item in kept} == {"Retain" if retain else "Delete"}
    assert bool(resources(template, "Custom::S3AutoDeleteObjects")) != retain


@pytest.mark.parametrize("kind", KINDS)
def test_contract_encrypted_with_the_customers_key(kind):
    overrides = {"storage.fsx.deployment": "PERSISTENT_2"} if kind == "fsx" else {}
    _, template = make(kind, kms_key_arn=KEY, **overrides)
    (file_system,) = [item for item in template["Resources"].values() if item["Type"].endswith("::FileSystem")]
    assert KEY.endswith(file_system["Properties"]["KmsKeyId"])


@pytest.mark.parametrize("kind", KINDS)
def test_contract_mounting_is_granted_on_this_file_system_alone(made, kind):
    _, template = made[kind]
    statements = [
        statement
        for policy in resources(template, "AWS::IAM::Policy").values()
        for statement in policy["Properties"]["PolicyDocument"]["Statement"]
        if "ClientMount" in json.dumps(statement["Action"])
    ]
    if kind == "fsx":
        assert not statements
        return
    (statement,) = statements
    assert "AccessPointArn" in json.dumps(statement["Condition"])
    assert kind == "s3files" or not any("Root" in action for action in statement["Action"])  # its root folder is root's
    assert "FileSystem" in json.dumps(statement["Resource"])


def test_efs_is_elastic_encrypted_and_in_each_zone(made):
    _, template = made["efs"]
    (file_system,) = resources(template, "AWS::EFS::FileSystem").values()
    assert file_system["Properties"]["Encrypted"] is True and file_system["Properties"]["ThroughputMode"] == "elastic"
    assert "BackupPolicy" not in file_system["Properties"]
    assert len(resources(template, "AWS::EFS::MountTarget")) == 2
    (point,) = resources(template, "AWS::EFS::AccessPoint").values()
    assert point["Properties"]["PosixUser"] == {"Uid": "8080", "Gid": "8080"}
    _, backed_up = make("efs", **{"storage.backup": True})
    (file_system,) = resources(backed_up, "AWS::EFS::FileSystem").values()
    assert file_system["Properties"]["BackupPolicy"]["Status"] == "ENABLED"


def test_fsx_is_linked_to_the_bucket_in_both_deployments(made):
    _, scratch = made["fsx"]
    (file_system,) = resources(scratch, "AWS::FSx::FileSystem").values()
    assert file_system["Properties"]["LustreConfiguration"]["AutoImportPolicy"] == "NEW_CHANGED_DELETED"
    _, persistent = make("fsx", **{"storage.fsx.deployment": "PERSISTENT_2", "storage.fsx.throughput": 250})
    (link,) = resources(persistent, "AWS::FSx::DataRepositoryAssociation").values()
    assert link["Properties"]["S3"]["AutoImportPolicy"]["Events"] == ["NEW", "CHANGED", "DELETED"]
    assert link["Properties"]["BatchImportMetaDataOnCreate"] is True  # a bucket of an earlier file system is not empty


def test_lustre_speaks_both_ways(made):
    """Its servers open connections to their clients, too: AWS wants 988 and 1018 to 1023 let in on either side."""
    _, template = made["fsx"]
    ways = {}
    for kind, other in (("Ingress", "SourceSecurityGroupId"), ("Egress", "DestinationSecurityGroupId")):
        for rule in resources(template, f"AWS::EC2::SecurityGroup{kind}").values():
            here, there = (rule["Properties"][key]["Fn::GetAtt"][0].removeprefix("Network") for key in ("GroupId", other))
            ways.setdefault((kind, here[:5], there[:5]), set()).add((rule["Properties"]["FromPort"], rule["Properties"]["ToPort"]))
    for way in (("Fleet", "Stora"), ("Stora", "Fleet"), ("Stora", "Stora")):
        for kind in ("Ingress", "Egress"):
            assert {(988, 988), (1018, 1023)} <= ways[kind, *way]


def test_s3files_may_do_no_more_than_keep_the_bucket_in_step(made):
    _, template = made["s3files"]
    assert len(resources(template, "AWS::S3Files::MountTarget")) == 2
    (role,) = [role for name, role in resources(template, "AWS::IAM::Role").items() if "SyncRole" in name]
    trust = role["Properties"]["AssumeRolePolicyDocument"]["Statement"][0]
    assert trust["Principal"]["Service"] == "elasticfilesystem.amazonaws.com" and "aws:SourceAccount" in json.dumps(trust["Condition"])


def test_the_bucket_is_private_versioned_and_logged(made):
    _, template = made["efs"]
    buckets = resources(template, "AWS::S3::Bucket")
    (main,) = [item["Properties"] for item in buckets.values() if "VersioningConfiguration" in item["Properties"]]
    assert main["VersioningConfiguration"]["Status"] == "Enabled" and "LoggingConfiguration" in main
    for item in buckets.values():
        assert set(item["Properties"]["PublicAccessBlockConfiguration"].values()) == {True}
        assert "BucketEncryption" in item["Properties"]
    for policy in resources(template, "AWS::S3::BucketPolicy").values():
        assert "aws:SecureTransport" in json.dumps(policy["Properties"]["PolicyDocument"])


def test_instances_read_the_prefixes_and_nothing_else(made):
    _, template = made["efs"]
    (policy,) = [item for name, item in resources(template, "AWS::IAM::Policy").items() if name.startswith("Instance")]
    reading = [item for item in policy["Properties"]["PolicyDocument"]["Statement"] if "s3:" in json.dumps(item["Action"])]
    text = json.dumps(reading)
    assert '/models/*"' in text and '/adapters/*"' in text and "Put" not in text and "Delete" not in text and '"s3:*' not in text
    listing = next(item for item in reading if item["Action"] == "s3:ListBucket")
    assert listing["Condition"]["StringLike"]["s3:prefix"] == ["models/", "models/*", "adapters/", "adapters/*"]

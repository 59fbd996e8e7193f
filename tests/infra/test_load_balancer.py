"""The load balancer: internal, slower to give up than the gateway, logged, and no rule written twice."""

import json

from infra.config import KitConfig
from infra.endpoint import edge_settings
from tests.infra.edge_stack import ROOT, synth

ATTRIBUTES = "LoadBalancerAttributes"


def attributes(resource, name=ATTRIBUTES):
    return {item["Key"]: item["Value"] for item in resource[name]}


def test_it_is_internal_and_waits_longer_than_the_gateway():
    template = synth({"endpoint.timeout_s": 600, "fleet.drain_s": 200})
    balancer = template.one("AWS::ElasticLoadBalancingV2::LoadBalancer")
    assert balancer["Scheme"] == "internal"
    idle_s = int(attributes(balancer)["idle_timeout.timeout_seconds"])
    assert 600 < idle_s < edge_settings(KitConfig.load("dev", ROOT, {"endpoint.timeout_s": 600}))["idle_connection_s"]
    assert attributes(balancer)["routing.http.drop_invalid_header_fields.enabled"] == "true"
    group = template.one("AWS::ElasticLoadBalancingV2::TargetGroup")
    found = attributes(group, "TargetGroupAttributes")
    assert found["load_balancing.algorithm.type"] == "least_outstanding_requests"
    assert found["deregistration_delay.timeout_seconds"] == "200"
    assert group["HealthCheckPath"] == "/health" and group["Port"] == 8080 and group["Matcher"] == {"HttpCode": "200"}


def test_it_is_protected_with_the_data():
    key = "deletion_protection.enabled"
    assert attributes(synth({"retain_data": True}).one("AWS::ElasticLoadBalancingV2::LoadBalancer"))[key] == "true"
    assert attributes(synth().one("AWS::ElasticLoadBalancingV2::LoadBalancer"))[key] == "false"


def test_the_access_logs_go_to_a_bucket_that_is_private_and_emptied():
    template = synth({"observability.log_days": 7})
    bucket = template.one("AWS::S3::Bucket")
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    assert bucket["LifecycleConfiguration"]["Rules"][0]["ExpirationInDays"] == 7
    assert bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"][0]["ServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    (name,) = template.of_type("AWS::S3::Bucket")
    assert template["Resources"][name]["DeletionPolicy"] == "Delete" and template.of_type("Custom::S3AutoDeleteObjects")
    statements = template.one("AWS::S3::BucketPolicy")["PolicyDocument"]["Statement"]
    (delivery,) = [item for item in statements if "logdelivery" in json.dumps(item)]
    assert delivery["Condition"] == {"StringEquals": {"aws:SourceAccount": {"Ref": "AWS::AccountId"}}}
    found = attributes(template.one("AWS::ElasticLoadBalancingV2::LoadBalancer"))
    assert found["access_logs.s3.enabled"] == "true" and found["access_logs.s3.bucket"] == {"Ref": name}


def test_the_access_logs_are_kept_with_the_data():
    template = synth({"retain_data": True})
    (name,) = template.of_type("AWS::S3::Bucket")
    assert template["Resources"][name]["DeletionPolicy"] == "Retain" and not template.of_type("Custom::S3AutoDeleteObjects")


def test_no_rule_of_a_security_group_is_written_twice():
    """A fleet that registers with the balancer asks for rules, too; EC2 refuses an equal second one, and the deploy with it."""
    both = (synth(), synth().data)
    rules = [
        json.dumps([kind, {key: value for key, value in rule.items() if key != "Description"}], sort_keys=True)
        for template in both
        for kind in ("AWS::EC2::SecurityGroupIngress", "AWS::EC2::SecurityGroupEgress")
        for rule in template.of_type(kind).values()
    ]
    assert len(rules) == len(set(rules)) == 4
    assert not synth().of_type("AWS::EC2::SecurityGroup")
    assert "0.0.0.0/0" not in json.dumps([template.of_type("AWS::EC2::SecurityGroupIngress") for template in both])

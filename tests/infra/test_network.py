"""The network: who may speak to whom, and that nothing is open to the world."""

import json

import pytest

from tests.infra.conftest import resources

NO_WAY_OUT = {"network.nat": "none", "image.kind": "baked"}
EXISTING = {
    "network.vpc_id": "vpc-0123456789abcdef0",
    "network.private_subnet_ids": ["subnet-01234567", "subnet-89abcdef"],
    "network.availability_zones": ["us-east-1a", "us-east-1b"],
}


def ingress(templates):
    """Every ingress rule of every stack."""
    for template in templates.values():
        for group in resources(template, "AWS::EC2::SecurityGroup").values():
            yield from group["Properties"].get("SecurityGroupIngress", [])
        yield from (rule["Properties"] for rule in resources(template, "AWS::EC2::SecurityGroupIngress").values())


@pytest.mark.parametrize("overrides", [{}, NO_WAY_OUT, EXISTING, {"storage.kind": "fsx"}, {"network.public_fleet": True}], ids=str)
def test_no_rule_lets_the_world_in(synth, overrides):
    rules = list(ingress(synth(overrides)))
    assert rules and all("CidrIp" not in rule and "CidrIpv6" not in rule for rule in rules), rules


def test_the_administrators_range_alone_gets_ssh_and_icmp(synth):
    rules = list(ingress(synth({"network.admin_cidr": "10.9.8.0/24", "network.key_pair": "mine"})))
    open_rules = sorted((rule["IpProtocol"], rule.get("FromPort"), rule["CidrIp"]) for rule in rules if "CidrIp" in rule)
    assert open_rules == [("icmp", -1, "10.9.8.0/24"), ("tcp", 22, "10.9.8.0/24")]


@pytest.mark.parametrize(("endpoint", "ports"), [("http://collector:4318", [80, 443, 4318]), ("https://collector", [80, 443])])
def test_a_collector_of_traces_is_reached_on_its_port(synth, endpoint, ports):
    data = synth({"observability.tracing": "otlp", "observability.otlp_endpoint": endpoint})["data"]
    (fleet,) = [item for name, item in resources(data, "AWS::EC2::SecurityGroup").items() if "FleetSecurityGroup" in name]
    rules = fleet["Properties"]["SecurityGroupEgress"]
    assert sorted(rule["FromPort"] for rule in rules if rule["CidrIp"] == "0.0.0.0/0") == ports


def test_requests_pass_from_link_to_balancer_to_fleet_and_no_other_way(synth):
    data = synth()["data"]
    rules = resources(data, "AWS::EC2::SecurityGroupIngress").values()
    names = {(_short(rule["SourceSecurityGroupId"]), _short(rule["GroupId"]), rule["FromPort"]) for rule in map(_properties, rules)}
    assert names == {
        ("EdgeSecurityGroup", "BalancerSecurityGroup", 80),
        ("BalancerSecurityGroup", "FleetSecurityGroup", 8080),
        ("FleetSecurityGroup", "StorageSecurityGroup", 2049),
    }


def test_our_own_vpc_has_zones_private_subnets_and_a_free_way_to_s3(synth):
    data = synth()["data"]
    assert len(resources(data, "AWS::EC2::Subnet")) == 4 and len(resources(data, "AWS::EC2::NatGateway")) == 1
    (endpoint,) = resources(data, "AWS::EC2::VPCEndpoint").values()
    assert endpoint["Properties"]["VpcEndpointType"] == "Gateway"
    assert len(resources(data, "AWS::EC2::FlowLog")) == 1
    assert not any(subnet["Properties"].get("MapPublicIpOnLaunch") for subnet in resources(data, "AWS::EC2::Subnet").values())


def test_without_nat_there_is_no_way_out_but_endpoints(synth):
    data = synth(NO_WAY_OUT)["data"]
    for kind in ("NatGateway", "InternetGateway", "EIP"):
        assert not resources(data, f"AWS::EC2::{kind}")
    endpoints = resources(data, "AWS::EC2::VPCEndpoint").values()
    services = json.dumps([endpoint["Properties"]["ServiceName"] for endpoint in endpoints])
    for service in ("ssm", "ssmmessages", "ec2messages", "logs", "monitoring", "autoscaling", "cloudformation", "elasticfilesystem"):
        assert f".{service}" in services, service


@pytest.mark.parametrize(
    ("overrides", "wanted"), [({}, False), ({"endpoint.tenants": True}, True), ({"endpoint.auth": "iam"}, True)], ids=str
)
def test_without_nat_secrets_are_reached_where_a_server_reads_one_at_its_start(synth, overrides, wanted):
    templates = synth(NO_WAY_OUT | overrides)
    assert bool(resources(templates["service"], "AWS::SecretsManager::Secret")) == wanted
    assert ("secretsmanager" in json.dumps(resources(templates["data"], "AWS::EC2::VPCEndpoint"))) == wanted


def test_wheels_in_the_bucket_stand_for_a_way_out(synth):
    templates = synth({"network.nat": "none", "image.wheelhouse_prefix": "wheels/", "endpoint.auth": "iam"})
    assert "secretsmanager" in json.dumps(resources(templates["data"], "AWS::EC2::VPCEndpoint"))
    assert "/wheels/*" in json.dumps(resources(templates["service"], "AWS::IAM::Policy"))
    assert "WHEELHOUSE_URI='s3://" in json.dumps(templates["service"])


def test_zones_by_name_are_used(synth):
    zones = ["eu-west-1a", "eu-west-1c"]
    data = synth({"region": "eu-west-1", "network.availability_zones": zones})["data"]
    assert {subnet["Properties"]["AvailabilityZone"] for subnet in resources(data, "AWS::EC2::Subnet").values()} == set(zones)


def test_three_zones_without_any_look_up(synth):
    data = synth({"network.max_azs": 3})["data"]
    assert len(resources(data, "AWS::EC2::Subnet")) == 6 and len(resources(data, "AWS::EFS::MountTarget")) == 3


def test_an_existing_vpc_is_used_as_it_is(synth):
    data = synth(EXISTING)["data"]
    assert not resources(data, "AWS::EC2::VPC") and not resources(data, "AWS::EC2::Subnet")
    groups = resources(data, "AWS::EC2::SecurityGroup").values()
    assert {group["Properties"]["VpcId"] for group in groups} == {EXISTING["network.vpc_id"]}
    targets = resources(data, "AWS::EFS::MountTarget").values()
    assert {target["Properties"]["SubnetId"] for target in targets} == set(EXISTING["network.private_subnet_ids"])


def test_a_public_fleet_gets_addresses_and_needs_no_nat(synth):
    data = synth({"network.public_fleet": True})["data"]
    subnets = [subnet["Properties"] for subnet in resources(data, "AWS::EC2::Subnet").values()]
    assert sum(bool(subnet.get("MapPublicIpOnLaunch")) for subnet in subnets) == 2
    assert not resources(data, "AWS::EC2::NatGateway") and len(resources(data, "AWS::EC2::InternetGateway")) == 1


def _properties(resource):
    return resource["Properties"]


def _short(reference):
    """The construct's id in a reference to a security group."""
    name = reference["Fn::GetAtt"][0].removeprefix("Network")
    return name[: name.index("Group") + len("Group")]

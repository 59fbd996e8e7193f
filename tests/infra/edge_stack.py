"""The edge's constructs in a bare stack of their own, with a group in the fleet's place; one synthesis for each configuration."""

import json
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aws_cdk as cdk
from aws_cdk import aws_autoscaling as autoscaling
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_iam as iam

from infra.admin_key import AdminKey
from infra.config import KitConfig
from infra.endpoint import Endpoint
from infra.gateway_key import GatewayKey
from infra.load_balancer import LoadBalancer
from infra.network import Network
from infra.observability import Observability
from infra.operations import Operations
from infra.scaling import Scaling
from infra.storage import Bucket

ROOT = Path(__file__).parents[2]
JWT = {"endpoint.auth": "jwt"}
LAMBDA = {"endpoint.auth": "lambda", "endpoint.lambda_arn": "arn:aws:lambda:eu-west-1:111122223333:function:decide"}


def synth(overrides: dict[str, Any] | None = None) -> "Template":
    """The edge stack's template for dev with `overrides`."""
    return _synth(json.dumps(overrides or {}, sort_keys=True))


@lru_cache
def _synth(overrides: str) -> "Template":
    config = KitConfig.load("dev", ROOT, json.loads(overrides))
    app = cdk.App(context=json.loads((ROOT / "cdk.json").read_text())["context"], builtin_cloud_formation_validation=False)
    data, edge = cdk.Stack(app, "data"), cdk.Stack(app, "edge")
    network = Network(data, "Network", config=config)
    load_balancer = LoadBalancer(edge, "LoadBalancer", config=config, network=network)
    admin_key = AdminKey(edge, "AdminKey", config=config)
    gateway_key = GatewayKey(edge, "GatewayKey", config=config)
    endpoint = Endpoint(
        edge, "Endpoint", config=config, network=network, load_balancer=load_balancer, admin_key=admin_key, gateway_key=gateway_key
    )
    fleet = stand_in_fleet(edge, network)
    fleet.group.attach_to_application_target_group(load_balancer.target_group)
    Scaling(edge, "Scaling", config=config, fleet=fleet, load_balancer=load_balancer)
    Operations(edge, "Operations", config=config, fleet=fleet, bucket=Bucket(data, "Bucket", config=config))
    Observability(edge, "Observability", config=config, fleet=fleet, load_balancer=load_balancer, endpoint=endpoint)
    assembly = app.synth()
    template = Template(assembly.get_stack_by_name("edge").template)
    template.data = Template(assembly.get_stack_by_name("data").template)
    return template


def stand_in_fleet(scope: cdk.Stack, network: Network) -> Any:
    """What the edge asks of a fleet."""
    role = iam.Role(scope, "Role", assumed_by=iam.ServicePrincipal("ec2.amazonaws.com"))
    template = ec2.LaunchTemplate(
        scope,
        "LaunchTemplate",
        instance_type=ec2.InstanceType("g6.xlarge"),
        machine_image=ec2.MachineImage.from_ssm_parameter("/ami", os=ec2.OperatingSystemType.LINUX),
        role=role,
        security_group=network.fleet_security_group,
    )
    group = autoscaling.AutoScalingGroup(
        scope, "Group", vpc=network.vpc, vpc_subnets=network.fleet_subnets, launch_template=template, max_capacity=2
    )
    return SimpleNamespace(group=group, role=role, grace_s=900)


class Template(dict):
    """A template, with the questions that tests ask of one. `data`: that of the stack before it."""

    data: "Template"

    def of_type(self, kind: str) -> dict[str, dict[str, Any]]:
        """Logical id -> properties of the resources of `kind`."""
        return {name: item.get("Properties", {}) for name, item in self["Resources"].items() if item["Type"] == kind}

    def one(self, kind: str) -> dict[str, Any]:
        """The properties of the only resource of `kind`."""
        (properties,) = self.of_type(kind).values()
        return properties

    def methods(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(HTTP method, path) -> properties."""
        resources = self.of_type("AWS::ApiGateway::Resource")

        def path(reference: dict[str, Any]) -> str:
            if "Ref" not in reference:  # the API's root
                return ""
            resource = resources[reference["Ref"]]
            return f"{path(resource['ParentId'])}/{resource['PathPart']}"

        methods = self.of_type("AWS::ApiGateway::Method").values()
        return {(method["HttpMethod"], path(method["ResourceId"]) or "/"): method for method in methods}


def text_of(value: Any) -> str:
    """A property as text: what is joined, with references as {Name}."""
    if isinstance(value, str):
        return value
    if "Fn::Join" in value:
        separator, parts = value["Fn::Join"]
        return separator.join(map(text_of, parts))
    return f"{{{value.get('Ref') or '.'.join(value.get('Fn::GetAtt', ['?']))}}}"

"""Network: the VPC (our own or an existing one), its private endpoints, and the security groups, which refer to each other.

Owns who may speak to whom. Does not know what runs in the groups. `stacks` makes it; other constructs take subnets and groups from it.
"""

from urllib.parse import urlsplit

import aws_cdk as cdk
from aws_cdk import aws_ec2 as ec2
from constructs import Construct

from infra.config import KitConfig
from infra.log_group import make_log_group

LISTENER_PORT = 80  # VPC link to load balancer, inside the VPC
SERVER_PORT = 8080
# What instances call: Session Manager, the agent's logs and metrics, the group's hooks, the deploy's signal, mounts, tokens of roles.
_SERVICES = ("ssm", "ssmmessages", "ec2messages", "ec2", "logs", "monitoring", "autoscaling", "cloudformation", "elasticfilesystem", "sts")


class Network(Construct):
    """The VPC and its security groups.

    vpc; fleet_subnets: where instances are; edge_subnets: where load balancer and VPC link are; edge_security_group (VPC link) ->
    balancer_security_group -> fleet_security_group -> storage_security_group; server_port. Opens nothing to the world."""

    server_port = SERVER_PORT
    listener_port = LISTENER_PORT

    def __init__(self, scope: Construct, id: str, *, config: KitConfig) -> None:
        super().__init__(scope, id)
        network = config.network
        self._config = config
        private = ec2.SubnetType.PRIVATE_WITH_EGRESS if network.has_nat else ec2.SubnetType.PRIVATE_ISOLATED
        self.vpc: ec2.IVpc
        if network.vpc_id:
            self.vpc = self._existing_vpc()
            self.edge_subnets = ec2.SubnetSelection(subnets=self.vpc.private_subnets)
            self.fleet_subnets = self.edge_subnets
        else:
            self.vpc = self._own_vpc(private)
            self.edge_subnets = ec2.SubnetSelection(subnet_type=private)
            self.fleet_subnets = ec2.SubnetSelection(subnet_type=ec2.SubnetType.PUBLIC) if network.public_fleet else self.edge_subnets

        self.edge_security_group = self._group("EdgeSecurityGroup", "VPC link of the gateway")
        self.balancer_security_group = self._group("BalancerSecurityGroup", "load balancer")
        self.fleet_security_group = self._group("FleetSecurityGroup", "instances")
        self.storage_security_group = self._group("StorageSecurityGroup", "shared file system")
        self._connect()
        if network.endpoints:
            self._add_endpoints()

    def _existing_vpc(self) -> ec2.IVpc:
        network = self._config.network
        vpc = ec2.Vpc.from_vpc_attributes(
            self,
            "Vpc",
            vpc_id=network.vpc_id,
            availability_zones=list(network.availability_zones),
            private_subnet_ids=list(network.private_subnet_ids),
        )
        unknown = cdk.Acknowledgment(id="Annotation::@aws-cdk/aws-ec2:noSubnetRouteTableId", reason="no route of the owner's is touched")
        cdk.Validations.of(vpc).acknowledge(unknown)
        return vpc

    def _own_vpc(self, private: ec2.SubnetType) -> ec2.Vpc:
        network = self._config.network
        # No zone is looked up: without names, the first zones that the region gives at deploy.
        zones = list(network.availability_zones) or [cdk.Fn.select(index, cdk.Fn.get_azs()) for index in range(network.max_azs)]
        subnets = [ec2.SubnetConfiguration(name="Private", subnet_type=private)]
        if network.has_way_out:
            public = ec2.SubnetConfiguration(name="Public", subnet_type=ec2.SubnetType.PUBLIC, map_public_ip_on_launch=network.public_fleet)
            subnets.insert(0, public)
        vpc = ec2.Vpc(
            self,
            "Vpc",
            ip_addresses=ec2.IpAddresses.cidr(network.cidr),
            availability_zones=zones,
            nat_gateways=1 if network.has_nat else 0,
            subnet_configuration=subnets,
            restrict_default_security_group=False,  # used by nothing; emptying it would take a Lambda function
            gateway_endpoints={"S3": ec2.GatewayVpcEndpointOptions(service=ec2.GatewayVpcEndpointAwsService.S3)},
        )
        if network.flow_logs:
            log_group = make_log_group(self, "FlowLogGroup", config=self._config)
            vpc.add_flow_log("FlowLog", destination=ec2.FlowLogDestination.to_cloud_watch_logs(log_group))
        return vpc

    def _group(self, id: str, who: str) -> ec2.SecurityGroup:
        description = f"{self._config.name}: {who}"
        return ec2.SecurityGroup(self, id, vpc=self.vpc, description=description, allow_all_outbound=False)

    def _connect(self) -> None:
        """The chain edge -> balancer -> fleet, the fleet's way out, and the administrator's range where there is one."""
        edge, balancer, fleet = self.edge_security_group, self.balancer_security_group, self.fleet_security_group
        for source, target, port in ((edge, balancer, LISTENER_PORT), (balancer, fleet, SERVER_PORT)):
            source.add_egress_rule(target, ec2.Port.tcp(port), "requests")
            target.add_ingress_rule(source, ec2.Port.tcp(port), "requests")
        fleet.add_egress_rule(ec2.Peer.any_ipv4(), ec2.Port.HTTPS, "AWS services, S3, packages")
        if self._config.network.has_way_out:
            fleet.add_egress_rule(ec2.Peer.any_ipv4(), ec2.Port.HTTP, "Ubuntu's package mirrors")
        if collector := self._config.observability.otlp_endpoint:
            port = urlsplit(collector).port
            if port not in (None, 80, 443):
                fleet.add_egress_rule(ec2.Peer.any_ipv4(), ec2.Port.tcp(port), "collector of traces")
        if self._config.network.admin_cidr:
            admin = ec2.Peer.ipv4(self._config.network.admin_cidr)
            fleet.add_ingress_rule(admin, ec2.Port.SSH, "administrator, SSH")
            fleet.add_ingress_rule(admin, ec2.Port.all_icmp(), "administrator, ICMP")

    def _add_endpoints(self) -> None:
        """Private ways to the AWS services that an instance calls."""
        group = self._group("EndpointSecurityGroup", "interface endpoints")
        group.add_ingress_rule(self.fleet_security_group, ec2.Port.HTTPS, "instances")
        services = list(_SERVICES)
        endpoint = self._config.endpoint
        # The hub's token, the admin key, the gateway's key: without them no server starts.
        has_secret = self._config.model.hub_secret_arn or endpoint.auth != "api_key" or endpoint.tenants
        services += ["secretsmanager"] if has_secret else []
        services += ["kms"] if self._config.kms_key_arn else []
        services += ["xray"] if self._config.observability.tracing == "xray" else []
        for service in services:
            ec2.InterfaceVpcEndpoint(
                self,
                f"Endpoint-{service}",
                vpc=self.vpc,
                service=ec2.InterfaceVpcEndpointAwsService(service),
                subnets=self.edge_subnets,
                security_groups=[group],
                open=False,
            )

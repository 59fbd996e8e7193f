"""The internal load balancer: spreads requests over the fleet, only ever called by the gateway.

Owns the balancer, its listener, its target group and the bucket of its access logs. Does not know who is behind it: the fleet registers
itself with `target_group`. Reads Network's groups and port; `Endpoint` sends requests to `listener`.
"""

import aws_cdk as cdk
from aws_cdk import aws_elasticloadbalancingv2 as elbv2
from aws_cdk import aws_iam as iam
from aws_cdk import aws_s3 as s3
from constructs import Construct

from infra.acknowledge import acknowledge
from infra.config import KitConfig
from infra.network import Network
from infra.removal import data_policy

HEALTH_PATH = "/health"  # without the stage's prefix, and without a key
IDLE_MARGIN_S = 60
_CHECK_S, _NUM_WELL, _NUM_ILL = 10, 2, 3
ENTER_S = (_NUM_WELL + 1) * _CHECK_S  # from a server's first answer until requests come
LEAVE_S = (_NUM_ILL + 1) * _CHECK_S  # from its first 503 on /health until no more come


class LoadBalancer(Construct):
    """`balancer`, `listener`, `target_group`, `access_logs`."""

    def __init__(self, scope: Construct, id: str, *, config: KitConfig, network: Network) -> None:
        super().__init__(scope, id)
        longest = config.endpoint.timeout_s
        self.access_logs = self._make_log_bucket(config)
        self.balancer = elbv2.ApplicationLoadBalancer(
            self,
            "Balancer",
            vpc=network.vpc,
            vpc_subnets=network.edge_subnets,
            internet_facing=False,
            security_group=network.balancer_security_group,
            idle_timeout=cdk.Duration.seconds(longest + IDLE_MARGIN_S),  # the gateway gives up first, and says so
            drop_invalid_header_fields=True,
            deletion_protection=config.retain_data,
        )
        self._log_to(self.access_logs)
        self.target_group = elbv2.ApplicationTargetGroup(
            self,
            "TargetGroup",
            vpc=network.vpc,
            port=network.server_port,
            protocol=elbv2.ApplicationProtocol.HTTP,
            target_type=elbv2.TargetType.INSTANCE,
            # A request costs from a millisecond to minutes: turns would pile the long ones up on one instance.
            load_balancing_algorithm_type=elbv2.TargetGroupLoadBalancingAlgorithmType.LEAST_OUTSTANDING_REQUESTS,
            deregistration_delay=cdk.Duration.seconds(config.fleet.drain_s),
            health_check=elbv2.HealthCheck(
                path=HEALTH_PATH,
                healthy_http_codes="200",
                # Decides where requests go, and nothing else: who is replaced is the agent's affair (server/host/serving.py).
                interval=cdk.Duration.seconds(_CHECK_S),
                timeout=cdk.Duration.seconds(5),
                healthy_threshold_count=_NUM_WELL,
                unhealthy_threshold_count=_NUM_ILL,
            ),
        )
        self.listener = self.balancer.add_listener(
            "Listener",
            port=network.listener_port,
            protocol=elbv2.ApplicationProtocol.HTTP,
            open=False,
            default_action=elbv2.ListenerAction.forward([self.target_group]),
        )

    def _make_log_bucket(self, config: KitConfig) -> s3.Bucket:
        bucket = s3.Bucket(
            self,
            "AccessLogs",
            encryption=s3.BucketEncryption.S3_MANAGED,  # the only kind that load balancers deliver to
            block_public_access=s3.BlockPublicAccess.BLOCK_ALL,
            enforce_ssl=True,
            lifecycle_rules=[s3.LifecycleRule(expiration=cdk.Duration.days(config.observability.log_days))],
            removal_policy=data_policy(config),
            auto_delete_objects=not config.retain_data,
        )
        reason = "this bucket holds access logs; logging its own accesses would never end"
        acknowledge(bucket, {"S1": reason})
        return bucket

    def _log_to(self, bucket: s3.Bucket) -> None:
        """As `log_access_logs`, which asks for a region: the delivery service's principal is the same in all of them."""
        principal = iam.ServicePrincipal("logdelivery.elasticloadbalancing.amazonaws.com")
        mine = {"StringEquals": {"aws:SourceAccount": cdk.Aws.ACCOUNT_ID}}
        granted = bucket.add_to_resource_policy(
            iam.PolicyStatement(
                actions=["s3:PutObject"],
                principals=[principal],
                resources=[bucket.arn_for_objects(f"AWSLogs/{cdk.Aws.ACCOUNT_ID}/*")],
                conditions=mine,
            )
        )
        self.balancer.set_attribute("access_logs.s3.enabled", "true")
        self.balancer.set_attribute("access_logs.s3.bucket", bucket.bucket_name)
        if granted.policy_dependable is not None:
            self.balancer.node.add_dependency(granted.policy_dependable)  # the balancer tries the bucket when it is made

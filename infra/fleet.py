"""GpuFleet: the instances that serve. Launch template, Auto Scaling group over the zones, the hooks that hold a launch and a termination.

Owns size, health and replacement: a deploy waits for each new instance's signal, which user-data sends when the server answers /health, and
rolls back without it. An instance is in service once its agent completes the launch hook, which it does when the server answers; where
it does not, user-data gives the launch up (READY_S); where nothing runs any more, the hook's time ends it. Later on the load balancer keeps
requests away from a server that is ill, and the agent marks its instance unhealthy if it stays so (fleet.heal_s); EC2's and EBS's checks
watch the host. Does not know the load's policies (`scaling`) or who calls (`load_balancer`). The service stack makes it.
"""

from typing import cast

import aws_cdk as cdk
from aws_cdk import aws_autoscaling as autoscaling
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_elasticloadbalancingv2 as elbv2
from constructs import Construct

from infra.acknowledge import acknowledge, nag_name
from infra.admin_key import AdminKey
from infra.artifact import ServerArtifact
from infra.boot_phases import grace_s
from infra.config import KitConfig
from infra.fleet_role import make_fleet_role
from infra.gateway_key import GatewayKey
from infra.image import ServerImage
from infra.load_balancer import ENTER_S
from infra.log_group import make_log_group
from infra.model import BaseModel
from infra.network import Network
from infra.removal import data_key
from infra.sections_service import ROOT_MB_S
from infra.storage import Bucket, SharedFiles
from infra.user_data import CACHE_ROOT, SHARED_DIR, render, server_environment

GROUP_ID = "FleetGroup"  # its logical id, fixed: user-data names it, and a reference would be a circle (group, template, user-data)
DRAIN_HOOK, LAUNCH_HOOK = "drain", "launch"  # unique within a group; the agent completes them by these names
HOOK_S = 300  # the agent asks for more while requests run; without an agent, an instance is gone after this
LAUNCH_S = 120  # of the grace period, until user-data runs: an instance that fails says so before it is given up
HEALTH_GRACE_S = 300  # for EC2's own checks to settle; an instance in service has booted already
# Lifecycle hooks' maximum, for a boot that hangs; one that fails says so itself. Never another value: the hook is a resource behind the
# group, so a deploy that changed it would run the whole rolling update under the old one.
LAUNCH_HOOK_S = 7200
WARMUP_S = 60  # from in service until its load counts: it is published every ten seconds
_LONGEST_PAUSE_S = 3600  # CloudFormation's bound for one batch of a rolling update
_PROCESSES = autoscaling.ScalingProcess


class GpuFleet(Construct):
    """group (AutoScalingGroup); role; log_group; template; grace_s."""

    def __init__(
        self,
        scope: Construct,
        id: str,
        *,
        config: KitConfig,
        network: Network,
        bucket: Bucket,
        shared_files: SharedFiles,
        image: ServerImage,
        model: BaseModel,
        target_group: elbv2.ApplicationTargetGroup,
        artifact: ServerArtifact,
        admin_key: AdminKey,
        gateway_key: GatewayKey,
    ) -> None:
        super().__init__(scope, id)
        self._config, self._network, self._bucket, self._shared_files = config, network, bucket, shared_files
        self.grace_s = grace_s(config)
        self.log_group = make_log_group(self, "LogGroup", config=config)
        self.role = make_fleet_role(self, "Role", config=config, log_groups=[self.log_group])
        for grants in (bucket, model, artifact, admin_key, gateway_key):
            grants.grant_read(self.role)
        shared_files.grant_mount(self.role)
        self._acknowledge_prefixes()
        self.template = self._make_template(image, self._render_user_data(model, artifact, admin_key, gateway_key))
        self.group = self._make_group(network)
        cast(cdk.CfnElement, self.group.node.default_child).override_logical_id(GROUP_ID)
        self.group.node.add_dependency(self.role)  # with its policies: an instance that boots before them fails
        if model.check:
            self.group.node.add_dependency(model.check)
        self._add_hooks()
        self.group.attach_to_application_target_group(target_group)

    def _make_template(self, image: ServerImage, user_data: str) -> ec2.LaunchTemplate:
        config, key_pair = self._config, self._config.network.key_pair
        root = ec2.BlockDeviceVolume.ebs(
            config.fleet.root_gib,
            encrypted=True,
            kms_key=data_key(self, config),
            volume_type=ec2.EbsDeviceVolumeType.GP3,
            throughput=ROOT_MB_S,
            delete_on_termination=True,
        )
        return ec2.LaunchTemplate(
            self,
            "Template",
            machine_image=image.machine_image,
            instance_type=ec2.InstanceType(config.fleet.instance_type),
            role=self.role,
            security_group=self._network.fleet_security_group,
            key_pair=ec2.KeyPair.from_key_pair_name(self, "KeyPair", key_pair) if key_pair else None,
            block_devices=[ec2.BlockDevice(device_name="/dev/sda1", volume=root)],
            user_data=ec2.UserData.custom(user_data),
            require_imdsv2=True,
            http_put_response_hop_limit=1,
            detailed_monitoring=True,
        )

    def _make_group(self, network: Network) -> autoscaling.AutoScalingGroup:
        fleet = self._config.fleet
        mixed = self._mixed_instances()
        group = autoscaling.AutoScalingGroup(
            self,
            "Group",
            vpc=network.vpc,
            vpc_subnets=network.fleet_subnets,
            launch_template=None if mixed else self.template,
            mixed_instances_policy=mixed,
            min_capacity=fleet.min,
            max_capacity=fleet.max,
            desired_capacity=fleet.desired,
            capacity_rebalance=fleet.spot_percent > 0,
            new_instances_protected_from_scale_in=fleet.scale_in_protection,
            health_checks=autoscaling.HealthChecks.with_additional_checks(
                # Not the load balancer's: its half minute would replace an instance whose engine is back in two.
                additional_types=[autoscaling.AdditionalHealthCheckType.EBS],
                grace_period=cdk.Duration.seconds(HEALTH_GRACE_S),
            ),
            group_metrics=[autoscaling.GroupMetrics.all()],
            default_instance_warmup=cdk.Duration.seconds(self._config.scaling.warmup_s or WARMUP_S),
            signals=self._signals(),
            update_policy=self._update_policy(),
        )
        reason = "launches that fail are told by the event rule of Observability; every launch and end is in the activity history"
        acknowledge(group, {"AS3": reason})
        if fleet.desired is not None:
            # IgnoreUnmodifiedGroupSizeProperties, which CDK sets, keeps the group's own size as long as the key is not changed.
            warning = "Annotation::@aws-cdk/aws-autoscaling:desiredCapacitySet"
            kept = cdk.Acknowledgment(id=warning, reason="an unmodified size is ignored by later deploys (the group's update policy)")
            cdk.Validations.of(group).acknowledge(kept)
        self._warn(group)
        if mixed:
            acknowledge(group, {"EC26": "the rule fails on a mixed-instances policy; the launch template's volume is encrypted"})
        return group

    def _warn(self, group: autoscaling.AutoScalingGroup) -> None:
        """What a deploy will do to this fleet that nobody expects."""
        add = cdk.Annotations.of(group).add_warning_v2
        if self._config.fleet.max == 1:
            # A second one would need a larger MaxSize, which the policy would use for load as well: whoever pays for it says so.
            words = "fleet.max is 1: a deploy that changes the instance answers 503 for as long as the new one boots; 2 leaves room for it"
            add("manylora:oneInstance", words)
        if self.grace_s > _LONGEST_PAUSE_S:
            words = (
                f"a boot may take {self.grace_s} s (fleet.grace_s); in a rolling update CloudFormation waits {_LONGEST_PAUSE_S} s for one"
            )
            add("manylora:longBoot", words)

    def _signals(self) -> autoscaling.Signals | None:
        """The first instances are launched before there is a hook, so CloudFormation waits for all of them; None for an empty fleet."""
        fleet = self._config.fleet
        count = fleet.min if fleet.desired is None else fleet.desired
        return autoscaling.Signals.wait_for_count(count, timeout=cdk.Duration.seconds(self.grace_s)) if count else None

    def _update_policy(self) -> autoscaling.UpdatePolicy:
        """One after another, each waited for until it answers. What could end or add instances meanwhile is suspended."""
        fleet = self._config.fleet
        return autoscaling.UpdatePolicy.rolling_update(
            max_batch_size=1,
            min_instances_in_service=min(max(fleet.min, 1), fleet.max - 1),
            pause_time=cdk.Duration.seconds(min(self.grace_s, _LONGEST_PAUSE_S)),
            wait_on_resource_signals=True,
            suspend_processes=[
                _PROCESSES.HEALTH_CHECK,
                _PROCESSES.REPLACE_UNHEALTHY,
                _PROCESSES.AZ_REBALANCE,
                _PROCESSES.ALARM_NOTIFICATION,
                _PROCESSES.SCHEDULED_ACTIONS,
            ],
        )

    def _mixed_instances(self) -> autoscaling.MixedInstancesPolicy | None:
        """Spot, or other types to fall back on; None for one type on demand."""
        fleet = self._config.fleet
        if not fleet.spot_percent and not fleet.fallback_types:
            return None
        types = dict.fromkeys((fleet.instance_type, *fleet.fallback_types))
        return autoscaling.MixedInstancesPolicy(
            launch_template=self.template,
            launch_template_overrides=[autoscaling.LaunchTemplateOverrides(instance_type=ec2.InstanceType(name)) for name in types],
            instances_distribution=autoscaling.InstancesDistribution(
                on_demand_base_capacity=fleet.min,
                on_demand_percentage_above_base_capacity=100 - fleet.spot_percent,
                on_demand_allocation_strategy=autoscaling.OnDemandAllocationStrategy.PRIORITIZED,
                spot_allocation_strategy=autoscaling.SpotAllocationStrategy.PRICE_CAPACITY_OPTIMIZED,
            ),
        )

    def _render_user_data(self, model: BaseModel, artifact: ServerArtifact, admin_key: AdminKey, gateway_key: GatewayKey) -> str:
        config, stack = self._config, cdk.Stack.of(self)
        bucket_name = self._bucket.bucket.bucket_name
        wheels = config.image.wheelhouse_prefix
        server = server_environment(
            config, shared_files=self._shared_files, bucket_name=bucket_name, port=self._network.server_port, region=stack.region
        )
        own = {
            "REGION": stack.region,
            "STACK_NAME": stack.stack_name,
            "SIGNAL_RESOURCE": GROUP_ID,
            "ARTIFACT_URI": artifact.uri,
            "WHEELHOUSE_URI": f"s3://{bucket_name}/{wheels}" if wheels else "",
            **self._shared_files.mount_variables(),
            "CACHE_ROOT": CACHE_ROOT if config.fleet.instance.nvme_gb else "",
            "MODEL_ORIGIN": model.origin,
            # Where the bucket's objects are files, nothing is copied beside them.
            "SHARED_DIR": "" if self._shared_files.shows_bucket else SHARED_DIR,
            "HUB_SECRET_ARN": config.model.hub_secret_arn or "",
            "ADMIN_SECRET_ARN": admin_key.arn,
            "GATEWAY_SECRET_ARN": gateway_key.arn,
            "LOG_GROUP": self.log_group.log_group_name,
            "DRAIN_HOOK": DRAIN_HOOK,
            "LAUNCH_HOOK": LAUNCH_HOOK,
            "READY_S": str(self.grace_s - LAUNCH_S),
            "HEAL_S": str(config.fleet.heal_s),
            "ENTER_S": str(ENTER_S),
        }
        return render(own | server)

    def _add_hooks(self) -> None:
        transition = autoscaling.LifecycleTransition
        self.group.add_lifecycle_hook(
            "DrainHook",
            lifecycle_hook_name=DRAIN_HOOK,
            lifecycle_transition=transition.INSTANCE_TERMINATING,
            heartbeat_timeout=cdk.Duration.seconds(HOOK_S),
            default_result=autoscaling.DefaultResult.CONTINUE,
        )
        # user-data gives a launch up whose server does not answer in time; and a stopped pool stops no instance in its first boot.
        hook = self.group.add_lifecycle_hook(
            "LaunchHook",
            lifecycle_hook_name=LAUNCH_HOOK,
            lifecycle_transition=transition.INSTANCE_LAUNCHING,
            heartbeat_timeout=cdk.Duration.seconds(LAUNCH_HOOK_S),
            default_result=autoscaling.DefaultResult.ABANDON,
        )
        if warm := self._config.fleet.warm_pool:
            pool = self.group.add_warm_pool(
                pool_state=autoscaling.PoolState.STOPPED if warm.state == "stopped" else autoscaling.PoolState.RUNNING,
                min_size=warm.min_size,
                max_group_prepared_capacity=warm.max_prepared,
            )
            pool.node.add_dependency(hook)  # the pool launches as soon as it is there

    def _acknowledge_prefixes(self) -> None:
        """nag's findings on the bucket's prefixes: objects below one have no list."""
        name = nag_name(self, self._bucket, self._bucket.bucket.bucket_arn)
        reasons = {f"IAM5[Resource::{name}/{prefix}*]": "reads whatever lies under this prefix" for prefix in self._bucket.prefixes}
        acknowledge(self.role, reasons)

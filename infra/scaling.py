"""How many instances there are: target tracking on the server's own load, sizes by time, and zero when nobody asks.

Owns the policies of the fleet's group; the group's bounds are the fleet's. What LoadRatio means and why 0.7: docs/scaling.md, where a
simulation compares it with other signals. The service stack makes one.
"""

from aws_cdk import aws_autoscaling as autoscaling
from aws_cdk import aws_cloudwatch as cw
from aws_cdk import aws_cloudwatch_actions as actions
from constructs import Construct

from infra.config import KitConfig
from infra.errors import ConfigError
from infra.fleet import GpuFleet
from infra.load_balancer import LoadBalancer
from infra.signals import LOAD_RATIO, NAMESPACE, balancer_metric, computed, group_metric, server_metric

PERIOD_S = 10  # LoadRatio is published with this resolution: a burst is seen in half a minute, not in three
MOST_LOAD = 2.0  # a long queue asks for no more than that: by the time that a larger fleet has booted, the queue is gone


class Scaling(Construct):
    """Policies and scheduled actions of `fleet.group`."""

    def __init__(self, scope: Construct, id: str, *, config: KitConfig, fleet: GpuFleet, load_balancer: LoadBalancer) -> None:
        super().__init__(scope, id)
        self._config, self._group, self._grace_s, self._load_balancer = config, fleet.group, fleet.grace_s, load_balancer
        self._track_load()
        for schedule in config.fleet.schedules:
            self._group.scale_on_schedule(
                schedule.name,
                schedule=autoscaling.Schedule.expression(schedule.cron.removeprefix("cron(").removesuffix(")")),
                min_capacity=schedule.min,
                max_capacity=schedule.max,
                desired_capacity=schedule.desired,
            )
        if config.fleet.scale_to_zero:
            self._wake()
            self._sleep()

    def _track_load(self) -> None:
        """The L2 policy has no period below a minute."""
        group_name, policy = self._group.auto_scaling_group_name, autoscaling.CfnScalingPolicy
        load = policy.MetricProperty(
            namespace=NAMESPACE,
            metric_name=LOAD_RATIO,
            dimensions=[policy.MetricDimensionProperty(name="AutoScalingGroupName", value=group_name)],
        )
        stat = policy.TargetTrackingMetricStatProperty(metric=load, stat="Average", period=PERIOD_S)
        capped = f"IF(load > {MOST_LOAD}, {MOST_LOAD}, load)"
        tracked = policy.CustomizedMetricSpecificationProperty(
            metrics=[
                policy.TargetTrackingMetricDataQueryProperty(id="load", metric_stat=stat, return_data=False),
                policy.TargetTrackingMetricDataQueryProperty(id="capped", expression=capped, label=LOAD_RATIO, return_data=True),
            ]
        )
        autoscaling.CfnScalingPolicy(
            self,
            "LoadPolicy",
            auto_scaling_group_name=self._group.auto_scaling_group_name,
            policy_type="TargetTrackingScaling",
            estimated_instance_warmup=self._config.scaling.warmup_s,
            target_tracking_configuration=autoscaling.CfnScalingPolicy.TargetTrackingConfigurationProperty(
                target_value=self._config.scaling.target_utilization,
                customized_metric_specification=tracked,
                disable_scale_in=not self._config.scaling.scale_in,
            ),
        )

    def _wake(self) -> None:
        """From zero to one: target tracking has no metric to track there. The load balancer's own 503 is what a request meets in an empty
        fleet; those that the gateway refuses never get so far, so that a stranger cannot wake a GPU with a wrong key."""
        refused = balancer_metric(self._load_balancer, "HTTPCode_ELB_503_Count")
        wanted = computed(
            "IF(FILL(desired, 1) < 1 AND FILL(refused, 0) > 0, 1, 0)",
            label="requests to an empty fleet",
            desired=group_metric(self._group, "GroupDesiredCapacity"),
            refused=refused,
        )
        self._step("Wake", wanted, num_periods=1, kind=autoscaling.AdjustmentType.CHANGE_IN_CAPACITY, adjustment=1)

    def _sleep(self) -> None:
        """From some to zero, once instances have been in service for the whole time with nothing to do. ConfigError if a boot is longer."""
        idle = computed(
            "IF(FILL(serving, 0) > 0 AND FILL(requests, 0) == 0 AND FILL(load, 0) == 0, 1, 0)",
            label="idle",
            serving=group_metric(self._group, "GroupInServiceInstances"),
            requests=balancer_metric(self._load_balancer, "RequestCount"),
            load=server_metric(self._group, LOAD_RATIO, "Maximum"),
        )
        minutes, boot_minutes = self._config.scaling.idle_minutes, -(-self._grace_s // 60)
        if minutes < boot_minutes:  # the first ones, launched before the hook is there, are in service at once
            raise ConfigError(
                f"scaling.idle_minutes must be {boot_minutes} or more, the grace period: an instance that boots would be taken for idle "
                f"and ended, each time that a request woke the fleet. Given: {minutes}"
            )
        self._step("Sleep", idle, num_periods=minutes, kind=autoscaling.AdjustmentType.EXACT_CAPACITY, adjustment=0)

    def _step(self, name: str, metric: cw.MathExpression, *, num_periods: int, kind: autoscaling.AdjustmentType, adjustment: int) -> None:
        """A policy that sets or changes the capacity whenever `metric` was 1 for so many minutes."""
        step = autoscaling.StepScalingAction(self, f"{name}Policy", auto_scaling_group=self._group, adjustment_type=kind)
        step.add_adjustment(adjustment=adjustment, lower_bound=0)
        alarm = cw.Alarm(
            self,
            f"{name}Alarm",
            alarm_description=f"{self._config.name}: {name.lower()}s the fleet; not a fault",
            metric=metric,
            threshold=1,
            comparison_operator=cw.ComparisonOperator.GREATER_THAN_OR_EQUAL_TO_THRESHOLD,
            evaluation_periods=num_periods,
            datapoints_to_alarm=num_periods,
            treat_missing_data=cw.TreatMissingData.NOT_BREACHING,
        )
        alarm.add_alarm_action(actions.AutoScalingAction(step))

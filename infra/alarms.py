"""The alarms: what an operator must know before a caller says it. Each names what to look at in its description.

Owns thresholds. `Observability` makes them and sends them to its topic; the two alarms that wake and end an idle fleet are `Scaling`'s.
"""

from aws_cdk import aws_autoscaling as autoscaling
from aws_cdk import aws_cloudwatch as cw
from aws_cdk import aws_cloudwatch_actions as actions
from aws_cdk import aws_sns as sns
from constructs import Construct

from infra.config import KitConfig
from infra.endpoint import Endpoint
from infra.load_balancer import LoadBalancer
from infra.signals import LOAD_RATIO, balancer_metric, computed, gateway_metric, group_metric, server_metric

_ABOVE = cw.ComparisonOperator.GREATER_THAN_OR_EQUAL_TO_THRESHOLD


class Alarms(Construct):
    """`alarms`: by name."""

    def __init__(
        self,
        scope: Construct,
        id: str,
        *,
        config: KitConfig,
        topic: sns.ITopic,
        group: autoscaling.IAutoScalingGroup,
        load_balancer: LoadBalancer,
        endpoint: Endpoint,
    ) -> None:
        super().__init__(scope, id)
        self._config, self._topic, self.alarms = config, topic, dict[str, cw.Alarm]()
        self._watch_callers(endpoint)
        self._watch_fleet(group, load_balancer)
        self._watch_instances(group)

    def _watch_callers(self, endpoint: Endpoint) -> None:
        failed, count = (gateway_metric(endpoint.api, name, "Sum", minutes=5) for name in ("5XXError", "Count"))
        # A share of many, or of few a number: one failed call at night is not an alarm.
        rate = computed("IF(failed >= 5, 100 * failed / count, 0)", label="5xx, %", minutes=5, failed=failed, count=count)
        self._add("ServerErrors", rate, 5, "more than 5% of the requests end with 5xx: the access log's serverError says why", periods=1)

    def _watch_fleet(self, group: autoscaling.IAutoScalingGroup, load_balancer: LoadBalancer) -> None:
        healthy = balancer_metric(load_balancer, "HealthyHostCount", "Minimum", by_target_group=True)
        desired = group_metric(group, "GroupDesiredCapacity")
        expression = "IF(FILL(desired, 1) > 0 AND FILL(healthy, 0) < 1, 1, 0)"
        nobody = computed(expression, label="wanted, and nobody answers", desired=desired, healthy=healthy)
        self._add("NobodyAnswers", nobody, 1, "instances are wanted and none is healthy: see the group's activity history", periods=15)
        ill = balancer_metric(load_balancer, "UnHealthyHostCount", "Minimum", by_target_group=True)
        late = max(30, self._config.fleet.heal_s // 60 + 15)  # minutes, by which its agent should have had it replaced
        text = "an instance fails the load balancer's checks and is not replaced: its agent.log says why, if the agent runs"
        self._add("Unhealthy", ill, 1, text, periods=late)
        text = f"the fleet is full and cannot grow: fleet.max is {self._config.fleet.max}, or there is no capacity"
        self._add("Full", server_metric(group, LOAD_RATIO), 1.0, text, periods=15)

    def _watch_instances(self, group: autoscaling.IAutoScalingGroup) -> None:
        errors = server_metric(group, "GpuErrors", "Sum")
        self._add("GpuErrors", errors, 1, "a GPU failed (Xid, ECC); its instance is being replaced, its log says which error", periods=1)
        disk = server_metric(group, "disk_used_percent", "Maximum")
        self._add("DiskFull", disk, 90, "a disk is nearly full: root_gib, or server.store_max_bytes", periods=5)
        memory = server_metric(group, "mem_used_percent", "Maximum")
        self._add("MemoryFull", memory, 95, "host memory is nearly used up: server.adapter_host_bytes, or a larger instance", periods=5)

    def _add(self, name: str, metric: cw.IMetric, threshold: float, text: str, *, periods: int) -> None:
        """An alarm when `metric` is at `threshold` or above for so many of its periods; both ways are told."""
        alarm = cw.Alarm(
            self,
            name,
            alarm_description=f"{self._config.name}: {text}",
            metric=metric,
            threshold=threshold,
            comparison_operator=_ABOVE,
            evaluation_periods=periods,
            datapoints_to_alarm=periods,
            treat_missing_data=cw.TreatMissingData.NOT_BREACHING,
        )
        action = actions.SnsAction(self._topic)
        alarm.add_alarm_action(action)
        alarm.add_ok_action(action)
        self.alarms[name] = alarm

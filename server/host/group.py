"""The Auto Scaling group as one of its instances sees it: its hooks, this instance's health, the metrics under its name.

Owns the calls; what they are good for is the callers' affair (`lifecycle`, `load`, `gpu`). Outside any group every
call is a no-op.
"""

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

NAMESPACE = "Manylora"
DIMENSION = "AutoScalingGroupName"


class Group:
    """`name` is None outside a group. botocore's errors pass through, except where a hook is not waiting."""

    def __init__(self, instance_id: str, autoscaling: Any, cloudwatch: Any) -> None:
        self.instance_id, self._autoscaling, self._cloudwatch = instance_id, autoscaling, cloudwatch
        self._name: str | None = None
        self._ill_of: set[str] = set()

    @property
    def name(self) -> str | None:
        """Asked for until there is one: an instance may boot before the group knows it."""
        if self._name is None:
            found = self._autoscaling.describe_auto_scaling_instances(InstanceIds=[self.instance_id])["AutoScalingInstances"]
            self._name = found[0]["AutoScalingGroupName"] if found else None
        return self._name

    def complete_hook(self, hook: str) -> bool:
        """Let the transition that waits at `hook` go on; False if none waits."""
        return self._at_hook("complete_lifecycle_action", hook, LifecycleActionResult="CONTINUE")

    def extend_hook(self, hook: str) -> bool:
        """Ask for the hook's time once more; False if none waits."""
        return self._at_hook("record_lifecycle_action_heartbeat", hook)

    def mark_unhealthy(self, reason: str) -> None:
        """Have this instance replaced, grace period or not. `reason` is for `withdraw`."""
        if self.name is None:
            return
        self._ill_of.add(reason)
        self._autoscaling.set_instance_health(InstanceId=self.instance_id, HealthStatus="Unhealthy", ShouldRespectGracePeriod=False)

    def withdraw(self, reason: str) -> None:
        """Take a mark back that the group has not acted on (its processes may be suspended); one for another reason stays."""
        if self.name is None or reason not in self._ill_of:
            return
        if self._ill_of == {reason}:
            self._autoscaling.set_instance_health(InstanceId=self.instance_id, HealthStatus="Healthy")
        self._ill_of.remove(reason)

    def publish(self, values: Mapping[str, float], *, unit: str = "None", high_resolution: bool = False, **dimensions: str) -> None:
        """Metrics of the group, `dimensions` added to its name."""
        if self.name is None or not values:
            return
        named = [{"Name": DIMENSION, "Value": self.name}, *({"Name": key, "Value": value} for key, value in dimensions.items())]
        data = [
            {"MetricName": metric, "Dimensions": named, "Value": value, "Unit": unit, "StorageResolution": 1 if high_resolution else 60}
            for metric, value in values.items()
        ]
        self._cloudwatch.put_metric_data(Namespace=NAMESPACE, MetricData=data)

    def _at_hook(self, call: str, hook: str, **more: str) -> bool:
        from botocore.exceptions import ClientError

        if self.name is None:
            return False
        where = {"AutoScalingGroupName": self.name, "LifecycleHookName": hook, "InstanceId": self.instance_id}
        try:
            getattr(self._autoscaling, call)(**where, **more)
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") != "ValidationError":
                raise
            log.debug("hook %s: %s", hook, error)  # "No active Lifecycle Action found"
            return False
        return True

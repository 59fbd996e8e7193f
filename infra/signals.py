"""The metrics of a deployment, by what they mean: names, namespaces and dimensions that the instances and AWS publish them under.

Owns no resource. `Scaling`, `Dashboard` and `Alarms` read it; the agent on the instance publishes NAMESPACE (`server.host.agent`, and the
CloudWatch agent's configuration in `ami/`): a test holds the two together.
"""

import aws_cdk as cdk
from aws_cdk import aws_apigateway as apigw
from aws_cdk import aws_autoscaling as autoscaling
from aws_cdk import aws_cloudwatch as cw

from infra.load_balancer import LoadBalancer

NAMESPACE = "Manylora"
LOAD_RATIO = "LoadRatio"  # queued and running tokens of an instance, over what it sustains: docs/scaling.md
_MINUTE = cdk.Duration.minutes(1)


def computed(expression: str, *, label: str, minutes: int = 1, **metrics: cw.IMetric) -> cw.MathExpression:
    """`expression` over `metrics`, which have the same period: the library's own, five minutes, would win over theirs."""
    return cw.MathExpression(expression=expression, using_metrics=metrics, label=label, period=cdk.Duration.minutes(minutes))


def server_metric(group: autoscaling.IAutoScalingGroup, name: str, stat: str = "Average", *, label: str | None = None) -> cw.Metric:
    """A series of the instances of `group`, over all of them."""
    dimensions = {"AutoScalingGroupName": group.auto_scaling_group_name}
    return cw.Metric(namespace=NAMESPACE, metric_name=name, dimensions_map=dimensions, statistic=stat, period=_MINUTE, label=label or name)


def group_metric(group: autoscaling.IAutoScalingGroup, name: str, *, label: str | None = None) -> cw.Metric:
    """A series of Auto Scaling about `group`; they have data while it is empty, too."""
    dimensions = {"AutoScalingGroupName": group.auto_scaling_group_name}
    return cw.Metric(
        namespace="AWS/AutoScaling", metric_name=name, dimensions_map=dimensions, statistic="Average", period=_MINUTE, label=label or name
    )


def balancer_metric(load_balancer: LoadBalancer, name: str, stat: str = "Sum", *, by_target_group: bool = False) -> cw.Metric:
    """A series of the load balancer, or of its target group."""
    dimensions = {"LoadBalancer": load_balancer.balancer.load_balancer_full_name}
    if by_target_group:
        dimensions["TargetGroup"] = load_balancer.target_group.target_group_full_name
    return cw.Metric(
        namespace="AWS/ApplicationELB", metric_name=name, dimensions_map=dimensions, statistic=stat, period=_MINUTE, label=name
    )


def gateway_metric(api: apigw.RestApi, name: str, stat: str, *, label: str | None = None, minutes: int = 1) -> cw.Metric:
    """A series of the stage."""
    dimensions = {"ApiName": api.rest_api_name, "Stage": api.deployment_stage.stage_name}
    return cw.Metric(
        namespace="AWS/ApiGateway",
        metric_name=name,
        dimensions_map=dimensions,
        statistic=stat,
        period=cdk.Duration.minutes(minutes),
        label=label or name,
    )

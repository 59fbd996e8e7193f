"""Observability: the topic that reaches the operator, and what is sent there: alarms, launches that failed, the budget.

Owns the topic and the rule for failed launches; the page, the alarms and the budget are constructs of their own. Instances write their logs
and metrics by themselves (`fleet`, `ami/`). The service stack makes one.
"""

import aws_cdk as cdk
from aws_cdk import aws_events as events
from aws_cdk import aws_events_targets as targets
from aws_cdk import aws_iam as iam
from aws_cdk import aws_sns as sns
from aws_cdk import aws_sns_subscriptions as subscriptions
from constructs import Construct

from infra.alarms import Alarms
from infra.budget import Budget
from infra.config import KitConfig
from infra.dashboard import Dashboard
from infra.endpoint import Endpoint
from infra.fleet import GpuFleet
from infra.load_balancer import LoadBalancer
from infra.removal import data_key


class Observability(Construct):
    """`topic`, `dashboard`, `alarms`, `budget` (None without one)."""

    def __init__(
        self, scope: Construct, id: str, *, config: KitConfig, fleet: GpuFleet, load_balancer: LoadBalancer, endpoint: Endpoint
    ) -> None:
        super().__init__(scope, id)
        self.topic = self._make_topic(config)
        self._tell_failed_launches(fleet)
        watched = {"group": fleet.group, "load_balancer": load_balancer, "endpoint": endpoint}
        self.alarms = Alarms(self, "Alarms", config=config, topic=self.topic, **watched)
        self.dashboard = Dashboard(self, "Dashboard", config=config, **watched).dashboard
        self.budget = Budget(self, "Budget", config=config) if config.observability.monthly_budget_usd else None
        stack = cdk.Stack.of(self)
        page = f"https://console.aws.amazon.com/cloudwatch/home?region={stack.region}#dashboards:name={self.dashboard.dashboard_name}"
        cdk.CfnOutput(stack, "DashboardUrl", value=page)
        cdk.CfnOutput(stack, "AlarmTopicArn", value=self.topic.topic_arn)

    def _make_topic(self, config: KitConfig) -> sns.Topic:
        topic = sns.Topic(
            self, "Topic", display_name=config.name, enforce_ssl=True, master_key=data_key(self, config)
        )  # a key of the deployer's must let cloudwatch and events use it: docs/deploy.md
        topic.add_to_resource_policy(
            iam.PolicyStatement(
                actions=["sns:Publish"],
                principals=[iam.ServicePrincipal("cloudwatch.amazonaws.com")],
                resources=[topic.topic_arn],
                conditions={"StringEquals": {"aws:SourceAccount": cdk.Aws.ACCOUNT_ID}},
            )
        )
        if config.observability.alarm_email:
            topic.add_subscription(subscriptions.EmailSubscription(config.observability.alarm_email))
        return topic

    def _tell_failed_launches(self, fleet: GpuFleet) -> None:
        """No capacity, no quota: CloudFormation calls the group complete all the same, and nothing serves. The group's own words go out:
        InsufficientInstanceCapacity, VcpuLimitExceeded and the like."""
        cause = events.EventField.from_path("$.detail.StatusMessage")
        name = events.EventField.from_path("$.detail.AutoScalingGroupName")
        details = events.EventField.from_path("$.detail.Cause")
        message = events.RuleTargetInput.from_text(f"{name} could not launch an instance: {cause} ({details})")
        events.Rule(
            self,
            "FailedLaunches",
            description="Instances of the fleet that could not be launched",
            event_pattern=events.EventPattern(
                source=["aws.autoscaling"],
                detail_type=["EC2 Instance Launch Unsuccessful"],
                detail={"AutoScalingGroupName": [fleet.group.auto_scaling_group_name]},
            ),
            targets=[targets.SnsTopic(self.topic, message=message)],
        )

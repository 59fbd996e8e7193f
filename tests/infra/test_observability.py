"""What reaches the operator, and the page: alarms with their thresholds, failed launches by name, the budget, every series published."""

import dataclasses
import json
import re

from infra.config import KitConfig
from infra.signals import NAMESPACE
from server.host import load
from sizing.instances import INSTANCES
from tests.infra.edge_stack import ROOT, synth, text_of

COLLECTED = json.loads((ROOT / "ami" / "cloudwatch-agent.json").read_text())["metrics"]
PREFIXES = {"nvidia_gpu": "nvidia_smi_", "disk": "disk_", "mem": ""}  # how the CloudWatch agent names what a plugin measures
OF_THE_INSTANCE = {PREFIXES[plugin] + name for plugin, asked in COLLECTED["metrics_collected"].items() for name in asked["measurement"]}
OURS = set(load.PUBLISHED.values()) | set(load.RATES.values()) | {"GpuErrors", "BootSeconds"}


def alarms(template):
    return {name: item for name, item in template.of_type("AWS::CloudWatch::Alarm").items() if name.startswith("Observability")}


def page(template):
    """The dashboard's body, references as {Name}."""
    return json.loads(text_of(template.one("AWS::CloudWatch::Dashboard")["DashboardBody"]))


def test_every_alarm_tells_the_topic_both_ways_and_says_what_to_look_at():
    template = synth()
    (topic,) = template.of_type("AWS::SNS::Topic")
    found = alarms(template)
    assert len(found) == 7
    for name, alarm in found.items():
        assert alarm["AlarmActions"] == alarm["OKActions"] == [{"Ref": topic}], name
        assert alarm["TreatMissingData"] == "notBreaching" and len(alarm["AlarmDescription"]) > 40


def test_no_alarm_reads_five_minutes_where_it_means_one():
    """The library's period for expressions is five minutes, and it wins over the metrics' own."""
    for name, alarm in alarms(synth()).items():
        periods = {item["MetricStat"]["Period"] for item in alarm.get("Metrics", []) if "MetricStat" in item}
        assert periods == ({300} if "ServerErrors" in name else {60}), name


def test_nobody_answers_only_counts_where_somebody_is_wanted():
    (alarm,) = [item for name, item in alarms(synth()).items() if "NobodyAnswers" in name]
    expression = next(item["Expression"] for item in alarm["Metrics"] if "Expression" in item)
    assert expression == "IF(FILL(desired, 1) > 0 AND FILL(healthy, 0) < 1, 1, 0)"


def test_launches_that_fail_are_told_in_the_groups_own_words():
    template = synth()
    (rule,) = template.of_type("AWS::Events::Rule").values()
    assert rule["EventPattern"]["detail-type"] == ["EC2 Instance Launch Unsuccessful"]
    (group,) = template.of_type("AWS::AutoScaling::AutoScalingGroup")
    assert rule["EventPattern"]["detail"] == {"AutoScalingGroupName": [{"Ref": group}]}
    told = rule["Targets"][0]["InputTransformer"]
    assert "$.detail.StatusMessage" in told["InputPathsMap"].values() and "could not launch" in told["InputTemplate"]


def test_the_topic_takes_what_comes_over_tls_from_this_account():
    statements = synth().one("AWS::SNS::TopicPolicy")["PolicyDocument"]["Statement"]
    deny = [item for item in statements if item["Effect"] == "Deny"]
    assert deny[0]["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    senders = {item["Principal"]["Service"] for item in statements if item["Effect"] == "Allow"}
    assert senders == {"cloudwatch.amazonaws.com", "events.amazonaws.com"}


def test_an_address_gets_the_notices_and_the_budget():
    address = {"observability.alarm_email": "ops@example.com"}
    template = synth({**address, "observability.monthly_budget_usd": 900})
    subscription = template.one("AWS::SNS::Subscription")
    assert subscription["Endpoint"] == "ops@example.com" and subscription["Protocol"] == "email"
    budget = template.one("AWS::Budgets::Budget")
    assert budget["Budget"]["BudgetLimit"] == {"Amount": 900, "Unit": "USD"}
    warnings = [
        (item["Notification"]["NotificationType"], item["Notification"]["Threshold"]) for item in budget["NotificationsWithSubscribers"]
    ]
    assert warnings == [("ACTUAL", 80), ("ACTUAL", 100), ("FORECASTED", 100)]
    without = synth(address)
    assert without.of_type("AWS::SNS::Subscription") and not without.of_type("AWS::Budgets::Budget")
    assert not synth().of_type("AWS::SNS::Subscription")


def test_every_series_of_ours_on_the_page_and_in_the_alarms_is_published():
    body = text_of(synth().one("AWS::CloudWatch::Dashboard")["DashboardBody"])
    named = set(re.findall(rf'"{NAMESPACE}","(\w+)"', body))
    for alarm in alarms(synth()).values():
        metrics = [item["MetricStat"]["Metric"] for item in alarm["Metrics"] if "MetricStat" in item]
        named |= {metric["MetricName"] for metric in metrics if metric["Namespace"] == NAMESPACE}
    assert {"LoadRatio", "OutputTokens", "AdaptersOnDevice", "KvBlocks", "GpuErrors"} <= named
    assert named <= OURS | OF_THE_INSTANCE
    assert COLLECTED["namespace"] == NAMESPACE and ["AutoScalingGroupName"] in COLLECTED["aggregation_dimensions"]


def test_the_page_shows_what_was_promised():
    titles = " ".join(str(widget["properties"].get("title")) for widget in page(synth())["widgets"])
    for word in ("Requests", "Latency", "tokens", "Sequences", "LoadRatio", "Adapters", "KV", "GPU", "Instances", "USD an hour"):
        assert word in titles, word


def test_what_an_hour_costs_is_the_tables_price():
    price = INSTANCES["g6.xlarge"].usd_per_hour
    assert f"* {price}" in text_of(synth().one("AWS::CloudWatch::Dashboard")["DashboardBody"])


def test_without_a_price_the_page_says_so(monkeypatch):
    monkeypatch.setitem(INSTANCES, "gr6.4xlarge", dataclasses.replace(INSTANCES["gr6.4xlarge"], usd_per_hour=None))
    body = text_of(synth({"fleet.instance_type": "gr6.4xlarge"}).one("AWS::CloudWatch::Dashboard")["DashboardBody"])
    assert "no price of gr6.4xlarge is known" in body


def test_outputs_lead_to_the_page():
    outputs = synth()["Outputs"]
    assert "cloudwatch/home?region=" in text_of(outputs["DashboardUrl"]["Value"]) and "AlarmTopicArn" in outputs
    assert KitConfig.load("dev", ROOT).observability.alarm_email is None

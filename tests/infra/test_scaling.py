"""The policies: load is tracked, times are kept, an empty fleet wakes and an idle one sleeps, and neither by mistake."""

import json

import pytest

from infra.errors import ConfigError
from infra.signals import LOAD_RATIO, NAMESPACE
from server.host import group, load
from tests.infra.edge_stack import synth

ZERO = {"fleet.min": 0, "fleet.scale_to_zero": True}


def alarm(template, part):
    (found,) = [properties for name, properties in template.of_type("AWS::CloudWatch::Alarm").items() if part in name]
    return found


def policy(template, part):
    (found,) = [properties for name, properties in template.of_type("AWS::AutoScaling::ScalingPolicy").items() if part in name]
    return found


def test_the_servers_load_is_tracked_with_its_resolution():
    template = synth({"scaling.target_utilization": 0.6, "scaling.warmup_s": 240, "scaling.scale_in": False})
    tracking = policy(template, "LoadPolicy")
    assert tracking["PolicyType"] == "TargetTrackingScaling" and tracking["EstimatedInstanceWarmup"] == 240
    configuration = tracking["TargetTrackingConfiguration"]
    assert configuration["TargetValue"] == 0.6 and configuration["DisableScaleIn"] is True
    queries = {item["Id"]: item for item in configuration["CustomizedMetricSpecification"]["Metrics"]}
    stat = queries["load"]["MetricStat"]
    assert stat["Stat"] == "Average" and stat["Period"] == 10 and queries["load"]["ReturnData"] is False
    assert [item["Name"] for item in stat["Metric"]["Dimensions"]] == [group.DIMENSION]
    assert (stat["Metric"]["Namespace"], stat["Metric"]["MetricName"]) == (NAMESPACE, LOAD_RATIO) == (group.NAMESPACE, "LoadRatio")
    assert queries["capped"]["Expression"] == "IF(load > 2.0, 2.0, load)" and queries["capped"]["ReturnData"] is True
    assert LOAD_RATIO in load.PUBLISHED.values()


def test_a_new_instances_warmup_is_the_groups_unless_said():
    assert "EstimatedInstanceWarmup" not in policy(synth(), "LoadPolicy")


def test_schedules_become_scheduled_actions():
    night = {"name": "Night", "cron": "cron(0 20 * * mon-fri)", "min": 0, "desired": 0}
    action = synth({**ZERO, "fleet.schedules": [night]}).one("AWS::AutoScaling::ScheduledAction")
    assert action["Recurrence"] == "0 20 * * mon-fri" and action["MinSize"] == 0 and action["DesiredCapacity"] == 0
    assert "MaxSize" not in action


def test_a_fleet_that_never_sleeps_has_one_policy():
    template = synth()
    assert len(template.of_type("AWS::AutoScaling::ScalingPolicy")) == 1
    assert not template.of_type("AWS::AutoScaling::ScheduledAction")


def test_an_empty_fleet_is_woken_by_requests_that_got_past_the_gateway():
    wake = alarm(synth(ZERO), "WakeAlarm")
    expression = next(item["Expression"] for item in wake["Metrics"] if "Expression" in item)
    names = {item["Id"]: item["MetricStat"]["Metric"] for item in wake["Metrics"] if "MetricStat" in item}
    assert names["refused"]["MetricName"] == "HTTPCode_ELB_503_Count" and names["refused"]["Namespace"] == "AWS/ApplicationELB"
    assert "desired, 1) < 1" in expression  # without data the fleet is not taken for empty
    assert wake["EvaluationPeriods"] == 1 and {item["MetricStat"]["Period"] for item in wake["Metrics"] if "MetricStat" in item} == {60}
    step = policy(synth(ZERO), "WakePolicy")
    assert (
        step["AdjustmentType"] == "ChangeInCapacity" and step["StepAdjustments"][0]["ScalingAdjustment"] == 1
    )  # never fewer than there are


def test_an_idle_fleet_sleeps_after_its_time_and_not_while_it_boots():
    sleep = alarm(synth({**ZERO, "scaling.idle_minutes": 45}), "SleepAlarm")
    expression = next(item["Expression"] for item in sleep["Metrics"] if "Expression" in item)
    assert sleep["EvaluationPeriods"] == sleep["DatapointsToAlarm"] == 45
    assert "serving, 0) > 0" in expression and "requests, 0) == 0" in expression and "load, 0) == 0" in expression
    step = policy(synth({**ZERO, "scaling.idle_minutes": 45}), "SleepPolicy")
    assert step["AdjustmentType"] == "ExactCapacity" and step["StepAdjustments"][0]["ScalingAdjustment"] == 0
    synth({**ZERO, "scaling.idle_minutes": 15})  # the stand-in's grace period
    with pytest.raises(ConfigError, match="scaling.idle_minutes must be 15 or more"):
        synth({**ZERO, "scaling.idle_minutes": 14})


def test_waking_and_sleeping_are_no_alarms_of_the_operator():
    template = synth(ZERO)
    (topic,) = template.of_type("AWS::SNS::Topic")
    for part in ("WakeAlarm", "SleepAlarm"):
        assert topic not in json.dumps(alarm(template, part)["AlarmActions"])

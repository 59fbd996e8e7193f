"""The fleet's template: size, replacement, hooks, disk, metadata, spot, warm pool; and what the role may do about its own group."""

import json

import pytest

from infra.boot_phases import grace_s
from infra.config import ConfigError, KitConfig
from infra.fleet import DRAIN_HOOK, GROUP_ID, HEALTH_GRACE_S, LAUNCH_HOOK, LAUNCH_S, WARMUP_S
from infra.load_balancer import ENTER_S
from tests.infra.conftest import ROOT, resources


def group_of(template):
    (group,) = resources(template, "AWS::AutoScaling::AutoScalingGroup").values()
    return group


def launch_of(template):
    (template,) = resources(template, "AWS::EC2::LaunchTemplate").values()
    return template["Properties"]["LaunchTemplateData"]


def user_data_of(template) -> str:
    """The script, references in angle brackets."""
    parts = launch_of(template)["UserData"]["Fn::Base64"]["Fn::Join"][1]
    return "".join(part if isinstance(part, str) else f"<{json.dumps(part)}>" for part in parts)


@pytest.fixture(scope="module")
def service(synth):
    return synth()["service"]


def test_a_machine_is_as_the_configuration_says(service):
    launch = launch_of(service)
    assert launch["InstanceType"] == "g6.xlarge"
    assert launch["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
    (root,) = launch["BlockDeviceMappings"]
    assert root["DeviceName"] == "/dev/sda1"
    assert root["Ebs"]["Encrypted"] and root["Ebs"]["VolumeType"] == "gp3" and root["Ebs"]["VolumeSize"] == 128
    assert "KeyName" not in launch


def test_a_deploy_waits_for_the_servers_own_word(service):
    """The signal's resource in user-data is the group; the time that CloudFormation waits is the grace period, the script's is shorter."""
    group = group_of(service)
    assert resources(service, "AWS::AutoScaling::AutoScalingGroup").keys() == {GROUP_ID}
    assert group["CreationPolicy"]["ResourceSignal"]["Count"] == 1
    update = group["UpdatePolicy"]["AutoScalingRollingUpdate"]
    assert update["WaitOnResourceSignals"] and update["MaxBatchSize"] == 1 and update["MinInstancesInService"] == 1
    longest_s = grace_s(KitConfig.load("dev", ROOT))
    assert group["CreationPolicy"]["ResourceSignal"]["Timeout"] == update["PauseTime"] == f"PT{longest_s // 60}M"
    script = user_data_of(service)
    assert script.startswith("#!/bin/bash\n")  # cloud-init looks at the first bytes
    assert f"SIGNAL_RESOURCE='{GROUP_ID}'" in script and "STACK_NAME='manylora-service'" in script
    assert f"READY_S='{longest_s - LAUNCH_S}'" in script and f"ENTER_S='{ENTER_S}'" in script
    assert group["Properties"]["TargetGroupARNs"]


def test_a_server_that_is_away_for_a_moment_does_not_cost_its_instance(synth, service):
    """The load balancer's checks, which fail within half a minute, are not the group's; the agent has its own, longer measure."""
    properties = group_of(service)["Properties"]
    assert properties["HealthCheckType"] == "EBS" and properties["HealthCheckGracePeriod"] == HEALTH_GRACE_S  # EC2's is always among them
    assert "HEAL_S='600'" in user_data_of(service)
    assert "HEAL_S='1200'" in user_data_of(synth({"fleet.heal_s": 1200})["service"])


def test_an_instance_is_in_service_once_its_server_answers_and_ended_if_it_never_does(service):
    hooks = {
        hook["Properties"]["LifecycleHookName"]: hook["Properties"]
        for hook in resources(service, "AWS::AutoScaling::LifecycleHook").values()
    }
    launch = hooks[LAUNCH_HOOK]
    assert launch["LifecycleTransition"] == "autoscaling:EC2_INSTANCE_LAUNCHING" and launch["DefaultResult"] == "ABANDON"
    assert f"LAUNCH_HOOK='{LAUNCH_HOOK}'" in user_data_of(service)
    assert group_of(service)["Properties"]["DefaultInstanceWarmup"] == WARMUP_S  # its boot is over by then


def test_a_deploy_finds_the_launch_hook_as_it_leaves_it(synth):
    """CloudFormation changes it only after the rolling update, so instances with more time would be held by the old hook."""
    changes = ({"fleet.grace_s": 600}, {"fleet.grace_s": 3600}, {"image.kind": "baked"})
    templates = [resources(synth(each)["service"], "AWS::AutoScaling::LifecycleHook") for each in changes]
    assert templates[0] == templates[1] == templates[2]
    (launch,) = [item["Properties"] for item in templates[0].values() if "LAUNCHING" in item["Properties"]["LifecycleTransition"]]
    assert launch["HeartbeatTimeout"] == 7200  # the most that a hook may have


def test_a_first_deploy_waits_for_each_instance_since_no_hook_is_there_yet(synth):
    assert group_of(synth({"fleet.desired": 2})["service"])["CreationPolicy"]["ResourceSignal"]["Count"] == 2


def test_instances_are_launched_after_their_rights_exist(service):
    depends = " ".join(group_of(service)["DependsOn"])
    assert "RoleDefaultPolicy" in depends


def test_a_termination_is_held_while_requests_run(service):
    found = [hook["Properties"] for hook in resources(service, "AWS::AutoScaling::LifecycleHook").values()]
    (properties,) = [hook for hook in found if "TERMINATING" in hook["LifecycleTransition"]]
    assert properties["LifecycleTransition"] == "autoscaling:EC2_INSTANCE_TERMINATING" and properties["LifecycleHookName"] == DRAIN_HOOK
    assert properties["DefaultResult"] == "CONTINUE" and properties["HeartbeatTimeout"] == 300
    assert f"DRAIN_HOOK='{DRAIN_HOOK}'" in user_data_of(service)


@pytest.mark.parametrize(("most", "is_warned"), [(1, True), (2, False)])
def test_a_fleet_of_one_is_told_what_a_deploy_does_to_it(synthesize, most, is_warned):
    metadata = [path.read_text() for path in synthesize({"fleet.max": most}).glob("*.json") if "template" not in path.name]
    assert ("fleet.max is 1: a deploy that changes the instance answers 503" in "".join(metadata)) == is_warned


@pytest.mark.parametrize(("grace_s", "is_warned"), [(3601, True), (3600, False)])
def test_a_boot_longer_than_cloudformation_waits_is_told(synthesize, grace_s, is_warned):
    metadata = [path.read_text() for path in synthesize({"fleet.grace_s": grace_s}).glob("*.json") if "template" not in path.name]
    assert ("CloudFormation waits 3600 s for one" in "".join(metadata)) == is_warned


def test_a_boot_has_five_minutes_at_least():
    """As those that are made from the phases: user-data's own share of less would be nothing."""
    with pytest.raises(ConfigError, match="300"):
        KitConfig.load("dev", ROOT, {"fleet.grace_s": 299})
    assert grace_s(KitConfig.load("dev", ROOT, {"fleet.grace_s": 300})) == 300 > LAUNCH_S


def test_one_instance_can_still_be_replaced(synth):
    group = group_of(synth({"fleet.max": 1})["service"])
    assert group["UpdatePolicy"]["AutoScalingRollingUpdate"]["MinInstancesInService"] == 0


def test_an_empty_fleet_waits_for_nobody(synth):
    group = group_of(synth({"fleet.min": 0, "fleet.scale_to_zero": True})["service"])
    assert "CreationPolicy" not in group and group["UpdatePolicy"]["AutoScalingRollingUpdate"]["WaitOnResourceSignals"]


def test_a_size_that_was_given_once_does_not_come_back_with_each_deploy(synth):
    group = group_of(synth({"fleet.desired": 2})["service"])
    assert group["Properties"]["DesiredCapacity"] == "2"
    assert group["UpdatePolicy"]["AutoScalingScheduledAction"]["IgnoreUnmodifiedGroupSizeProperties"] is True


def test_spot_above_the_minimum_and_types_to_fall_back_on(synth):
    template = synth({"fleet.spot_percent": 60, "fleet.fallback_types": ["g6.2xlarge"], "fleet.scale_in_protection": True})["service"]
    properties = group_of(template)["Properties"]
    policy = properties["MixedInstancesPolicy"]
    assert [each["InstanceType"] for each in policy["LaunchTemplate"]["Overrides"]] == ["g6.xlarge", "g6.2xlarge"]
    distribution = policy["InstancesDistribution"]
    assert distribution["OnDemandBaseCapacity"] == 1 and distribution["OnDemandPercentageAboveBaseCapacity"] == 40
    assert distribution["OnDemandAllocationStrategy"] == "prioritized"
    assert properties["CapacityRebalance"] and properties["NewInstancesProtectedFromScaleIn"] and "LaunchTemplate" not in properties


def test_a_warm_pool_holds_launches_until_the_server_answers(synth):
    template = synth({"fleet.warm_pool": {"state": "stopped", "min_size": 2}})["service"]
    (pool,) = resources(template, "AWS::AutoScaling::WarmPool").values()
    assert any("LaunchHook" in name for name in pool["DependsOn"])  # or its first instances are stopped in the middle of their boot
    assert pool["Properties"]["PoolState"] == "Stopped" and pool["Properties"]["MinSize"] == 2


def test_ssh_only_with_a_key_pair_and_a_customers_key_on_the_disk(synth):
    key = "arn:aws:kms:eu-central-1:111122223333:key/0123"
    overrides = {"network.public_fleet": True, "network.admin_cidr": "203.0.113.7/32", "network.key_pair": "mine", "kms_key_arn": key}
    launch = launch_of(synth(overrides)["service"])
    assert launch["KeyName"] == "mine" and launch["BlockDeviceMappings"][0]["Ebs"]["KmsKeyId"] == key


def statements_of(template):
    """Statements of the instances' policies."""
    found = [
        statement
        for name, policy in resources(template, "AWS::IAM::Policy").items()
        if name.startswith("GpuFleetRole")
        for statement in policy["Properties"]["PolicyDocument"]["Statement"]
    ]
    assert found
    return found


def actions(statement):
    return [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]


def test_an_instance_may_act_on_the_group_of_its_own_stack_alone(service):
    (own,) = [s for s in statements_of(service) if "autoscaling:SetInstanceHealth" in actions(s)]
    resource = json.dumps(own["Resource"])
    assert "autoScalingGroupName/manylora-service-*" in resource and "autoScalingGroup:*" in resource
    (signal,) = [s for s in statements_of(service) if "cloudformation:SignalResource" in actions(s)]
    assert signal["Resource"] == {"Ref": "AWS::StackId"}
    (metrics,) = [s for s in statements_of(service) if "cloudwatch:PutMetricData" in actions(s)]
    assert metrics["Condition"] == {"StringEquals": {"cloudwatch:namespace": "Manylora"}}


def test_no_secret_is_in_user_data_and_the_hubs_is_readable_only_where_it_is_used(synth, service):
    assert not [s for s in statements_of(service) if "secretsmanager:GetSecretValue" in actions(s)]
    arn = "arn:aws:secretsmanager:eu-central-1:111122223333:secret:hub-abc"
    template = synth(
        {"model.hub": True, "model.hub_secret_arn": arn, "model.source": "hub", "model.id": "org/base", "model.revision": "a" * 40}
    )["service"]
    (reading,) = [s for s in statements_of(template) if "secretsmanager:GetSecretValue" in actions(s)]
    assert reading["Resource"] == arn
    script = user_data_of(template)
    assert f"HUB_SECRET_ARN='{arn}'" in script and f"MODEL_ORIGIN='hub://org/base@{'a' * 40}'" in script


@pytest.mark.parametrize("kind", ["efs", "fsx", "s3files"])
def test_where_the_bucket_is_a_file_system_nothing_is_copied_beside_it(synth, kind):
    source, shared = ("s3", "/mnt/manylora/base") if kind == "efs" else ("local", "")
    script = user_data_of(synth({"storage.kind": kind})["service"])
    assert f"MANYLORA_ADAPTER_SOURCE='{source}'" in script and f"SHARED_DIR='{shared}'\n" in script
    assert ("MANYLORA_STORE_DIR='/mnt/manylora/store'" in script) == (kind == "efs")
    assert f"MOUNT_KIND='{ {'efs': 'efs', 'fsx': 'lustre', 's3files': 's3files'}[kind] }'" in script

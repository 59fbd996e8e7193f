"""Which AMI a fleet starts from, and the pipeline that bakes one: content in its name, same scripts as a boot, tried before it is taken."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from server.settings import Settings
from tests.infra.conftest import resources
from tests.infra.test_fleet import launch_of

ROOT = Path(__file__).parents[2]
AMI = ROOT / "ami"
# What the services publish themselves, in the same lines of the dashboard.
AWS_OWN = {"DesiredCapacity", "InServiceInstances", "PendingInstances", "HTTPCode_ELB_5XX_Count", "HTTPCode_Target_5XX_Count", "UnHealthy"}


def parameter_of(template):
    """Default of the SSM parameter that the launch template's image refers to."""
    return template["Parameters"][launch_of(template)["ImageId"]["Ref"]]


def test_the_default_is_the_newest_base_image_of_the_deep_learning_line(synth):
    parameter = parameter_of(synth()["service"])
    assert parameter["Type"] == "AWS::SSM::Parameter::Value<AWS::EC2::Image::Id>"
    assert parameter["Default"] == "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"


@pytest.mark.parametrize(
    ("overrides", "image"),
    [
        ({"image.version": "ami-0123456789abcdef0"}, "ami-0123456789abcdef0"),
        ({"image.kind": "ami", "image.ami_id": "ami-0fedcba9876543210"}, "ami-0fedcba9876543210"),
    ],
)
def test_an_image_by_its_id(synth, overrides, image):
    assert launch_of(synth(overrides)["service"])["ImageId"] == image


def test_the_articles_line(synth):
    assert "oss-nvidia-driver-gpu-pytorch-2.12-ubuntu-24.04" in parameter_of(synth({"image.ami_line": "pytorch"})["service"])["Default"]


@pytest.fixture(scope="module")
def baked(synth):
    return synth({"image.kind": "baked", "image.schedule": "cron(0 4 ? * sun *)"})


def one(template, kind):
    (found,) = resources(template, f"AWS::ImageBuilder::{kind}").values()
    return found["Properties"]


def test_the_pipeline_writes_the_parameter_that_the_fleet_reads(baked):
    (distribution,) = one(baked["image"], "DistributionConfiguration")["Distributions"]
    (written,) = distribution["SsmParameterConfigurations"]
    assert written == {"ParameterName": "/imagebuilder/manylora/ami-id", "DataType": "aws:ec2:image"}
    assert parameter_of(baked["service"])["Default"] == written["ParameterName"]


def test_a_recipe_is_named_by_all_that_it_is_made_of(baked, synth):
    """CloudFormation replaces a recipe whose content changes, and cannot make the new one under a name that is taken."""
    from infra.artifact import lock_of, read_content

    content = read_content()
    recipe = one(baked["image"], "ImageRecipe")
    assert re.fullmatch(rf"manylora-{lock_of(content)[:8]}-[0-9a-f]{{8}}", recipe["Name"])
    disk, other_files = ({"fleet.root_gib": 200}, {"storage.kind": "s3files"})
    others = [one(synth({"image.kind": "baked", **more})["image"], "ImageRecipe")["Name"] for more in (disk, other_files)]
    assert len({recipe["Name"], *others}) == 3
    assert recipe["AmiTags"]["manylora:lock"] == lock_of(content)
    assert recipe["ParentImage"].startswith("ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu")
    (component,) = recipe["Components"]
    given = {parameter["Name"]: parameter["Value"] for parameter in component["Parameters"]}
    assert "s3://" in json.dumps(given["ArtifactUri"]) and given["MountKind"] == ["efs"] and given["WheelhouseUri"] == ["none"]


def test_the_machine_that_bakes_may_read_what_image_builder_gives_it(baked):
    statements = json.dumps(resources(baked["image"], "AWS::IAM::Policy"))
    assert ":s3:::ec2imagebuilder*" in statements and "imagebuilder:GetComponent" in statements


def test_the_pipeline_is_scheduled_tested_and_bounded(baked):
    pipeline = one(baked["image"], "ImagePipeline")
    assert pipeline["Schedule"]["ScheduleExpression"] == "cron(0 4 ? * sun *)"
    assert pipeline["ImageTestsConfiguration"]["ImageTestsEnabled"]
    policy = one(baked["image"], "LifecyclePolicy")
    (detail,) = policy["PolicyDetails"]
    assert policy["ResourceSelection"]["TagMap"] == pipeline["ImageTags"]  # else no image is ever deleted
    assert detail["ExclusionRules"]["Amis"]["LastLaunched"] == {"Unit": "MONTHS", "Value": 3}  # the fleet's own is not taken from it
    assert detail["Action"] == {"Type": "DELETE", "IncludeResources": {"Amis": True, "Snapshots": True}}
    machine = one(baked["image"], "InfrastructureConfiguration")
    assert machine["InstanceTypes"] == ["g6.xlarge"] and machine["TerminateInstanceOnFailure"]
    assert machine["InstanceMetadataOptions"]["HttpTokens"] == "required"


def test_without_a_way_out_it_is_baked_in_the_default_vpc(synth):
    machine = one(synth({"image.kind": "baked", "network.nat": "none"})["image"], "InfrastructureConfiguration")
    assert "SubnetId" not in machine and "SecurityGroupIds" not in machine


def test_the_component_takes_the_parameters_that_it_is_given_and_runs_our_scripts(baked):
    component = yaml.safe_load(one(baked["image"], "Component")["Data"])
    declared = {next(iter(parameter)) for parameter in component["parameters"]}
    (given,) = one(baked["image"], "ImageRecipe")["Components"]
    assert declared == {parameter["Name"] for parameter in given["Parameters"]}
    assert [phase["name"] for phase in component["phases"]] == ["build", "validate", "test"]
    for phase in component["phases"]:
        for step in phase["steps"]:
            for script in step["inputs"]["commands"]:
                assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    text = json.dumps(component)
    assert "ami/bake.sh" in text and text.count("ami/validate.sh") == 2


def test_baking_and_booting_compile_into_the_same_folders():
    unit, warm = (AMI / "manylora.service").read_text(), (AMI / "warm.sh").read_text().replace("$cache", "/var/cache/manylora")
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE"):
        value = next(word for word in unit.split() if name in word).removeprefix("Environment=")
        assert value in warm


def trial(*arguments: str) -> list[str]:
    command = [sys.executable, "ami/try_server.py", "--shapes", "ami/warm-shapes.toml", "--device", "cpu", "--companies", "1,3"]
    return [*command, *arguments, "tiny"]


@pytest.mark.slow
def test_the_trial_serves_a_tiny_model_with_an_adapter(tmp_path):
    """What validate.sh and warm.sh run on the image, here on a CPU."""
    command = trial()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0 and "tiny: served in" in result.stdout, result.stdout + result.stderr
    wrong = subprocess.run([*command[:-1], "huge"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and "no shape huge" in wrong.stderr


@pytest.mark.slow
def test_every_choice_that_is_warmed_is_one_that_the_server_takes():
    """The options of warm.sh, as its loop gives them."""
    lines = (AMI / "warm.sh").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("for flags in ")]
    bare, *choices = [words.split() for words in shlex.split(line.removesuffix("; do"))[3:]]
    assert not bare and len(choices) == 2
    (command,) = [line for line in lines if "ami/try_server.py" in line]
    always = [word for word in command.split() if word.startswith("--flag=")]
    assert always[0] == "--flag=--kernel-trials-s"  # and a start has more time for them than another has
    assert float(always[1].removeprefix("--flag=")) > Settings.model_fields["kernel_trials_s"].default
    for flags in choices:
        result = subprocess.run(trial(*always, *flags), cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0 and "tiny: served in" in result.stdout, result.stdout + result.stderr


def test_the_agents_metrics_are_those_that_alarms_and_dashboard_read():
    """Names: the CloudWatch agent's as it writes them (prefix and measurement), and our agent's."""
    from infra.signals import LOAD_RATIO, NAMESPACE
    from server.host import group, load

    config = json.loads((AMI / "cloudwatch-agent.json").read_text())
    assert config["metrics"]["namespace"] == NAMESPACE == group.NAMESPACE
    assert ["AutoScalingGroupName"] in config["metrics"]["aggregation_dimensions"]
    collected = config["metrics"]["metrics_collected"]
    published = {*load.PUBLISHED.values(), *load.RATES.values(), "GpuErrors"}
    published |= {name if name.startswith("mem_") else f"mem_{name}" for name in collected["mem"]["measurement"]}
    published |= {f"disk_{name}" for name in collected["disk"]["measurement"]}
    published |= {f"nvidia_smi_{name}" for name in collected["nvidia_gpu"]["measurement"]}
    text = "".join((ROOT / "infra" / name).read_text() for name in ("alarms.py", "dashboard.py", "scaling.py"))
    read = {name for call in re.findall(r"server_metric\(.*|for name in \(.*", text) for name in re.findall(r'"([A-Za-z_]{3,})"', call)}
    wanted = {name for name in read if name in published or re.match(r"[A-Z][a-z]+[A-Z]|[a-z]+_[a-z]+", name)} - AWS_OWN
    assert {"Queued", "OutputTokens", "GpuErrors", "disk_used_percent", "nvidia_smi_utilization_gpu"} <= wanted  # it finds what there is
    assert wanted <= published, wanted - published
    assert LOAD_RATIO in published

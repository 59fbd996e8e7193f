"""Run as a program by test_deliver.py: a delivery that kills itself before its n-th operation on the disk.

python -m tests.server.host.deliver_victim FOLDER
"""

import os
import shutil
import signal
import sys
from pathlib import Path

from server.host.deliver import ModelFolder, deliver, point
from server.host.manifest import MANIFEST_NAME, Manifest
from server.host.origins import SharedFolder
from tests.server.host.models import CONTENT, unwhole, write_model


class Remote(SharedFolder):
    """A folder that only the origin sees, so that both tiers are written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = None


def work(root: Path) -> None:
    folder = deliver(Remote(root.parent / "origin"), ModelFolder(root / "shared"), ModelFolder(root / "cache"))
    point(root / "link", folder)


def arm(root: Path, num_operations: int) -> None:
    left = num_operations

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal left
        touches = event == "fcntl.flock" or (
            (event == "open" or event.startswith("os."))
            and args
            and isinstance(args[0], str | os.PathLike)
            and str(args[0]).startswith(str(root))
        )
        if touches:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def visible_errors(root: Path) -> list[str]:
    """What a server could see that is not whole."""
    errors = []
    for tier in ("shared", "cache"):
        for folder in (root / tier / "models").glob("*"):
            manifest = Manifest.from_json((folder / MANIFEST_NAME).read_bytes())
            errors += [f"{tier}/{name}" for name in unwhole(folder)]
            errors += [f"{tier}: digest"] * (manifest.digest != folder.name)
    link = root / "link"
    if link.is_symlink():
        errors += [f"link: {name}" for name in unwhole(link)]
    return errors


def kill_everywhere(top: Path) -> int:
    """For each moment: killed there, nothing half-written to be seen; run again, all of it is there. The number of moments."""
    for moment in range(1, 2000):
        root = top / str(moment)
        status = run(root, moment)
        if errors := visible_errors(root):
            sys.exit(f"killed before operation {moment}: {errors}")
        if os.WIFEXITED(status):
            return moment - 1 if os.WEXITSTATUS(status) == 0 else sys.exit(f"operation {moment}: exit {os.WEXITSTATUS(status)}")
        again = run(root, 0)
        if again or visible_errors(root) or not (root / "link").is_symlink():
            sys.exit(f"after a kill before operation {moment}: status {again}, {visible_errors(root)}")
        shutil.rmtree(root)
    sys.exit("never came through")


def run(root: Path, moment: int) -> int:
    """A child that works, killed before operation `moment` if that is not 0; its wait status."""
    child = os.fork()
    if child == 0:
        if moment:
            arm(root, moment)
        work(root)
        os._exit(0)
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    top = Path(sys.argv[1])
    write_model(top / "origin", CONTENT)
    print(kill_everywhere(top))

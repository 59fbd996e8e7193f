"""Moves the paths that user-data, its scripts and the units write to below a folder: what a namespace does, by rewriting text.

`plain_instance` moves user-data itself, and what comes out of the archive: `python -m rehearse.moved RELEASE ROOT METADATA_ENDPOINT`.
"""

import re
import sys
from pathlib import Path

# Whole components alone; what stands before is neither a path nor a word.
_OWN = re.compile(
    r"(?<![\w./}])(/(?:opt/(?:manylora|dlami|aws)|etc/(?:manylora|systemd/system|fstab|logrotate\.d|needrestart/conf\.d)"
    r"|var/(?:lib|log|cache)/manylora|mnt/manylora|run/manylora-admin))(?![\w-])"
)
_TEXTS = {".sh", ".service", ".conf", ".json"}


def moved(text: str, root: Path) -> str:
    """`text` with those paths below `root`."""
    return _OWN.sub(lambda match: f"{root}{match[1]}", text)


def main() -> None:
    """The archive's ami/ folder; the agent, which has no other way to it, is told where the metadata service is."""
    release, root, imds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    for path in (release / "ami").iterdir():
        if path.suffix in _TEXTS:
            path.write_text(
                moved(path.read_text(), root).replace("-m server.host.agent", f"-m server.host.agent --metadata-endpoint {imds}")
            )


if __name__ == "__main__":
    main()

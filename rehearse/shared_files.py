"""What the folder that stands for EFS lies on, for the table: a loopback NFS mount where the machine has one, else a local folder."""

from pathlib import Path


def kind_of_file_system(folder: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> str:
    """As the table says it: `nfs4 (127.0.0.1:/export)`, or a local folder."""
    if not mountinfo.exists():
        return "a local folder"
    path, best = folder.resolve(), ("", "unknown", "")
    for line in mountinfo.read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].replace("\\040", " ")
        kind, source = after.split()[:2]
        if path.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind, source)
    _, kind, source = best
    return f"{kind} ({source})" if kind.startswith("nfs") else f"a local folder ({kind}), no NFS"

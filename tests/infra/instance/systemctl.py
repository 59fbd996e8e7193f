"""Stands in for systemctl where user-data is tried: reads the real unit files and does what they say of commands and environments.

Owns no supervision: a oneshot unit is run to its end, any other is started in the background. `-` and `+` before a command, EnvironmentFile
with its quotes, `${NAME}` and Requires= are as systemd.exec(5) and systemd.service(5) have them; users and sandboxes are left out.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

UNITS = Path("/etc/systemd/system")
STATE = Path(os.environ.get("STAND_IN_STATE", ""))
MANAGER = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"} | {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def read_unit(name: str) -> dict[str, list[str]]:
    """Key -> values of all sections, drop-ins included."""
    values: dict[str, list[str]] = {}
    for path in [UNITS / name, *sorted((UNITS / f"{name}.d").glob("*.conf"))]:
        for line in path.read_text().splitlines():
            key, sign, value = line.partition("=")
            if sign and not line.startswith(("#", "[")):
                values.setdefault(key, []).append(value)
    return values


def read_environment(path: Path) -> dict[str, str]:
    """An EnvironmentFile. Double quotes, in which a backslash takes the next character as it is."""
    found = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition("=")
        quoted, plain = re.fullmatch(r'"((?:[^"\\]|\\.)*)"', value), re.fullmatch(r"""[^"'\\]*""", value)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or not (quoted or plain):
            sys.exit(f"systemctl: {path}: not a line that systemd reads: {line}")
        found[name] = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else value
    return found


def read_environments(unit: dict[str, list[str]]) -> dict[str, str]:
    """All EnvironmentFile= of a unit, those with a minus only where they are."""
    found = {}
    for value in unit.get("EnvironmentFile", []):
        path = Path(value.removeprefix("-"))
        if path.exists() or not value.startswith("-"):
            found.update(read_environment(path))
    return found


def run(unit: dict[str, list[str]], line: str, environment: dict[str, str], *, wait: bool) -> int:
    prefix = re.match(r"[-+@!:]*", line)[0]
    words = [re.sub(r"\$\{(\w+)\}", lambda match: environment.get(match[1], ""), word) for word in shlex.split(line[len(prefix) :])]
    target = unit["StandardOutput"][-1]
    assert target.startswith("append:"), target
    with open(target.removeprefix("append:"), "ab") as log:
        process = subprocess.Popen(words, env=environment, cwd=unit["WorkingDirectory"][-1], stdout=log, stderr=log, start_new_session=True)
    if not wait:
        with (STATE / "pids").open("a") as pids:
            pids.write(f"{process.pid}\n")
        return 0
    return 0 if process.wait() == 0 or "-" in prefix else process.returncode


def start(name: str) -> int:
    started = STATE / f"started-{name}"
    if started.exists():
        return 0
    unit = read_unit(name)
    for needed in " ".join(unit.get("Requires", [])).split():
        if code := start(needed):
            return code
    environment = dict(MANAGER)
    for line in unit.get("Environment", []):
        environment.update(word.split("=", 1) for word in shlex.split(line))
    for line in unit.get("ExecStartPre", []):
        if code := run(unit, line, environment | read_environments(unit), wait=True):
            return code
    environment |= read_environments(unit)  # again: what runs before may have written one of them
    code = run(unit, unit["ExecStart"][-1], environment, wait=unit["Type"][-1] == "oneshot")
    if code == 0:
        started.touch()
    return code


def main() -> int:
    verb, *rest = sys.argv[1:]
    with (STATE / "systemctl").open("a") as calls:
        calls.write(shlex.join(sys.argv[1:]) + "\n")
    names = [word for word in rest if not word.startswith("--")]
    if verb == "daemon-reload":
        return 0
    if verb == "enable":
        missing = [name for name in names if not (UNITS / name).is_file()]
        if missing:
            sys.exit(f"systemctl: no unit {missing[0]}")
        return max((start(name) for name in names), default=0) if "--now" in rest else 0
    if verb == "start":
        return max(start(name) for name in names)
    sys.exit(f"systemctl: the stand-in does not know {verb}")


if __name__ == "__main__":
    sys.exit(main())

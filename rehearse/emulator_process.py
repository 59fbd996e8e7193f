"""The emulator as a child process: its certificate, its ports, its environment for clients, its end.

Owns the process of `rehearse.emulator` and the folder that it writes to. `rehearse.rehearsal` starts one.
"""

import datetime
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rehearse.emulator.names import REGION
from rehearse.errors import CannotRun, Differs
from rehearse.interrupts import held

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-rehearse" / "bin" / "python"
_START_S = 40.0
_GONE_S = 10.0


class Emulator:
    """`port` (plain), `https_port`, `certificate`, `state`. A context manager; Differs if it does not start."""

    def __init__(self, folder: Path) -> None:
        if not PYTHON.is_file():
            raise CannotRun("there is no .venv-rehearse: run `make rehearse-ready`")
        self.state, self.log = folder / "emulator", folder / "emulator.log"
        self.state.mkdir()
        self.port, self.https_port = free_ports(2)
        self.certificate, self._key = folder / "certificate.pem", folder / "key.pem"
        _write_certificate(self.certificate, self._key)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Of AWS's API. `localhost`: the CDK command line then asks for buckets by path, not by host name."""
        return f"http://localhost:{self.port}"

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """`base` without anything of a real account, and with what leads every AWS client here."""
        kept = {name: value for name, value in base.items() if not name.startswith(("AWS_", "CDK_"))}
        return kept | {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_SESSION_TOKEN": "testing", "AWS_REGION": REGION, "AWS_DEFAULT_REGION": REGION, "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "2",
            "CDK_DISABLE_CLI_TELEMETRY": "true", "NO_PROXY": "localhost,127.0.0.1",
        }  # fmt: skip

    def client(self, service: str, key_id: str = "testing", secret: str = "testing") -> Any:
        """A boto3 client of the emulator, whatever the environment says."""
        import boto3

        keys = {"aws_access_key_id": key_id, "aws_secret_access_key": secret, "region_name": REGION}
        return boto3.session.Session(**keys).client(service, endpoint_url=self.url)

    def __enter__(self) -> "Emulator":
        flags = {"port": self.port, "https-port": self.https_port, "certificate": self.certificate, "key": self._key, "state": self.state}
        command = [str(PYTHON), "-m", "rehearse.emulator", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        environment |= {"TMPDIR": str(self.state), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            with self.log.open("wb") as log, held():
                self._process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
                )
            deadline = time.monotonic() + _START_S
            while not _answers(self.port) or not _answers(self.https_port):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise Differs(f"the emulator did not start: {self.log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def inventory(self, name: str) -> dict[str, list[str]]:
        """What it holds now, as {"service.store": ids}. `name`: of this question, once. Differs if it does not answer."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(f"{name}\n".encode())
        self._process.stdin.flush()
        path = self.state / f"{name}.json"
        deadline = time.monotonic() + _START_S
        while not path.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise Differs(f"the emulator does not say what it holds: {self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        records = json.loads((self.state / "records.json").read_text())
        return json.loads(path.read_text()) | ({"rehearsal.records": sorted(records)} if records else {})

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            end_group(self._process)


def end_group(process: subprocess.Popen[Any], grace_s: float = 10.0) -> None:
    """SIGTERM to the process unless there is no grace, SIGKILL to the group that it leads; returns when all of it is gone."""
    if grace_s:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    deadline = time.monotonic() + _GONE_S
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        while time.monotonic() < deadline:  # the others are somebody else's children
            os.killpg(process.pid, 0)
            time.sleep(0.02)
    process.wait()
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()


def free_ports(num: int) -> list[int]:
    """Ports of loopback that nobody listens on, held together so that no two are the same."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(num)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _write_certificate(certificate: Path, key: Path) -> None:
    """Self-signed, a day long, for localhost and for the names that API Gateway gives to its endpoints."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "rehearsal")])
    now = datetime.datetime.now(datetime.UTC)
    names = ["localhost", f"*.execute-api.{REGION}.amazonaws.com"]
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(item) for item in names]), critical=False)
        .sign(private, hashes.SHA256())
    )
    pem, raw = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    certificate.write_bytes(built.public_bytes(pem))
    key.touch(mode=0o600)
    key.write_bytes(private.private_bytes(pem, raw, serialization.NoEncryption()))

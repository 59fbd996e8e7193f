"""user-data from a bare machine to an answer: the rendered script, the archive of this source, the units, model delivery, the real server.

Stand-ins: S3 and the metadata service on loopback, mount (a bind), systemctl (reads the real units), useradd, the AWS CLI. Packages are
those of this interpreter, as an image would bring them. What no test shows without an account: the AMI, EFS itself, a GPU, IAM.
"""

import logging
from pathlib import Path

import httpx
import pytest

from tests.infra.instance.boot import BUCKET, Machine, why_not
from tests.infra.instance.systemctl import read_environment
from tests.server.host.instance import MetadataStandIn

ROOT = Path(__file__).parents[2]
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=f"user-data in a namespace: {REASON}")]


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_CONFIG_FILE", str(tmp_path_factory.mktemp("aws") / "none"))
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        yield boto3.client("s3", region_name="us-east-1")
    server.stop()


@pytest.fixture
def imds():
    facts = {"instance-id": "i-0123456789abcdef0", "placement/region": "us-east-1", "autoscaling/target-lifecycle-state": "InService"}
    with MetadataStandIn(**facts) as stand_in:
        yield stand_in


@pytest.fixture
def machine(tmp_path, s3, imds):
    machine = Machine(tmp_path, s3, imds.endpoint)
    yield machine
    machine.stop()


def put_folder(s3, folder: Path, prefix: str) -> None:
    for path in folder.iterdir():
        s3.upload_file(str(path), BUCKET, f"{prefix}/{path.name}")


def test_from_a_bare_machine_to_an_answer_with_an_adapter_out_of_the_bucket(machine, s3, model_dir):
    put_folder(s3, model_dir, "models/base")
    put_folder(s3, ROOT / "examples" / "adapters" / "pirate", "adapters/pirate")
    secret = "an admin key of the test"
    import boto3

    arn = boto3.client("secretsmanager", region_name="us-east-1").create_secret(Name="admin", SecretString=secret)["ARN"]
    server = {
        "MANYLORA_SERVED_MODEL_NAME": "base", "MANYLORA_DEVICE": "cpu", "MANYLORA_MAX_TOTAL_TOKENS": "256",
        "MANYLORA_ADAPTER_SOURCE": "s3", "MANYLORA_MODEL_BUCKET": BUCKET, "MANYLORA_MODEL_FOLDER": "adapters",
        "MANYLORA_STORE_DIR": "/mnt/manylora/store",
    }  # fmt: skip
    result = machine.run(machine.variables(ADMIN_SECRET_ARN=arn, **server), times=2)
    assert result.returncode == 0, result.stdout + result.stderr

    url = f"http://127.0.0.1:{machine.port}"
    body = {"inputs": QUESTION, "parameters": {"max_new_tokens": 12}}
    base = httpx.post(f"{url}/generate", json=body, timeout=60)
    body["parameters"]["adapter_id"] = "pirate"
    pirate = httpx.post(f"{url}/generate", json=body, timeout=60)
    assert base.status_code == 200 and pirate.status_code == 200, base.text + pirate.text
    assert "Paris" in base.json()["generated_text"] and "Arrr" in pirate.json()["generated_text"]
    assert httpx.get(f"{url}/info", timeout=10).json()["model_id"] == "base"
    listed = httpx.get(f"{url}/v1/adapters", headers={"authorization": f"Bearer {secret}"}, timeout=10)
    assert listed.status_code == 200, listed.text  # the key came from the secret

    # What is where: one copy for all on the shared file system, one on the instance store, which is served.
    link = Path(machine.recorded("link")[0])
    assert link.is_relative_to("/opt/dlami/nvme/manylora/models")
    assert len(list((machine.state / "shared" / "base" / "models").iterdir())) == 1
    assert (machine.state / "nvme" / "manylora" / "models" / link.name / "model.safetensors").is_file()
    assert list((machine.state / "shared" / "store" / "objects").iterdir())  # the adapter, for every instance

    # Each step is written down and said; the deploy is told; a second run changed nothing.
    assert machine.steps() == ["artifact", "install", "mount", "agent", "model", "ready"] * 2
    assert "manylora: mount: " in result.stdout and "manylora: boot: SUCCESS" in result.stdout
    signals = machine.recorded("aws")
    wanted = "--stack-name manylora-service --logical-resource-id GpuFleetGroup --unique-id i-0123456789abcdef0 --status SUCCESS"
    assert len(signals) == 2 and all(wanted in line for line in signals)
    assert [line for line in machine.recorded("fstab") if " /mnt/manylora " in line] == [
        "fs-1:/ /mnt/manylora efs _netdev,tls,iam,accesspoint=fsap-1,nofail 0 0"
    ]
    assert len(machine.recorded("mount")) == 1
    assert "--uid 8080" in machine.recorded("useradd")[0]
    assert "-c file:/etc/manylora/cloudwatch-agent.json" in machine.recorded("agent")[0]
    kept = result.stdout + result.stderr + "".join(path.read_text() for path in (machine.state / "server.env", machine.state / "host.env"))
    assert secret not in kept


def test_a_server_that_cannot_start_fails_the_deploy_and_says_why(machine, s3):
    result = machine.run(machine.variables(MODEL_ORIGIN=f"s3://{BUCKET}/models/nobody"))
    assert result.returncode != 0
    assert "--status FAILURE" in machine.recorded("aws")[0] and "manylora: boot: FAILURE" in result.stdout
    assert "models/nobody/manifest.json is not there; python -m infra.push_model" in result.stdout
    assert not httpx_answers(machine.port)


def test_an_instance_that_goes_to_the_warm_pool_sends_no_signal(machine, imds):
    imds.values["autoscaling/target-lifecycle-state"] = "Warmed:Stopped"
    result = machine.run(machine.variables(MODEL_ORIGIN="nonsense"))
    assert result.returncode != 0 and not machine.recorded("aws") and "no signal" in result.stdout


def httpx_answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def test_values_survive_the_way_through_shell_and_systemd(machine):
    """Blanks, backslashes, double quotes and dollars arrive as they were given."""
    odd = r'a "quoted" \ $HOME `x` value'
    machine.run(machine.variables(MODEL_ORIGIN="nonsense", MANYLORA_SERVED_MODEL_NAME=odd))
    assert read_environment(machine.state / "server.env")["MANYLORA_SERVED_MODEL_NAME"] == odd

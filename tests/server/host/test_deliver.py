"""Delivery of the base model: from every kind of origin, whole or not at all, once a fleet."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.host.deliver import DamagedCopy, ModelFolder, deliver, main, point
from server.host.manifest import MANIFEST_NAME, Manifest, ModelRefused
from server.host.origins import OriginOptions, OriginUnavailable, SharedFolder, open_origin
from tests.server.host.deliver_victim import Remote
from tests.server.host.models import CONTENT, put_model, unwhole, write_model, zip_model
from tests.server.sources.hub_stand_in import HubStandIn, Repository

ROOT = Path(__file__).parents[3]
COMMIT = "c" * 40


class CountedOrigin(Remote):
    """Counts what is fetched."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fetched: list[str] = []

    def fetch(self, file, target):
        self.fetched.append(file.name)
        return super().fetch(file, target)


@pytest.fixture
def bucket(aws) -> str:
    name = f"models-{os.urandom(4).hex()}"
    aws("s3").create_bucket(Bucket=name)
    return name


@pytest.mark.parametrize("kind", ["s3", "archive", "hub", "folder"])
def test_every_kind_of_origin_delivers_the_same_bytes(kind, aws, bucket, tmp_path):
    with HubStandIn() as hub:
        match kind:
            case "s3":
                put_model(aws("s3"), bucket, "models/base")
                uri = f"s3://{bucket}/models/base"
            case "archive":
                zip_model(tmp_path / "model.zip")
                aws("s3").upload_file(str(tmp_path / "model.zip"), bucket, "asset.zip")
                uri = f"s3://{bucket}/asset.zip"
            case "hub":
                hub.repositories["org/base"] = Repository(commits={COMMIT: {**CONTENT, "README.md": b"no"}}, branches={"main": COMMIT})
                uri = f"hub://org/base@{COMMIT}"
            case _:
                write_model(tmp_path / "origin")
                uri = str(tmp_path / "origin")
        origin = open_origin(uri, OriginOptions(hub_endpoint=hub.endpoint))
        folder = deliver(origin, ModelFolder(tmp_path / "shared"), ModelFolder(tmp_path / "cache"))
    assert not unwhole(folder) and folder.parent == tmp_path / "cache" / "models"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*CONTENT, MANIFEST_NAME])


def test_a_large_object_comes_in_ranges_and_in_order(aws, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("server.host.s3_stream.RANGE_BYTES", 1000)
    content = {**CONTENT, "model.safetensors": os.urandom(123_457)}
    put_model(aws("s3"), bucket, "m", content)
    folder = deliver(open_origin(f"s3://{bucket}/m", OriginOptions()), ModelFolder(tmp_path / "shared"), None)
    assert not unwhole(folder, content)


def test_a_replaced_object_is_never_mixed_with_its_predecessor(aws, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("server.host.s3_stream.RANGE_BYTES", 1000)
    monkeypatch.setattr("server.host.s3_stream.READ_AHEAD", 1)
    put_model(aws("s3"), bucket, "m")
    origin = open_origin(f"s3://{bucket}/m", OriginOptions())
    chunks = origin._object("model-00002-of-00002.safetensors").chunks()
    next(chunks)
    aws("s3").put_object(Bucket=bucket, Key="m/model-00002-of-00002.safetensors", Body=b"x" * 30_000)
    with pytest.raises(Exception, match="PreconditionFailed|condition"):
        list(chunks)


def test_the_second_instance_fetches_nothing_and_a_restart_neither(tmp_path):
    write_model(tmp_path / "origin")
    origin = CountedOrigin(tmp_path / "origin")
    for instance in ("first", "second", "second"):
        folder = deliver(origin, ModelFolder(tmp_path / "shared"), ModelFolder(tmp_path / instance))
        assert folder.is_relative_to(tmp_path / instance) and not unwhole(folder)
    assert sorted(origin.fetched) == sorted(CONTENT)


def test_a_damaged_shared_copy_is_found_and_fetched_again(tmp_path):
    manifest = write_model(tmp_path / "origin")
    origin = CountedOrigin(tmp_path / "origin")
    shared = ModelFolder(tmp_path / "shared")
    weights = shared.bring(origin, manifest) / "model-00001-of-00002.safetensors"
    weights.write_bytes(b"?" + weights.read_bytes()[1:])  # same size: only the checksum tells
    folder = deliver(origin, shared, ModelFolder(tmp_path / "cache"))
    assert not unwhole(folder) and not unwhole(shared.path_of(manifest)) and len(origin.fetched) == 2 * len(CONTENT)


def test_bytes_that_do_not_match_the_manifest_are_never_published(tmp_path):
    manifest = write_model(tmp_path / "origin")
    (tmp_path / "origin" / "model-00002-of-00002.safetensors").write_bytes(b"v" * 30_000)
    shared = ModelFolder(tmp_path / "shared")
    with pytest.raises(DamagedCopy, match="model-00002-of-00002.safetensors"):
        shared.bring(Remote(tmp_path / "origin"), manifest)
    assert not list((tmp_path / "shared" / "models").iterdir()) and not list((tmp_path / "shared" / "staging").iterdir())


def test_a_folder_that_all_see_is_served_in_place_without_a_cache(tmp_path):
    write_model(tmp_path / "bucket")
    assert deliver(SharedFolder(tmp_path / "bucket"), ModelFolder(tmp_path / "shared"), None) == tmp_path / "bucket"
    (tmp_path / "bucket" / "config.json").write_bytes(b"{")
    with pytest.raises(DamagedCopy, match=MANIFEST_NAME):
        deliver(SharedFolder(tmp_path / "bucket"), ModelFolder(tmp_path / "shared"), None)


def test_a_model_that_does_not_fit_the_instance_store_is_served_from_the_shared_folder(tmp_path, monkeypatch):
    manifest = write_model(tmp_path / "origin")
    shared, cache = ModelFolder(tmp_path / "shared"), ModelFolder(tmp_path / "cache")
    monkeypatch.setattr(cache, "has_room", lambda num_bytes: False)
    assert deliver(Remote(tmp_path / "origin"), shared, cache) == shared.path_of(manifest)


def test_without_a_shared_folder_each_instance_fetches_for_itself(tmp_path):
    write_model(tmp_path / "origin")
    origin = CountedOrigin(tmp_path / "origin")
    for instance in ("first", "second"):
        assert not unwhole(deliver(origin, None, ModelFolder(tmp_path / instance)))
    assert len(origin.fetched) == 2 * len(CONTENT)
    with pytest.raises(ModelRefused, match="--cache-dir"):
        deliver(origin, None, None)


def test_the_cache_keeps_one_model_the_shared_folder_all(tmp_path):
    shared, cache = ModelFolder(tmp_path / "shared"), ModelFolder(tmp_path / "cache")
    for version, extra in (("one", b"1"), ("two", b"2")):
        write_model(tmp_path / version, {**CONTENT, "config.json": extra})
        point(tmp_path / "link", deliver(Remote(tmp_path / version), shared, cache))
        assert (tmp_path / "link" / "config.json").read_bytes() == extra
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 1
    assert len(list((tmp_path / "shared" / "models").iterdir())) == 2


@pytest.mark.timeout(120)
def test_killed_before_any_operation_nothing_half_written_is_seen_and_the_next_run_brings_it(tmp_path):
    command = [sys.executable, "-m", "tests.server.host.deliver_victim", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout) > 60  # moments; fewer would mean that the trap sees nothing


def deliver_command(bucket: str, folder: Path) -> list[str]:
    flags = ["--origin", f"s3://{bucket}/m", "--shared-dir", str(folder / "shared"), "--link", str(folder / "link")]
    return [sys.executable, "-m", "server.host.deliver", *flags, "--cache-dir", str(folder / "cache")]


def test_two_processes_and_one_of_them_killed_while_it_streams(aws, bucket, tmp_path):
    content = {**CONTENT, "model.safetensors": os.urandom(64 << 20)}
    put_model(aws("s3"), bucket, "m", content)
    first = subprocess.Popen(deliver_command(bucket, tmp_path), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 1 << 20 for path in tmp_path.glob("shared/staging/*/files/model.safetensors")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    second = subprocess.Popen(deliver_command(bucket, tmp_path), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not list(tmp_path.glob("shared/models/*")), "published before it was whole"
    words = second.communicate(timeout=90)[1]
    assert second.returncode == 0, words
    assert not unwhole(tmp_path / "link", content)


def test_memory_does_not_grow_with_the_model(aws, bucket, tmp_path):
    weights = os.urandom(1 << 20) * 160
    put_model(aws("s3"), bucket, "m", {**CONTENT, "model.safetensors": weights})
    code = "import sys; from server.host import s3_stream; from server.host.deliver import main\n"
    code += "s3_stream.READ_AHEAD = 3; code = main(sys.argv[1:])\n"
    code += "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); sys.exit(code)"
    command = [sys.executable, "-c", code, *deliver_command(bucket, tmp_path)[3:]]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 140 << 10  # KiB: an interpreter with boto3, and three ranges; less than the weights
    assert hashlib.sha256((tmp_path / "link" / "model.safetensors").read_bytes()).digest() == hashlib.sha256(weights).digest()


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://bucket", "must be s3://"),
        ("hub://org/base", "COMMIT"),
        ("hub://org/base@main", "COMMIT"),
        ("file:///x", "must be s3://"),
        ("/nowhere", "push_model"),
    ],
)
def test_a_wrong_origin_is_refused_with_what_is_allowed(uri, words, tmp_path, caplog):
    assert main(["--origin", uri, "--shared-dir", str(tmp_path / "s"), "--link", str(tmp_path / "link")]) == 2
    assert words in caplog.text and not (tmp_path / "link").exists()


def test_a_prefix_without_a_manifest_names_what_to_do(aws, bucket, tmp_path):
    aws("s3").put_object(Bucket=bucket, Key="m/config.json", Body=b"{}")
    with pytest.raises(ModelRefused, match=r"m/manifest.json is not there; python -m infra.push_model"):
        open_origin(f"s3://{bucket}/m", OriginOptions()).manifest()
    with pytest.raises(ModelRefused, match="not a zip"):
        aws("s3").put_object(Bucket=bucket, Key="m.zip", Body=b"nothing")
        open_origin(f"s3://{bucket}/m.zip", OriginOptions()).manifest()


def test_what_is_away_for_a_moment_is_asked_again(monkeypatch, tmp_path, caplog):
    manifest = write_model(tmp_path / "origin")
    answers = [OriginUnavailable("S3 answered 503"), DamagedCopy("cut off"), None]
    monkeypatch.setattr("server.host.deliver._PAUSES_S", (0.0,) * 4)

    def fetch(self, file, target):
        if error := answers.pop(0) if answers else None:
            raise error
        return SharedFolder.fetch(self, file, target)

    monkeypatch.setattr(Remote, "fetch", fetch)
    monkeypatch.setattr("server.host.deliver.open_origin", lambda uri, options: Remote(tmp_path / "origin"))
    flags = ["--origin", "x", "--shared-dir", str(tmp_path / "shared"), "--link", str(tmp_path / "link")]
    assert main([*flags, "--tries", "2"]) == 1 and not (tmp_path / "link").exists()
    assert main(flags) == 0 and not unwhole(tmp_path / "link") and not answers
    assert caplog.text.count("not delivered") == 2 and (tmp_path / "link").resolve().name == manifest.digest


def test_an_s3_that_is_away_is_worth_another_try(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0)
    with pytest.raises(OriginUnavailable):
        open_origin("s3://some-bucket/m", OriginOptions(region="us-east-1")).manifest()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m | {"format": 2}, "`format` must be 1"),
        (lambda m: {"format": 1, "files": []}, "`files` must be"),
        (lambda m: {"format": 1, "files": {k: v for k, v in m["files"].items() if k != "config.json"}}, "no config.json"),
        (lambda m: {"format": 1, "files": {k: v for k, v in m["files"].items() if "safetensors" not in k}}, "pickled"),
        (lambda m: {"format": 1, "files": m["files"] | {"../x": {"bytes": 1, "sha256": "0" * 64}}}, "'../x'"),
        (lambda m: {"format": 1, "files": m["files"] | {"x.json": {"bytes": 1}}}, "files.x.json"),
        (lambda m: {"format": 1, "files": m["files"] | {"x.json": {"bytes": 1, "sha256": "no"}}}, "files.x.json.sha256"),
    ],
)
def test_a_manifest_is_read_strictly(change, words, tmp_path):
    import json

    values = json.loads(write_model(tmp_path / "m").to_json())
    with pytest.raises(ModelRefused, match=words.replace("`", "`").replace(".", r"\.")):
        Manifest.from_json(json.dumps(change(values)).encode())


def test_the_hubs_token_is_read_from_the_secret_alone(aws, tmp_path):
    arn = aws("secretsmanager").create_secret(Name=f"hub-{os.urandom(3).hex()}", SecretString="hf_secret\n")["ARN"]
    with HubStandIn() as hub:
        hub.repositories["org/base"] = Repository(commits={COMMIT: CONTENT}, branches={"main": COMMIT}, token="hf_secret")
        from server.host.deliver import read_secret

        options = OriginOptions(hub_endpoint=hub.endpoint, read_hub_token=lambda: read_secret(arn, "us-east-1"))
        folder = deliver(open_origin(f"hub://org/base@{COMMIT}", options), ModelFolder(tmp_path / "shared"), None)
        assert not unwhole(folder)
        with pytest.raises(ModelRefused, match="token"):
            open_origin(f"hub://org/base@{COMMIT}", OriginOptions(hub_endpoint=hub.endpoint)).manifest()

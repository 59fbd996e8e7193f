"""push_model: the bucket holds the whole model or no manifest, and the server's side reads what was written."""

import json

import boto3
import pytest
from moto import mock_aws

from infra import push_model
from infra.push_model import PushRefused, Target, find_bucket, push, read_files
from server.host.manifest import Manifest

TARGET = Target("models-bucket", "models/tiny/")


@pytest.fixture
def folder(tmp_path):
    files = {
        "config.json": "{}",
        "tokenizer.json": "{}",
        "model.safetensors": "weights" * 1000,
        "README.md": "no",
        "pytorch_model.bin": "no",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.fixture
def aws(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        boto3.client("s3").create_bucket(Bucket=TARGET.bucket)
        yield boto3


def keys(s3):
    listing = s3.list_objects_v2(Bucket=TARGET.bucket, Prefix=TARGET.prefix)
    return sorted(item["Key"].removeprefix(TARGET.prefix) for item in listing.get("Contents", []))


def read_manifest(s3):
    return s3.get_object(Bucket=TARGET.bucket, Key=TARGET.prefix + "manifest.json")["Body"].read()


def test_what_was_pushed_is_what_an_instance_reads(aws, folder):
    s3 = aws.client("s3")
    assert push(s3, TARGET, read_files(folder), "folder:tiny", show=False) == 3
    assert keys(s3) == ["config.json", "manifest.json", "model.safetensors", "tokenizer.json"]
    manifest = Manifest.from_json(read_manifest(s3))
    assert {file.name: file.size_bytes for file in manifest.files} == {"config.json": 2, "model.safetensors": 7000, "tokenizer.json": 2}


def test_a_second_push_sends_only_what_changed(aws, folder):
    s3 = aws.client("s3")
    push(s3, TARGET, read_files(folder), "x", show=False)
    assert push(s3, TARGET, read_files(folder), "x", show=False) == 0
    before = Manifest.from_json(read_manifest(s3)).digest
    (folder / "model.safetensors").write_text("Weights" * 1000)  # as long as before
    assert push(s3, TARGET, read_files(folder), "x", show=False) == 1
    assert Manifest.from_json(read_manifest(s3)).digest != before


def test_an_upload_that_breaks_leaves_no_manifest(aws, folder, monkeypatch):
    s3 = aws.client("s3")
    sent = s3.upload_file

    def breaks(path, *arguments, **options):
        if path.endswith("tokenizer.json"):
            raise ConnectionError("cut")
        sent(path, *arguments, **options)

    monkeypatch.setattr(s3, "upload_file", breaks)
    with pytest.raises(ConnectionError):
        push(s3, TARGET, read_files(folder), "x", show=False)
    assert keys(s3) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("gone", "said"),
    [("config.json", "has no config.json"), ("tokenizer.json", "has no tokenizer.json"), ("model.safetensors", "has no [*].safetensors")],
)
def test_half_a_model_is_refused(folder, gone, said):
    (folder / gone).unlink()
    with pytest.raises(PushRefused, match=said):
        read_files(folder)


def test_a_missing_shard_is_named(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PushRefused, match="lacks model-00002-of-00002.safetensors"):
        read_files(folder)


def test_the_bucket_is_the_data_stacks_output(aws):
    cloudformation = aws.client("cloudformation")
    with pytest.raises(PushRefused, match="the stack manylora-data is not deployed here"):
        find_bucket(cloudformation, "manylora")
    template = {"Resources": {"B": {"Type": "AWS::S3::Bucket"}}, "Outputs": {"BucketName": {"Value": {"Ref": "B"}}}}
    cloudformation.create_stack(StackName="manylora-data", TemplateBody=json.dumps(template))
    assert find_bucket(cloudformation, "manylora")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hub", "owner/name", "--to", "models/x"], "--revision must be a commit"),
        (["--folder", "/nowhere", "--to", "models/x"], "--folder /nowhere: not a folder"),
        (["--folder", "."], "config/dev.toml has model.source embedded"),
        (["--folder", ".", "--env", "nope"], "env nope"),
    ],
)
def test_the_command_line_refuses_by_name(aws, capsys, arguments, said):
    assert push_model.main([*arguments, "--bucket", TARGET.bucket]) == 1
    assert said in capsys.readouterr().err


def test_the_command_line_pushes(aws, folder, capsys):
    assert push_model.main(["--folder", str(folder), "--bucket", TARGET.bucket, "--to", "models/tiny"]) == 0
    assert "s3://models-bucket/models/tiny/: 3 files sent" in capsys.readouterr().out
    assert "manifest.json" in keys(aws.client("s3"))

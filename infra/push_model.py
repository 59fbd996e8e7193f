"""`python -m infra.push_model`: a base model from a folder or the hub into the deployment's bucket, between the data and the service stack.

    python -m infra.push_model --env prod --folder ./mistral-7b-instruct-v0.3
    python -m infra.push_model --env prod --hub mistralai/Mistral-7B-Instruct-v0.3 --revision <40 digits>

Owns what is uploaded and in which order: files first, each with its SHA-256, `manifest.json` last, so that the model is whole where the
manifest is. What is there already is not sent again. server.host.deliver reads the manifest; this side knows its format alone.
"""

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.config import ConfigError, KitConfig
from sizing.printing import run_tool

ROOT = Path(__file__).resolve().parent.parent
MANIFEST, FORMAT = "manifest.json", 1
WANTED = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}\.(safetensors|json|jinja|txt|model)")
INDEX = "model.safetensors.index.json"


class PushRefused(Exception):
    """The model cannot be put into the bucket; the message says what is missing or which flag to change."""


@dataclass(frozen=True)
class Target:
    """Where the model goes: `prefix` ends in a slash."""

    bucket: str
    prefix: str


def read_files(folder: Path) -> dict[str, Path]:
    """The files of `folder` that a server reads, by name. PushRefused if they do not make a model."""
    if not folder.is_dir():
        raise PushRefused(f"--folder {folder}: not a folder")
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and WANTED.fullmatch(path.name)}
    files.pop(MANIFEST, None)
    if "config.json" not in files:
        raise PushRefused(f"{folder} has no config.json; a model in Hugging Face's format is wanted")
    if "tokenizer.json" not in files:
        raise PushRefused(f"{folder} has no tokenizer.json: save the tokenizer once with AutoTokenizer(...).save_pretrained()")
    shards = {name for name in files if name.endswith(".safetensors")}
    if not shards:
        raise PushRefused(f"{folder} has no *.safetensors; pickled weights are not served. Save with save_pretrained()")
    if INDEX in files:
        missing = set(json.loads(files[INDEX].read_text(encoding="utf-8"))["weight_map"].values()) - shards
        if missing:
            raise PushRefused(f"{folder} lacks {', '.join(sorted(missing))}, named in {INDEX}")
    return files


def describe(files: dict[str, Path], progress: Callable[[int], None] = lambda num_bytes: None) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, as the manifest has them. `progress` is told the bytes that were read."""
    entries = {}
    for name, path in files.items():
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(8 << 20):
                digest.update(chunk)
                progress(len(chunk))
        entries[name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return entries


def push(s3: Any, target: Target, files: dict[str, Path], source: str, *, show: bool = True) -> int:
    """Upload what is not there yet, the manifest last; the number of files that were sent. botocore's errors pass through."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    total = sum(path.stat().st_size for path in files.values())
    columns = (TextColumn("{task.description:>10}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    num_sent = 0
    with Progress(*columns, disable=not show) as progress:
        hashing = progress.add_task("checksums", total=total)
        entries = describe(files, lambda num_bytes: progress.advance(hashing, num_bytes))
        sending = progress.add_task("upload", total=total)
        for name, path in files.items():
            if _is_there(s3, target, name, entries[name]):
                progress.advance(sending, entries[name]["bytes"])
                continue
            s3.upload_file(
                str(path),
                target.bucket,
                target.prefix + name,
                ExtraArgs={"Metadata": {"sha256": entries[name]["sha256"]}, "ChecksumAlgorithm": "SHA256"},
                Callback=lambda num_bytes: progress.advance(sending, num_bytes),
            )
            num_sent += 1
    manifest = json.dumps({"format": FORMAT, "source": source, "files": entries}, indent=2) + "\n"
    s3.put_object(Bucket=target.bucket, Key=target.prefix + MANIFEST, Body=manifest.encode(), ContentType="application/json")
    return num_sent


def _is_there(s3: Any, target: Target, name: str, entry: dict[str, Any]) -> bool:
    from botocore.exceptions import ClientError

    try:
        head = s3.head_object(Bucket=target.bucket, Key=target.prefix + name)
    except ClientError as error:
        if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
            return False
        raise
    return head["ContentLength"] == entry["bytes"] and head["Metadata"].get("sha256") == entry["sha256"]


def find_bucket(cloudformation: Any, name: str) -> str:
    """The bucket of the data stack. PushRefused if it is not deployed."""
    from botocore.exceptions import ClientError

    stack = f"{name}-data"
    try:
        outputs = cloudformation.describe_stacks(StackName=stack)["Stacks"][0].get("Outputs", [])
    except ClientError as error:
        if "does not exist" not in str(error):
            raise
        raise PushRefused(f"the stack {stack} is not deployed here: npx cdk deploy {stack}, or name the bucket with --bucket") from None
    found = {output["OutputKey"]: output["OutputValue"] for output in outputs}
    if "BucketName" not in found:
        raise PushRefused(f"the stack {stack} has no output BucketName; name the bucket with --bucket")
    return found["BucketName"]


def download(repo_id: str, revision: str | None, folder: Path) -> Path:
    """The hub's repository at a commit, without its pickles. PushRefused unless the revision is a commit."""
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise PushRefused(f"--revision must be a commit, 40 hexadecimal digits: a branch can change. Given: {revision}")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
    return Path(snapshot_download(repo_id, revision=revision, local_dir=folder, allow_patterns=patterns))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m infra.push_model", description="Put a base model into the deployment's bucket.")
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--folder", type=Path, help="a model in Hugging Face's format")
    origin.add_argument("--hub", metavar="OWNER/NAME", help="a repository of the Hugging Face hub; with --revision")
    parser.add_argument("--revision", help="the commit, 40 hexadecimal digits")
    parser.add_argument("--env", default="dev", help="environment, a file of config/ (default: dev)")
    parser.add_argument("--bucket", help="default: the output of the data stack")
    parser.add_argument("--to", metavar="PREFIX", help="default: model.prefix and model.id of the environment")
    parser.add_argument("--region", help="default: the environment's, then the AWS configuration's")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Do what the command line says. Errors: ConfigError, PushRefused, botocore's."""
    import boto3

    config = KitConfig.load(options.env, ROOT)
    if options.to is None and config.model.source != "bucket":
        raise PushRefused(
            f"config/{options.env}.toml has model.source {config.model.source}, which reads no model from the bucket: set it to bucket and "
            "model.id to the model's name, or say --to"
        )
    prefix = options.to or f"{config.model.prefix}{config.model.id}/"
    session = boto3.session.Session(region_name=options.region or config.region)
    bucket = options.bucket or find_bucket(session.client("cloudformation"), config.name)
    target = Target(bucket, prefix if prefix.endswith("/") else f"{prefix}/")
    with tempfile.TemporaryDirectory(prefix="manylora-push-") as scratch:
        folder = options.folder or download(options.hub, options.revision, Path(scratch))
        source = f"hub:{options.hub}@{options.revision}" if options.hub else f"folder:{options.folder.resolve().name}"
        num_sent = push(session.client("s3"), target, read_files(folder), source)
    print(f"s3://{target.bucket}/{target.prefix}: {num_sent} files sent, manifest written. Next: npx cdk deploy --all -c env={options.env}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit status."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        run(parse(arguments))
    except (ConfigError, PushRefused, BotoCoreError, ClientError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))

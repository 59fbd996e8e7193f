"""Where `adapters push` puts an adapter so that a server finds it: one class a kind of place, chosen by how the place is written.

Owns the upload: what lies at the place is replaced as a whole, and a reader never sees a mixture for longer than it must. Checks of the
adapter are commands._check's; what the server makes of it is the server's.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from server.commands._client import REFUSED, UNUSABLE, CommandFailed
from server.sources.selection import CONFIG_NAME

Progress = Callable[[int], None]  # bytes more


class Place(Protocol):
    """A folder into which adapters go, each below its id."""

    source: str  # the server's source that reads it

    def put(self, adapter_id: str, folder: Path, names: Sequence[str], progress: Progress) -> str:
        """Put the files there; where they lie now. CommandFailed if that cannot be done, and then what lay there is unchanged or is left
        for a second push to replace."""
        ...


class FolderPlace:
    """A folder of this machine's file system, as the server of the same machine, or a mount that both have."""

    source = "local"

    def __init__(self, place: str, options: dict[str, Any]) -> None:
        self._root = Path(place)
        if not self._root.is_dir():
            raise CommandFailed(
                f"the server reads adapters from {place}, and there is no such folder here. Push from a machine that mounts it, or name "
                "another place with --to (a folder, or s3://bucket/prefix)",
                UNUSABLE,
            )

    def put(self, adapter_id: str, folder: Path, names: Sequence[str], progress: Progress) -> str:
        """See Place. Copied beside it under a hidden name, then renamed."""
        target = self._root / adapter_id
        try:
            if target.exists():
                _check_replaceable(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.parent.resolve().is_relative_to(self._root.resolve()):
                raise CommandFailed(f"{target} leads out of {self._root}", UNUSABLE)
            with tempfile.TemporaryDirectory(prefix=".push-", dir=self._root) as staging:
                fresh, old = Path(staging) / "new", Path(staging) / "old"
                fresh.mkdir()
                for name in names:
                    _copy(folder / name, fresh / name, progress)
                if target.exists():
                    os.rename(target, old)
                try:
                    os.rename(fresh, target)
                except OSError:
                    if old.exists():
                        os.rename(old, target)
                    raise
        except OSError as error:
            raise CommandFailed(f"{target} cannot be written: {error.strerror}", REFUSED) from None
        return str(target)


def _check_replaceable(target: Path) -> None:
    """CommandFailed if folders lie in it: they may be other adapters (`team/sql` in `team`), and would be removed with it. OSError."""
    if inside := sorted(path.name for path in target.iterdir() if path.is_dir()):
        raise CommandFailed(
            f"{target} holds folders ({ascii(inside[0])}), which may be other adapters and would be removed with it. Push under another "
            "name, or move them away first",
            UNUSABLE,
        )


def _copy(source: Path, target: Path, progress: Progress) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(1 << 20):
            writer.write(chunk)
            progress(len(chunk))
        writer.flush()
        os.fsync(writer.fileno())
    shutil.copymode(source, target)


class BucketPlace:
    """A prefix of an S3 bucket, written with the caller's own AWS credentials."""

    source = "s3"

    def __init__(self, place: str, options: dict[str, Any]) -> None:
        bucket, _, prefix = place.removeprefix("s3://").partition("/")
        if not bucket:
            raise CommandFailed(f"--to must be s3://bucket/prefix. Given: {place!r}", UNUSABLE)
        self._bucket, self._prefix = bucket, prefix.strip("/")
        import boto3  # half a second that other commands need not pay

        self._client = boto3.session.Session().client("s3", endpoint_url=options.get("endpoint_url"), region_name=options.get("region"))

    def put(self, adapter_id: str, folder: Path, names: Sequence[str], progress: Progress) -> str:
        """See Place. The config goes last: a folder without one is no adapter. What is there beside the files is removed."""
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError

        key = "/".join(filter(None, (self._prefix, adapter_id)))
        try:
            before = self._keys(f"{key}/")
            for name in sorted(names, key=lambda name: (name == CONFIG_NAME, name)):
                self._client.upload_file(str(folder / name), self._bucket, f"{key}/{name}", Callback=progress)
            for stale in before - {f"{key}/{name}" for name in names}:
                self._client.delete_object(Bucket=self._bucket, Key=stale)
        except (ClientError, BotoCoreError, S3UploadFailedError, OSError) as error:
            raise CommandFailed(
                f"s3://{self._bucket}/{key} cannot be written: {error}. Look at this shell's AWS credentials (aws sts get-caller-identity)"
            ) from None
        return f"s3://{self._bucket}/{key}"

    def _keys(self, prefix: str) -> set[str]:
        """The objects directly below a prefix."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix, Delimiter="/")
        return {item["Key"] for page in pages for item in page.get("Contents", ())}


PLACES: dict[str, type[FolderPlace] | type[BucketPlace]] = {place.source: place for place in (FolderPlace, BucketPlace)}


def choose_place(intake: dict[str, Any], wanted: str | None) -> tuple[Place, str, bool]:
    """The place, how it is written, and whether it is one that the server reads. `wanted` is what --to says; without it, the place of the
    server's default source, or else the first that it names. CommandFailed if there is none."""
    known = {one["place"].rstrip("/"): one for one in intake["places"]}
    if wanted is None:
        ordered = sorted(intake["places"], key=lambda one: one["source"] != intake["default_source"])
        if not ordered:
            raise CommandFailed("the server names no place that adapters can be put into: name one with --to", UNUSABLE)
        wanted = str(ordered[0]["place"])
    text = wanted.rstrip("/") or "/"
    options = known.get(text) or known.get(str(Path(text).resolve())) or {}
    source = "s3" if text.startswith("s3://") else "local"
    return PLACES[source](text, options), text, bool(options)

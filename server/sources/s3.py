"""Adapters in S3 buckets (boto3). Owns LoRAX's rules for S3 ids, the list of allowed buckets and prefixes, and S3's errors in our words.

Blocking; called in threads. Credentials are the server's own (boto3's standard chain); callers have none, so the allow-list alone decides.
"""

import hashlib
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from server.errors import AdapterNotFound, AdapterRefused, ValidationFailed
from server.sources.base import (
    Progress,
    Snapshot,
    SourceChanged,
    SourceFile,
    SourceOptions,
    Tally,
    TooSlow,
    log_hidden_reason,
    not_found,
    raise_invalid,
    refuse_revision,
    source_off,
    unavailable,
)
from server.sources.ids import split_id
from server.sources.selection import MAX_LISTED, select_files

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_MISSING = {"NoSuchBucket", "NoSuchKey", "NoSuchVersion", "NotFound", "404"}
_DENIED = {"AccessDenied", "Forbidden", "AllAccessDisabled", "403"}
_CHANGED = {"PreconditionFailed", "ConditionalRequestConflict", "412", "NoSuchKey", "404"}


class Location(NamedTuple):
    """A folder in S3: the objects `key/NAME` of a bucket."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


def locate(adapter_id: str, model_bucket: str | None, model_folder: str | None) -> Location:
    """Where an id points, by LoRAX's rules: `s3://bucket/key` always; else `model_folder/id` of the model bucket; else `bucket/key`.

    One slash at the end is dropped. ValidationFailed with LoRAX's words if the bucket or the key is missing. Unlike LoRAX, short ids are
    allowed: it refuses those below five characters because it lists `key*`, we list `key/`."""
    uri = adapter_id.startswith("s3://")
    path = adapter_id.removeprefix("s3://").removesuffix("/")
    if not uri and model_bucket:
        folder = model_folder.strip("/") if model_folder else ""
        return Location(model_bucket, "/".join([*split_id(folder), *split_id(path)] if folder else split_id(path)))
    bucket, _, key = path.partition("/")
    if not bucket or not key:
        form = "`s3://bucket_name/model_id`" if uri else "`bucket_name/model_id` if PREDIBASE_MODEL_BUCKET environment variable is not set"
        raise ValidationFailed(f"Invalid model_id {adapter_id[:120]!a}. model_id should be of the form {form}", param="adapter_id")
    if not _BUCKET.fullmatch(bucket):
        raise_invalid(adapter_id, "a bucket's name has 3 to 63 letters, digits, `.`, `_`, `-`")
    return Location(bucket, "/".join(split_id(key)))


class S3Source:
    """The allowed prefixes of the allowed buckets."""

    name = "s3"

    def __init__(self, options: SourceOptions) -> None:
        self._options = options
        allowed = [entry.removeprefix("s3://").strip("/") for entry in options.allowed_buckets]
        if options.model_bucket:
            allowed.append("/".join(filter(None, (options.model_bucket, (options.model_folder or "").strip("/")))))
        if not allowed:
            raise source_off(self.name, "neither allowed-buckets nor model-bucket is set")
        self._allowed = tuple(f"{entry}/" for entry in allowed)
        self._lock = threading.Lock()
        self._client: Any = None

    def snapshot(self, adapter_id: str, *, revision: str | None = None, api_token: str | None = None) -> Snapshot:
        """See Source. One listing; the version is made of the objects' ETags."""
        refuse_revision(self.name, revision)
        where = locate(adapter_id, self._options.model_bucket, self._options.model_folder)
        if not f"{where.bucket}/{where.key}/".startswith(self._allowed):
            raise not_found(self.name, adapter_id, "it is outside the buckets and prefixes that this server allows (allowed-buckets)")
        with self._explain(adapter_id):
            listing = self._list(where, adapter_id)
        if not listing:
            raise not_found(self.name, adapter_id)
        files = select_files(adapter_id, listing, self._options.max_adapter_bytes)
        names = "".join(f"{file.name}\0{file.size_bytes}\0{file.version}\n" for file in files)
        return Snapshot(self.name, str(where), hashlib.sha256(names.encode()).hexdigest(), files, given_id=adapter_id)

    def place(self, adapter_id: str) -> str:
        """See Source: bucket/key."""
        return "/".join(locate(adapter_id, self._options.model_bucket, self._options.model_folder))

    def spelling(self, adapter_id: str) -> str:
        """See Source: the shortest."""
        return self._id_of(*locate(adapter_id, self._options.model_bucket, self._options.model_folder))

    def fetch(self, snapshot: Snapshot, into: Path, api_token: str | None = None, progress: Progress | None = None) -> None:
        """See Source. Each object is read with the ETag of the listing as a condition."""
        where = locate(snapshot.adapter_id, None, None)
        tally = Tally(snapshot, progress, self._options.read_timeout_s)
        for file in snapshot.files:
            with self._explain(snapshot.shown_id, snapshot):
                self._download(where, file, into / file.name, tally, snapshot)

    def adapter_ids(self, limit: int) -> list[str]:
        """See Source. Every allowed prefix is listed, a thousand objects a call, until `limit` adapters are found."""
        found: list[str] = []
        for entry in self._allowed:
            bucket, _, prefix = entry.partition("/")
            with self._explain_listing(entry):
                for page in self._connect().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                    for item in page.get("Contents", ()):
                        key, slash, name = item["Key"].rpartition("/")
                        if slash and name == "adapter_config.json" and len(found) < limit:
                            found.append(self._id_of(bucket, key))
                    if len(found) >= limit:
                        return sorted(found)
        return sorted(set(found))

    def _id_of(self, bucket: str, key: str) -> str:
        """The shortest id that `locate` reads as this place."""
        folder = (self._options.model_folder or "").strip("/")
        prefix = f"{folder}/" if folder else ""
        if bucket == self._options.model_bucket and key.startswith(prefix):
            return key.removeprefix(prefix)
        return f"s3://{bucket}/{key}" if self._options.model_bucket else f"{bucket}/{key}"

    def _list(self, where: Location, adapter_id: str) -> list[SourceFile]:
        """The objects directly below the key, nothing deeper; the slash keeps `sql` from listing `sql-old`."""
        prefix = f"{where.key}/"
        files: list[SourceFile] = []
        pages = self._connect().get_paginator("list_objects_v2").paginate(Bucket=where.bucket, Prefix=prefix, Delimiter="/")
        for page in pages:
            for item in page.get("Contents", ()):
                if name := item["Key"].removeprefix(prefix):  # the empty name is a console's folder marker
                    files.append(SourceFile(name, item["Size"], item["ETag"]))
            if len(files) > MAX_LISTED:
                raise AdapterRefused(f"Adapter '{adapter_id}': its prefix has more than {MAX_LISTED} objects")
        return files

    def _download(self, where: Location, file: SourceFile, target: Path, tally: Tally, snapshot: Snapshot) -> None:
        """One object, again from its start when the connection breaks (boto3 itself retries only until the first byte)."""
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        num_left = self._options.num_retries
        while True:
            received = 0
            try:
                answer = self._connect().get_object(Bucket=where.bucket, Key=f"{where.key}/{file.name}", IfMatch=file.version)
                with closing(answer["Body"]) as body, target.open("wb") as out:
                    tally.begin()
                    for chunk in _arriving(body, file.size_bytes):
                        received += len(chunk)
                        if received > file.size_bytes:
                            raise SourceChanged(snapshot)
                        out.write(chunk)
                        tally.add(len(chunk))
                return
            except (HTTPClientError, IncompleteReadError) as error:
                if num_left == 0:
                    raise
                num_left -= 1
                tally.add(-received)
                logger.info("s3: %s of adapter %r broke off (%s), again", file.name, snapshot.adapter_id, type(error).__name__)
            except TooSlow as error:
                raise unavailable(self.name, f"it sends less than {tally.MIN_BYTES_S >> 10} KiB a second") from error

    def _connect(self) -> Any:
        """The client, made on first use: importing boto3 takes half a second and servers without S3 need not pay it."""
        with self._lock:
            if self._client is None:
                import boto3
                from botocore.config import Config

                self._client = boto3.session.Session().client(
                    "s3",
                    endpoint_url=self._options.s3_endpoint_url,
                    region_name=self._options.s3_region,
                    config=Config(
                        connect_timeout=self._options.connect_timeout_s,
                        read_timeout=self._options.read_timeout_s,
                        retries={"total_max_attempts": self._options.num_retries + 1, "mode": "standard"},
                        max_pool_connections=32,
                    ),
                )
            return self._client

    @contextmanager
    def _explain_listing(self, entry: str) -> Iterator[None]:
        """As `_explain`, where no adapter was asked for: what is missing is the deployer's own, and its name stays in the log."""
        try:
            with self._explain(""):
                yield
        except AdapterNotFound as error:
            log_hidden_reason(logger, f"s3://{entry}", "the allowed prefix cannot be listed")
            raise unavailable(self.name, "an allowed bucket cannot be listed") from error

    @contextmanager
    def _explain(self, adapter_id: str, snapshot: Snapshot | None = None) -> Iterator[None]:
        """S3's errors as the caller may see them: denied reads like missing, since the caller has no rights of its own here."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", "unknown"))
            if snapshot is not None and code in _CHANGED:
                raise SourceChanged(snapshot) from error
            if code in _MISSING:
                raise not_found(self.name, adapter_id) from error
            log_hidden_reason(logger, adapter_id, error)
            if code in _DENIED:
                raise not_found(self.name, adapter_id) from error
            if code == "InvalidObjectState":
                raise AdapterRefused(f"Adapter '{adapter_id}' is archived in S3 and must be restored first") from error
            raise unavailable(self.name, f"S3 answered {code}") from error
        except BotoCoreError as error:
            log_hidden_reason(logger, adapter_id, error)
            raise unavailable(self.name, type(error).__name__) from error


def _arriving(body: Any, size_bytes: int) -> Iterator[bytes]:
    """A StreamingBody's bytes as they arrive; its own `read` would wait for a whole chunk, however slowly that came. botocore's errors."""
    from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError
    from urllib3.exceptions import HTTPError
    from urllib3.exceptions import ReadTimeoutError as Silence

    received = 0
    while True:
        try:
            chunk = body._raw_stream.read1(_CHUNK_BYTES)
        except Silence as error:
            raise ReadTimeoutError(endpoint_url="s3", error=error) from error
        except HTTPError as error:
            raise ResponseStreamingError(error=error) from error
        if not chunk:
            break
        received += len(chunk)
        yield chunk
    if received < size_bytes:
        raise IncompleteReadError(actual_bytes=received, expected_bytes=size_bytes)

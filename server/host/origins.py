"""Where a base model comes from, one class a kind, chosen by the form of its URI. `deliver` calls them; they do not know where files go.

    s3://BUCKET/PREFIX            a folder with a manifest.json, put there by infra.push_model
    s3://BUCKET/KEY.zip           such a folder as one archive, a deployment's asset
    hub://OWNER/NAME@COMMIT       the Hugging Face hub, pinned by commit; checksums are the hub's own
    /mnt/manylora/models/NAME     a folder with a manifest.json that every instance sees already (S3 Files, FSx linked to the bucket)

Every kind streams: no file is ever held in memory whole.
"""

import hashlib
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from server.host.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, ModelFile, ModelRefused
from server.host.s3_stream import S3Object

CHUNK_BYTES = 4 << 20
_MISSING = {"NoSuchBucket", "NoSuchKey", "NotFound", "404"}


class OriginUnavailable(Exception):
    """The origin does not answer, or denies us; worth another try."""


@dataclass(frozen=True, kw_only=True)
class OriginOptions:
    """What the deployment says. Credentials are the instance's; `read_hub_token` is called only when a hub model is fetched."""

    region: str | None = None
    s3_endpoint_url: str | None = None
    hub_endpoint: str = "https://huggingface.co"
    read_hub_token: Callable[[], str | None] = lambda: None


class Origin(Protocol):
    """A model somewhere. Errors of both calls: ModelRefused, OriginUnavailable."""

    folder: Path | None  # where the files can be read in place by every instance, if they can

    def manifest(self) -> Manifest:
        """What the model consists of now."""
        ...

    def fetch(self, file: ModelFile, target: Path) -> str:
        """Write the file; the SHA-256 of what was written. Which it should be is the caller's to check."""
        ...


class S3Folder:
    """A prefix of a bucket."""

    folder: Path | None = None

    def __init__(self, bucket: str, prefix: str, options: OriginOptions) -> None:
        self._bucket, self._prefix, self._client = bucket, prefix, _s3_client(options)

    def manifest(self) -> Manifest:
        """See Origin."""
        with explain_s3(f"s3://{self._bucket}/{self._prefix}/{MANIFEST_NAME}"):
            return Manifest.from_json(self._object(MANIFEST_NAME).read(0, MAX_MANIFEST_BYTES))

    def fetch(self, file: ModelFile, target: Path) -> str:
        """See Origin."""
        with explain_s3(f"s3://{self._bucket}/{self._prefix}/{file.name}"):
            return write_hashed(self._object(file.name).chunks(), target)

    def _object(self, name: str) -> S3Object:
        return S3Object(self._client, self._bucket, f"{self._prefix}/{name}")


class S3Archive:
    """A zip file in a bucket, read member by member where it lies."""

    folder: Path | None = None

    def __init__(self, bucket: str, key: str, options: OriginOptions) -> None:
        self._bucket, self._key, self._client = bucket, key, _s3_client(options)

    def manifest(self) -> Manifest:
        """See Origin."""
        with self._open() as archive, archive.open(MANIFEST_NAME) as member:
            return Manifest.from_json(member.read(MAX_MANIFEST_BYTES))

    def fetch(self, file: ModelFile, target: Path) -> str:
        """See Origin."""
        with self._open() as archive, archive.open(file.name) as member:
            return write_hashed(iter(lambda: member.read(CHUNK_BYTES), b""), target)

    @contextmanager
    def _open(self) -> Iterator[zipfile.ZipFile]:
        where = f"s3://{self._bucket}/{self._key}"
        with explain_s3(where):
            try:
                with S3Object(self._client, self._bucket, self._key).open() as file, zipfile.ZipFile(file) as archive:
                    yield archive
            except KeyError as error:
                raise ModelRefused(f"{where} has no member {error}") from None
            except zipfile.BadZipFile as error:
                raise ModelRefused(f"{where} is not a zip archive: {error}") from None


class HubRepository:
    """A repository of the hub at one commit. Only what the server reads is fetched."""

    folder: Path | None = None
    _WANTED = re.compile(r"[^/]+\.(safetensors|json|jinja|txt|model)")

    def __init__(self, repo_id: str, commit: str, options: OriginOptions) -> None:
        self._repo_id, self._commit, self._options = repo_id, commit, options
        self._token: str | bool | None = None

    def manifest(self) -> Manifest:
        """See Origin. The hub knows SHA-256 of large files alone; small ones are read here for theirs."""
        with self._explain():
            info = self._api().model_info(self._repo_id, revision=self._commit, files_metadata=True)
            wanted = [item for item in info.siblings or () if self._WANTED.fullmatch(item.rfilename) and item.rfilename != MANIFEST_NAME]
            return Manifest.of([self._describe(item) for item in wanted])

    def fetch(self, file: ModelFile, target: Path) -> str:
        """See Origin."""
        with self._explain():
            self._download(file.name, target)
        with target.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def _describe(self, item: Any) -> ModelFile:
        if item.lfs is not None:
            return ModelFile(item.rfilename, item.lfs.size, item.lfs.sha256)
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "file"
            self._download(item.rfilename, target)
            return ModelFile(item.rfilename, target.stat().st_size, hashlib.sha256(target.read_bytes()).hexdigest())

    def _download(self, name: str, target: Path) -> None:
        """The library writes below a folder of its own, beside the target so that the last step is a rename."""
        import shutil

        from huggingface_hub.utils import silent_tqdm

        place = target.with_name(f".{target.name}.hub")
        try:
            path = self._api().hf_hub_download(
                self._repo_id, name, revision=self._commit, local_dir=place, cache_dir=place / "none", tqdm_class=silent_tqdm
            )
            Path(path).rename(target)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _api(self) -> Any:
        from huggingface_hub import HfApi

        if self._token is None:
            self._token = self._options.read_hub_token() or False  # False: no token of this machine either
        return HfApi(endpoint=self._options.hub_endpoint.rstrip("/"), token=self._token, library_name="manylora")

    @contextmanager
    def _explain(self) -> Iterator[None]:
        from huggingface_hub import errors

        try:
            yield
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
            raise ModelRefused(f"hub://{self._repo_id}@{self._commit}: not there, or not for this token") from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            kind = ModelRefused if status in (401, 403) else OriginUnavailable
            raise kind(f"hub://{self._repo_id}: the hub answered {status}") from error
        except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.FileMetadataError, errors.XetDownloadError) as error:
            raise OriginUnavailable(f"hub://{self._repo_id}: {type(error).__name__}") from error


class SharedFolder:
    """A folder that is on every instance already."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path | None = folder
        self._folder = folder

    def manifest(self) -> Manifest:
        """See Origin."""
        try:
            return Manifest.from_json((self._folder / MANIFEST_NAME).read_bytes())
        except FileNotFoundError:
            raise ModelRefused(f"{self._folder / MANIFEST_NAME} is not there; python -m infra.push_model puts a model") from None
        except OSError as error:
            raise OriginUnavailable(f"{self._folder}: {error.strerror}") from error

    def fetch(self, file: ModelFile, target: Path) -> str:
        """See Origin."""
        with (self._folder / file.name).open("rb") as stream:
            return write_hashed(iter(lambda: stream.read(CHUNK_BYTES), b""), target)


def open_origin(uri: str, options: OriginOptions) -> Origin:
    """The origin that a URI names. ModelRefused, with the forms that are allowed, if it names none."""
    if match := re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9])/(.+\.zip)", uri):
        return S3Archive(match[1], match[2], options)
    if match := re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9])/(.+?)/?", uri):
        return S3Folder(match[1], match[2], options)
    if match := re.fullmatch(r"hub://([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@([0-9a-f]{40})", uri):
        return HubRepository(match[1], match[2], options)
    if uri.startswith("/"):
        return SharedFolder(Path(uri))
    raise ModelRefused(
        f"--origin {uri}: must be s3://BUCKET/PREFIX, s3://BUCKET/KEY.zip, hub://OWNER/NAME@COMMIT (40 digits) or an absolute folder"
    )


def write_hashed(chunks: Iterable[bytes], target: Path) -> str:
    """Write the chunks to a new file; their SHA-256, taken on the way."""
    digest = hashlib.sha256()
    with target.open("xb") as out:
        for chunk in chunks:
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest()


def _s3_client(options: OriginOptions) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(connect_timeout=5, read_timeout=60, retries={"total_max_attempts": 5, "mode": "standard"}, max_pool_connections=32)
    return boto3.session.Session().client("s3", region_name=options.region, endpoint_url=options.s3_endpoint_url, config=config)


@contextmanager
def explain_s3(where: str) -> Iterator[None]:
    """botocore's errors as ours."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "unknown"))
        if code in _MISSING:
            raise ModelRefused(f"{where} is not there; python -m infra.push_model puts a model") from error
        raise OriginUnavailable(f"{where}: S3 answered {code}") from error
    except BotoCoreError as error:
        raise OriginUnavailable(f"{where}: {type(error).__name__}") from error

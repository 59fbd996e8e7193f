"""`python -m server.host.deliver`: the base model is where the server looks for it, whole, before the server starts.

    origin ──> SHARED/models/DIGEST ──> CACHE/models/DIGEST ──> LINK
               once a fleet, under a    once an instance, where  what --model-id names
               lock; others wait        there is an instance store

Owns these folders. What arrives is written in staging, checked against the manifest and renamed into place, so that a kill at any moment
leaves either the whole model or rubbish that the next run sweeps. Exit status: 0, 1 try again, 2 the model or a flag is refused.
"""

import argparse
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from server.host.manifest import MANIFEST_NAME, Manifest, ModelFile, ModelRefused
from server.host.origins import Origin, OriginOptions, OriginUnavailable, SharedFolder, open_origin
from server.sources.disk import Staging, publish_folder
from server.sources.flight import file_lock

log = logging.getLogger("server.host.deliver")

LOCK_WAIT_S = 3600.0
SPARE_BYTES = 4 << 30  # of an instance store, for what else is cached there
NUM_COPIERS = 4
ABANDONED_S = 600.0  # what a killed run left is gigabytes, so it goes sooner than the store's; a live run writes all the time
TOP_FOLDER = 0o755
_PAUSES_S = (2.0, 5.0, 15.0, 45.0)  # between tries


class DamagedCopy(Exception):
    """Files that once were whole are not any more."""


class ModelFolder:
    """Models by digest below one root, on the shared file system or on the instance's own disk."""

    def __init__(self, root: Path, lock_wait_s: float = LOCK_WAIT_S) -> None:
        self._models, self._locks, self._staging_root = root / "models", root / "locks", root / "staging"
        for folder in (self._models, self._locks, self._staging_root):
            folder.mkdir(parents=True, exist_ok=True)
        self._staging = Staging(self._staging_root)
        self._lock_wait_s = lock_wait_s
        self._staging.sweep(ABANDONED_S)

    def path_of(self, manifest: Manifest) -> Path:
        """Where this model is once it is here."""
        return self._models / manifest.digest

    def bring(self, origin: Origin, manifest: Manifest, *, num_threads: int = 1) -> Path:
        """The model's folder: found, or fetched by one process while the others wait. Errors: Origin's, DamagedCopy, OSError."""
        path = self.path_of(manifest)
        if is_whole(path, manifest):
            return path
        log.info("model %s: %.2f GB to fetch; waiting for the lock", manifest.digest, manifest.size_bytes / 1e9)
        with file_lock(self._locks / f"{manifest.digest}.lock", self._lock_wait_s) as held:
            if is_whole(path, manifest):
                log.info("model %s: another instance brought it", manifest.digest)
                return path
            if not held:
                log.warning("model %s: no lock to be had; fetching without one", manifest.digest)
            self.discard(manifest)
            with self._staging.open() as folder:
                _fetch(origin, manifest, folder, num_threads)
                (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
                folder.chmod(TOP_FOLDER)
                publish_folder(folder, path)
        return path

    def discard(self, manifest: Manifest) -> None:
        """Take a model away, if it is here."""
        self._staging.take_away(self.path_of(manifest))

    def keep_only(self, manifest: Manifest) -> None:
        """Take all others away: for a disk that is the instance's own."""
        for path in self._models.iterdir():
            if path.name != manifest.digest:
                log.info("model %s: removed from the cache", path.name)
                self._staging.take_away(path)

    def has_room(self, num_bytes: int) -> bool:
        """Whether so much more fits with something to spare."""
        return shutil.disk_usage(self._models).free >= num_bytes + SPARE_BYTES


def deliver(origin: Origin, shared: ModelFolder | None, cache: ModelFolder | None) -> Path:
    """Bring the model; the folder to serve it from. Without `shared`, each instance fetches what it cannot read in place."""
    manifest = origin.manifest()
    if shared is None and origin.folder is None:
        if cache is None:
            raise ModelRefused("neither --shared-dir nor --cache-dir is given: there is no place for the model")
        cache.keep_only(manifest)
        return cache.bring(origin, manifest)
    for last_try in (False, True):
        if origin.folder is not None:
            path = origin.folder
        else:
            assert shared is not None
            path = shared.bring(origin, manifest)
        if cache is None:
            if not is_whole(path, manifest):
                raise DamagedCopy(f"{path}: sizes differ from {MANIFEST_NAME}")
            return path
        if not is_whole(cache.path_of(manifest), manifest):
            cache.keep_only(manifest)
            if not cache.has_room(manifest.size_bytes):
                log.warning(
                    "model %s: %.2f GB do not fit the instance store; served from %s", manifest.digest, manifest.size_bytes / 1e9, path
                )
                return path
        try:
            # Reading ahead of the server, in order and in parallel, is also the fastest way over NFS; checksums are looked at once more.
            return cache.bring(SharedFolder(path), manifest, num_threads=NUM_COPIERS)
        except DamagedCopy as error:
            if last_try or shared is None or origin.folder is not None:
                raise
            log.error("model %s: the shared copy is damaged (%s) and is fetched again", manifest.digest, error)
            shared.discard(manifest)
    raise AssertionError("unreachable")


def is_whole(folder: Path, manifest: Manifest) -> bool:
    """Whether a published folder holds every file in its size. Contents were checked before it was published."""
    try:
        return all((folder / file.name).stat().st_size == file.size_bytes for file in manifest.files)
    except (FileNotFoundError, NotADirectoryError):
        return False


def point(link: Path, folder: Path) -> None:
    """Make `link` a symbolic link to `folder`, in one step."""
    link.parent.mkdir(parents=True, exist_ok=True)
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder)
    os.replace(fresh, link)


def _fetch(origin: Origin, manifest: Manifest, folder: Path, num_threads: int) -> None:
    started_at = time.monotonic()

    def fetch(file: ModelFile) -> None:
        file_started_at = time.monotonic()
        try:
            found = origin.fetch(file, folder / file.name)
        except FileNotFoundError as error:
            raise DamagedCopy(f"{file.name} is missing") from error
        size_bytes = (folder / file.name).stat().st_size
        if found != file.sha256 or size_bytes != file.size_bytes:
            raise DamagedCopy(f"{file.name}: {size_bytes} bytes, SHA-256 {found}; wanted {file.size_bytes} bytes, {file.sha256}")
        (folder / file.name).chmod(0o644)
        log.info("  %s: %.1f MB in %.1f s", file.name, size_bytes / 1e6, time.monotonic() - file_started_at)

    with ThreadPoolExecutor(num_threads, thread_name_prefix="model") as pool:
        list(pool.map(fetch, manifest.files))
    elapsed_s = max(time.monotonic() - started_at, 1e-3)
    rate = manifest.size_bytes / elapsed_s
    log.info("model %s: %.2f GB in %.1f s, %.0f MB/s", manifest.digest, manifest.size_bytes / 1e9, elapsed_s, rate / 1e6)


def read_secret(arn: str, region: str | None) -> str:
    """A secret's text. OriginUnavailable if Secrets Manager does not give it."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return boto3.client("secretsmanager", region_name=region).get_secret_value(SecretId=arn)["SecretString"].strip()
    except (BotoCoreError, ClientError, KeyError) as error:
        raise OriginUnavailable(f"the hub's token cannot be read: {type(error).__name__}") from error


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.host.deliver", description="Bring the base model to where the server reads it.")
    parser.add_argument("--origin", required=True, help="s3://BUCKET/PREFIX, s3://BUCKET/KEY.zip, hub://OWNER/NAME@COMMIT or a folder")
    parser.add_argument("--shared-dir", default="", help="on the file system that all instances share; empty: each fetches for itself")
    parser.add_argument("--cache-dir", default="", help="on the instance store; empty: serve from the shared folder")
    parser.add_argument("--link", required=True, type=Path, help="symbolic link to make")
    parser.add_argument("--region", default="", help="of bucket and secret; empty: the instance's")
    parser.add_argument("--hub-secret-arn", default="", help="secret that holds the hub's token; empty: none")
    parser.add_argument(
        "--tries", type=int, default=len(_PAUSES_S) + 1, choices=range(1, len(_PAUSES_S) + 2), help="where another may help"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """The command line; its exit status."""
    flags = _parse(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for pause_s in (*_PAUSES_S[: flags.tries - 1], None):
        try:
            folder = _run(flags)
        except ModelRefused as error:
            log.error("refused: %s", error)
            return 2
        except (OriginUnavailable, DamagedCopy, OSError) as error:
            log.error("not delivered: %s", error)
            if pause_s is not None:
                time.sleep(pause_s)
            continue
        log.info("%s -> %s", flags.link, folder)
        return 0
    return 1


def _run(flags: argparse.Namespace) -> Path:
    region = flags.region or None
    token = (lambda: read_secret(flags.hub_secret_arn, region)) if flags.hub_secret_arn else (lambda: None)
    origin = open_origin(flags.origin, OriginOptions(region=region, read_hub_token=token))
    shared, cache = (ModelFolder(Path(text)) if text else None for text in (flags.shared_dir, flags.cache_dir))
    folder = deliver(origin, shared if origin.folder is None else None, cache)
    point(flags.link, folder)
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Adapters on the Hugging Face hub (huggingface_hub). Owns the list of allowed owners and the hub's errors in our words.

Off unless enabled. A snapshot pins the commit; files come at that commit alone. The only token ever sent is the one of the request.
"""

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from server.errors import AdapterRefused, ServerError, ValidationFailed
from server.sources.base import (
    Progress,
    Snapshot,
    SourceChanged,
    SourceFile,
    SourceOptions,
    Tally,
    log_hidden_reason,
    not_found,
    raise_invalid,
    source_off,
    unavailable,
)
from server.sources.ids import split_id
from server.sources.selection import select_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"[!-~]{1,1024}")  # visible ASCII: anything else would be quoted in the HTTP client's error


class HubSource:
    """The repositories of the allowed owners."""

    name = "hub"

    def __init__(self, options: SourceOptions) -> None:
        if not options.hub_enabled:
            raise source_off(self.name, "hub-enabled is not set")
        if not options.allowed_hub_owners:
            raise source_off(self.name, "allowed-hub-owners is empty")
        self._options = options
        self._owners = frozenset(options.allowed_hub_owners)

    def snapshot(self, adapter_id: str, *, revision: str | None = None, api_token: str | None = None) -> Snapshot:
        """See Source. The version is the commit that `revision` (default: the main branch) names now.
        AdapterRefused, with its name, for a repository that has another one (moved, or in other case)."""
        self._check_owner(_check_repo_id(adapter_id), adapter_id)
        if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
            raise ValidationFailed("`revision` must be a branch, a tag or a commit", param="revision")
        token = _check_token(api_token)
        with self._explain(adapter_id):
            info = self._api().model_info(
                adapter_id, revision=revision, files_metadata=True, token=token, timeout=self._options.read_timeout_s
            )
            self._check_owner(info.id, adapter_id)  # a moved repository answers under its new owner
            if info.id != adapter_id:  # also in other case: what is limited or deleted by one name must not be had by another
                raise AdapterRefused(f"Adapter '{adapter_id}' is called '{info.id}' on the hub: ask for it by that name")
            if info.sha is None or not _COMMIT.fullmatch(info.sha):
                raise unavailable(self.name, "it named no commit")
            listing = [SourceFile(item.rfilename, _size_of(item.size), item.blob_id or "") for item in info.siblings or ()]
        top = (file for file in listing if "/" not in file.name)
        return Snapshot(self.name, adapter_id, info.sha, select_files(adapter_id, top, self._options.max_adapter_bytes), revision=revision)

    def place(self, adapter_id: str) -> str:
        """See Source: owner/name."""
        return _check_repo_id(adapter_id)

    def spelling(self, adapter_id: str) -> str:
        """See Source: `snapshot` takes a repository by its own name alone."""
        return _check_repo_id(adapter_id)

    def adapter_ids(self, limit: int) -> list[str]:
        """None: what the hub holds is not ours to list."""
        return []

    def fetch(self, snapshot: Snapshot, into: Path, api_token: str | None = None, progress: Progress | None = None) -> None:
        """See Source. Progress counts whole files."""
        from huggingface_hub.utils import silent_tqdm

        token = _check_token(api_token)
        tally = Tally(snapshot, progress)
        cache = into / ".cache"  # the library's own bookkeeping; also named as its cache, so that no other one is looked at
        try:
            for file in snapshot.files:
                with self._explain(snapshot.adapter_id, snapshot):
                    self._api().hf_hub_download(
                        snapshot.adapter_id,
                        file.name,
                        revision=snapshot.version,
                        local_dir=into,
                        cache_dir=cache / "none",
                        token=token,
                        etag_timeout=self._options.read_timeout_s,
                        tqdm_class=silent_tqdm,
                    )
                tally.add(file.size_bytes)
        finally:
            shutil.rmtree(cache, ignore_errors=True)

    def _api(self) -> "HfApi":
        """A client without any token of its own; imported late since it is slow and the source is off by default."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self._options.hub_endpoint.rstrip("/"), token=False, library_name="manylora")

    def _check_owner(self, repo_id: str, adapter_id: str) -> None:
        if "*" not in self._owners and repo_id.partition("/")[0] not in self._owners:
            raise not_found(self.name, adapter_id, "its owner is not among those that this server allows (allowed-hub-owners)")

    @contextmanager
    def _explain(self, adapter_id: str, snapshot: Snapshot | None = None) -> Iterator[None]:
        """The hub's errors as the caller may see them. The library's own texts hold addresses, so they go to the log alone."""
        from huggingface_hub import errors

        try:
            yield
        except ServerError:
            raise
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.DisabledRepoError) as error:
            raise not_found(self.name, adapter_id, "check the name, the revision and the `api_token`") from error
        except errors.RemoteEntryNotFoundError as error:
            if snapshot is None:
                raise not_found(self.name, adapter_id) from error
            raise SourceChanged(snapshot) from error
        except errors.HfHubHTTPError as error:
            log_hidden_reason(logger, adapter_id, error)
            if error.response.status_code in (401, 403, 404):
                raise not_found(self.name, adapter_id, "check the name, the revision and the `api_token`") from error
            raise unavailable(self.name, f"it answered {error.response.status_code}") from error
        except errors.LocalEntryNotFoundError as error:  # how the library reports that a file's metadata could not be had
            cause = error.__cause__ or error
            log_hidden_reason(logger, adapter_id, cause)
            raise unavailable(self.name, type(cause).__name__) from error
        except (errors.HTTPError, errors.FileMetadataError, errors.OfflineModeIsEnabled, errors.XetDownloadError, RuntimeError) as error:
            log_hidden_reason(logger, adapter_id, error)
            raise unavailable(self.name, type(error).__name__) from error
        except OSError as error:
            if error.errno is not None:  # our disk's, not the hub's: the store knows what to say
                raise
            log_hidden_reason(logger, adapter_id, error)
            raise unavailable(self.name, "the transfer broke off") from error


def _check_repo_id(adapter_id: str) -> str:
    segments = split_id(adapter_id)
    if len(segments) != 2 or not all(_NAME.fullmatch(segment) and "--" not in segment and ".." not in segment for segment in segments):
        raise_invalid(adapter_id, "on the hub it must be of the form `owner/name`")
    return adapter_id


def _check_token(api_token: str | None) -> str | bool:
    """The caller's token, or False: then the library sends none (None would make it look for one on this machine)."""
    if not api_token:
        return False
    if not _TOKEN.fullmatch(api_token):
        raise ValidationFailed("`api_token` must be of visible ASCII characters", param="api_token")
    return api_token


def _size_of(size_bytes: int | None) -> int:
    if size_bytes is None:
        raise unavailable("hub", "it did not tell the files' sizes")
    return size_bytes

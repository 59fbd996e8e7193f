"""API keys: made once, shown once, kept as hashes in a document that every server of a fleet reads (api.shared_file).

    mlk_1f0c9a4b7e_Wc0f...      prefix (public: lists and logs may show it), then 256 random bits that nobody keeps

Owns the form of a key, the document, and the check. A hash without salt or stretching is enough for 256 random bits. It does not know what
a tenant may do. `server.commands.keys` makes and revokes, `tenancy` follows the document, `callers` checks.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from server.api.shared_file import SharedFile
from server.errors import ValidationFailed

PREFIX = "mlk"
MAX_KEYS = 20_000
_FORM = re.compile(r"(mlk_[0-9a-f]{10})_([A-Za-z0-9_-]{43})")
_NOTHING = hashlib.sha256(b"").hexdigest()


class ApiKey(msgspec.Struct, frozen=True, omit_defaults=True):
    """A key as it is kept. Times are seconds since 1970; 0: never."""

    tenant: str
    hash: str  # SHA-256 of the whole key
    created_at: int
    label: str = ""
    expires_at: int = 0
    revoked_at: int = 0

    def state(self, now: float) -> str:
        """active, expired or revoked."""
        return "revoked" if self.revoked_at else "expired" if self.expires_at and now >= self.expires_at else "active"


class KeyDocument(msgspec.Struct, frozen=True):
    """The document on the shared file system: prefix -> key."""

    generation: int = 0
    keys: dict[str, ApiKey] = {}


def key_file(registry_dir: Path) -> SharedFile[KeyDocument]:
    """The document of the servers that share `registry_dir`."""
    return SharedFile(registry_dir / "keys" / "keys.json", KeyDocument())


def looks_like_key(text: str) -> bool:
    """Whether it is meant to be one of ours."""
    return text.startswith(f"{PREFIX}_")


class KeyRing:
    """The keys of a fleet. `document` is what holds now; `update` and `refresh` block."""

    def __init__(self, registry_dir: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._file, self._clock = key_file(registry_dir), clock
        self.document: KeyDocument = self._file.read()

    def refresh(self) -> bool:
        """Take over what was written meanwhile, here or elsewhere; whether anything was. OSError or ValueError if it cannot be read."""
        found = self._file.read_if_changed()
        if found is None or found.generation < self.document.generation:
            return False
        changed, self.document = found != self.document, found
        return changed

    def check(self, shown: str) -> tuple[str, str] | None:
        """The tenant and the prefix of a key that was shown; None: unknown, expired or revoked, which nobody is told apart.

        Takes as long for a prefix that there is not as for a secret that is wrong."""
        form = _FORM.fullmatch(shown)
        key = self.document.keys.get(form[1]) if form is not None else None
        digest = hashlib.sha256(shown.encode("utf-8", errors="surrogatepass")).hexdigest()
        is_right = hmac.compare_digest(digest, key.hash if key is not None else _NOTHING)
        if key is None or form is None or not is_right or key.state(self._clock()) != "active":
            return None
        return key.tenant, form[1]

    def create(self, tenant: str, *, label: str = "", expires_at: int = 0) -> tuple[str, str, ApiKey]:
        """A new key: itself, its prefix, what is kept. The key is not to be had again. The errors of SharedFile.update."""
        prefix, now = f"{PREFIX}_{secrets.token_hex(5)}", int(self._clock())
        shown = f"{prefix}_{secrets.token_urlsafe(32)}"
        kept = ApiKey(tenant, hashlib.sha256(shown.encode()).hexdigest(), now, label, expires_at)

        def add(document: KeyDocument) -> KeyDocument:
            if prefix in document.keys:  # one in 2^40
                raise ValidationFailed("a key of that prefix was made meanwhile; try again")
            keys = document.keys
            if len(keys) >= MAX_KEYS:
                keys = {name: one for name, one in keys.items() if one.state(now) == "active"}
            if len(keys) >= MAX_KEYS:
                raise ValidationFailed(f"there are {MAX_KEYS} keys, all that are kept; revoke some")
            return KeyDocument(document.generation + 1, {**keys, prefix: kept})

        self.document = self._file.update(add, self.document.generation)
        return shown, prefix, kept

    def revoke(self, named: str) -> str:
        """Let a key open nothing from now on; its prefix. `named`: the prefix, or the key itself. ValidationFailed if there is none."""
        form = _FORM.fullmatch(named)
        prefix, now = form[1] if form is not None else named, int(self._clock())

        def change(document: KeyDocument) -> KeyDocument:
            key = document.keys.get(prefix)
            if key is None:
                raise ValidationFailed("there is no key of that prefix", param="key")  # not echoed: it may be a key that was typed wrongly
            if key.revoked_at:
                return document
            return KeyDocument(document.generation + 1, {**document.keys, prefix: msgspec.structs.replace(key, revoked_at=now)})

        self.document = self._file.update(change, self.document.generation)
        return prefix

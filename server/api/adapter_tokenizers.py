"""Tokenizers that adapters bring: one object for all adapters with the same files, a bounded number of them in memory.

Owns the cache, by content. What a tokenizer is, and which one is refused, is api.text.tokenizer's. api.packing loads, api.adapters looks
up.
"""

import hashlib
import threading
from collections import OrderedDict

from server.api.text.tokenizer import TOKENIZER_FILES, Tokenizer, load_adapter_tokenizer
from server.errors import AdapterRefused
from server.sources import SourceChanged, Store, StoredAdapter

_MAX_TOKENIZERS = 32  # tens of MB each
_MAX_FILE_BYTES = 64 << 20  # the largest tokenizer.json of known models has 35 MB


class AdapterTokenizers:
    """The most recently used tokenizers, by digest. Safe to use from several threads."""

    def __init__(self, base: Tokenizer, store: Store) -> None:
        self._base, self._store = base, store
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, Tokenizer] = OrderedDict()

    def get(self, digest: str) -> Tokenizer | None:
        """The tokenizer of that digest; None if it has to be loaded again."""
        with self._lock:
            if digest in self._loaded:
                self._loaded.move_to_end(digest)
            return self._loaded.get(digest)

    def load(self, stored: StoredAdapter, num_rows: int) -> tuple[str, Tokenizer] | None:
        """Digest and tokenizer of an adapter whose embedding has `num_rows` rows; None if it brings none.

        AdapterRefused, naming the file, if it is of no use; SourceChanged if it was replaced while it was read."""
        digest = _digest(stored, num_rows)
        if digest is None:
            return None
        if (tokenizer := self.get(digest)) is not None:
            return digest, tokenizer
        try:
            tokenizer = load_adapter_tokenizer(stored.path, self._base, num_rows=num_rows)
        except OSError as error:
            self._check_unchanged(stored, num_rows, digest)
            raise AdapterRefused(f"the adapter's tokenizer cannot be read ({error.strerror})") from None
        except AdapterRefused:
            self._check_unchanged(stored, num_rows, digest)
            raise
        self._check_unchanged(stored, num_rows, digest)
        if tokenizer is None:
            return None
        with self._lock:
            self._loaded[digest] = tokenizer
            while len(self._loaded) > _MAX_TOKENIZERS:
                self._loaded.popitem(last=False)
        return digest, tokenizer

    def _check_unchanged(self, stored: StoredAdapter, num_rows: int, digest: str) -> None:
        """The files are read twice (here and by the loader): other bytes must never be kept under this digest."""
        self._store.check_unchanged(stored)
        if _digest(stored, num_rows) != digest:
            raise SourceChanged(stored.snapshot)


def _digest(stored: StoredAdapter, num_rows: int) -> str | None:
    """Of the tokenizer's files and all else that decides whether they are taken; None if there are no such files."""
    total, num_found = hashlib.sha256(str(num_rows).encode()), 0
    for name in TOKENIZER_FILES:
        path = stored.path / name
        if name not in stored.snapshot.names and not path.is_file():
            continue
        try:
            with path.open("rb") as file:
                raw = file.read(_MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            raise SourceChanged(stored.snapshot) from None
        except OSError as error:
            raise AdapterRefused(f"the adapter's {name} cannot be read ({error.strerror})") from None
        if len(raw) > _MAX_FILE_BYTES:
            raise AdapterRefused(f"the adapter's {name} has more than {_MAX_FILE_BYTES} bytes")
        total.update(name.encode() + b"\0" + hashlib.sha256(raw).digest())
        num_found += 1
    return total.hexdigest() if num_found else None

"""From snapshots of adapters to a pack on disk and a tokenizer. All of it blocks: api.adapters runs it in threads.

Owns the way (fetch, pack, merge, tokenizer), and the second try when the store's copy turns out to be damaged. Remembers nothing itself.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from server.adapters.merge import merge_hash, merge_packs
from server.adapters.pack import check_pack, read_header, write_pack
from server.api.adapter_tokenizers import AdapterTokenizers
from server.api.names import shown
from server.api.selection import AdapterSelection, Merge
from server.api.text.tokenizer import Tokenizer
from server.errors import AdapterRefused, SourceUnavailable
from server.sources import Snapshot, Source, SourceChanged, Store, StoredAdapter
from server.sources.disk import explain_disk_errors
from server.sources.selection import CONFIG_NAME
from server.sources.space import mark_used
from server.types import AdapterRef, BaseLayout

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Packed:
    """What became of a selection. `snapshots` are those that were taken in the end; `own` is the digest and tokenizer that it brings,
    `base_name` the model that its config names."""

    ref: AdapterRef
    snapshots: tuple[Snapshot, ...]
    rank: int
    own: tuple[str, Tokenizer] | None = None
    base_name: str | None = None
    is_new: bool = False  # the store had no pack of it


class AdapterPacker:
    """Makes packs in `store`. Safe to use from several threads.

    `name_by_hash`: the engine, which knows weights by their content, calls an adapter by its hash in messages, not as somebody else did."""

    def __init__(self, store: Store, tokenizers: AdapterTokenizers, *, max_merged_rank: int, name_by_hash: bool = False) -> None:
        self._store, self._tokenizers, self._max_merged_rank = store, tokenizers, max_merged_rank
        self._name_by_hash = name_by_hash

    def make(self, source: Source, selection: AdapterSelection, snapshots: Sequence[Snapshot], layout: BaseLayout) -> Packed:
        """Fetch and pack what is not yet there. The errors of Source and of adapters.pack, which name adapters as the caller did."""
        stored = [self._store.materialize(source, snapshot, api_token=selection.api_token) for snapshot in snapshots]
        refs: list[AdapterRef] = []
        written: list[str] = []
        for index, adapter_id in enumerate(selection.shown_ids):

            def pack(one: StoredAdapter, adapter_id: str = adapter_id) -> AdapterRef:
                return self._pack(one, adapter_id, layout, written)

            stored[index], ref = self._healed(source, stored[index], selection.api_token, pack)
            refs.append(ref)
        if selection.merge is not None:
            merged = self._merge_whole(selection.merge, stored, refs, layout, written)
            rank = read_header(Path(merged.path))[0].max_rank
            return Packed(merged, tuple(one.snapshot for one in stored), rank, is_new=bool(written))
        header = read_header(Path(refs[0].path))[0]

        def load(one: StoredAdapter) -> tuple[str, Tokenizer] | None:
            with _naming(shown(selection.adapter_id)):
                return self._tokenizers.load(one, header.vocab_size)

        one, own = self._healed(source, stored[0], selection.api_token, load)
        return Packed(refs[0], (one.snapshot,), header.max_rank, own, _base_name(one), bool(written))

    def has_merge(self, selection: AdapterSelection, snapshots: Sequence[Snapshot], layout: BaseLayout) -> bool:
        """Whether the store has a merge already, of these versions; nothing is fetched or made."""
        with explain_disk_errors():
            stored = [found for snapshot in snapshots if (found := self._store.find(snapshot)) is not None]
            if selection.merge is None or len(stored) < len(snapshots):
                return False
            hash = _hash_of(selection.merge, [one.hash for one in stored])
            return mark_used(self._store.pack_path(hash, _pack_key(layout)))

    def _healed(
        self, source: Source, stored: StoredAdapter, api_token: str | None, work: Callable[[StoredAdapter], Result]
    ) -> tuple[StoredAdapter, Result]:
        """`work` on the stored files, once more on new ones if it fails and the store's copy is not what was fetched."""
        try:
            return stored, work(stored)
        except SourceChanged:
            raise
        except (AdapterRefused, SourceUnavailable):
            if stored.snapshot.folder is not None or self._store.verify(stored):
                raise
        stored = self._store.materialize(source, stored.snapshot, api_token=api_token)
        return stored, work(stored)

    def _pack(self, stored: StoredAdapter, adapter_id: str, layout: BaseLayout, written: list[str]) -> AdapterRef:
        """The adapter's pack; its hash is added to `written` if the store had none."""

        def write(out: Path) -> None:
            written.append(stored.hash)
            if stored.snapshot.folder is None and not stored.fresh and not self._store.verify(stored):
                raise AdapterRefused("its files were damaged in the store")  # never a pack of other bytes than the hash's
            write_pack(stored.path, layout, stored.hash, out)

        with _naming(adapter_id):
            path = self._store.publish_pack(stored.hash, _pack_key(layout), write, stored)
            try:
                read_header(path)
            except AdapterRefused as damage:  # cut off by a crash of the machine, or since: what it was made of is still there
                log.error("the pack of adapter %s is damaged on disk (%s); it is made anew", stored.hash, damage.message)
                self._store.discard_packs(stored.hash, damaged=True)
                self._store.publish_pack(stored.hash, _pack_key(layout), write, stored)
        return AdapterRef(stored.hash, str(path), stored.hash[:12] if self._name_by_hash else adapter_id)

    def _merge_whole(
        self, merge: Merge, stored: list[StoredAdapter], refs: list[AdapterRef], layout: BaseLayout, written: list[str]
    ) -> AdapterRef:
        """As `_merge`; once more if that is refused and a pack of what is merged turns out to be damaged."""
        try:
            return self._merge(merge, refs, layout, written)
        except AdapterRefused:
            if not any([self._repack_damaged(one, ref, layout) for one, ref in zip(stored, refs, strict=True)]):
                raise
        return self._merge(merge, refs, layout, written)

    def _repack_damaged(self, stored: StoredAdapter, ref: AdapterRef, layout: BaseLayout) -> bool:
        try:
            check_pack(Path(ref.path))
        except AdapterRefused:
            self._store.discard_packs(ref.hash, damaged=True)
            self._pack(stored, ref.name, layout, [])
            return True
        return False

    def _merge(self, merge: Merge, refs: list[AdapterRef], layout: BaseLayout, written: list[str]) -> AdapterRef:
        """The merged pack, under the hash of all that goes into it. Its random masks come of that hash, so the seed is always 0."""
        hash = _hash_of(merge, [ref.hash for ref in refs])
        inputs = [(Path(ref.path), weight) for ref, weight in zip(refs, merge.weights, strict=True)]

        def write(out: Path) -> None:
            written.append(hash)
            merge_packs(inputs, *_options(merge), self._max_merged_rank, out)

        path = self._store.publish_pack(hash, _pack_key(layout), write)
        return AdapterRef(hash, str(path), hash[:12] if self._name_by_hash else "+".join(merge.ids))


@contextmanager
def _naming(adapter_id: str) -> Iterator[None]:
    """A refusal with the adapter's name in front, outside of any flight that callers with other names for it share."""
    try:
        yield
    except AdapterRefused as refusal:
        raise AdapterRefused(f"Adapter '{adapter_id}': {refusal.message}", param=refusal.param) from refusal


def _base_name(stored: StoredAdapter) -> str | None:
    """The base that the adapter's config names. A fact for people; what fits is decided by shapes."""
    try:
        name = json.loads((stored.path / CONFIG_NAME).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError):  # replaced since: the pack is of what was read before
        return None
    return name[:200] if isinstance(name, str) else None


def _options(merge: Merge) -> tuple[str, float, str, int]:
    return merge.strategy, merge.density, merge.majority_sign_method, 0


def _hash_of(merge: Merge, hashes: Sequence[str]) -> str:
    return merge_hash(list(zip(hashes, merge.weights, strict=True)), *_options(merge))


def _pack_key(layout: BaseLayout) -> str:
    return f"{layout.fingerprint[:32]}-{layout.dtype}"

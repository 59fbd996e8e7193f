"""Which adapters stay in memory and on disk whatever else is asked for. Owns the pins of this server; api.publishing says what they are."""

from collections import Counter
from collections.abc import Callable

from server.ipc.messages import Pin, Unpin
from server.sources import Store
from server.types import AdapterRef


class Pins:
    """By name, one version each; the engine hears of a hash once, however many names mean it. `on_unpinned` is called after Unpin."""

    def __init__(self, store: Store, tell: Callable[[Pin | Unpin], None], on_unpinned: Callable[[str], None]) -> None:
        self._store, self._tell, self._on_unpinned = store, tell, on_unpinned
        self._held: dict[str, AdapterRef] = {}
        self._num_names: Counter[str] = Counter()  # hash -> names

    def hash_of(self, name: str) -> str | None:
        """What is held for the name."""
        held = self._held.get(name)
        return held.hash if held is not None else None

    def hold(self, name: str, ref: AdapterRef) -> None:
        """Hold this version for the name, and no other one any longer."""
        held = self._held.get(name)
        if held is not None and held.hash == ref.hash:
            return
        self._held[name] = ref
        self._num_names[ref.hash] += 1
        self._store.pin(ref.hash)
        if self._num_names[ref.hash] == 1:
            self._tell(Pin(ref))
        if held is not None:
            self._drop(held)

    def let_go(self, name: str) -> None:
        """Hold nothing for the name."""
        held = self._held.pop(name, None)
        if held is not None:
            self._drop(held)

    def tell_all(self) -> None:
        """To an engine that has just started."""
        for ref in {ref.hash: ref for ref in self._held.values()}.values():
            self._tell(Pin(ref))

    def _drop(self, held: AdapterRef) -> None:
        self._store.unpin(held.hash)
        self._num_names[held.hash] -= 1
        if not self._num_names[held.hash]:
            del self._num_names[held.hash]
            self._tell(Unpin(held.hash))
            self._on_unpinned(held.hash)

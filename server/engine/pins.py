"""The adapters that sequences run with: pinned on the device while they do, so many at most. The scheduler pins and releases."""

from collections.abc import Callable

from server.engine.sequence import Sequence
from server.errors import GenerationFailed
from server.memory.tiers import AdapterTiers
from server.types import EngineRequest


class Pins:
    """`vocab_size(adapter hash, or "" for the base)`: how many ids its rows may hold. `max_adapters`: how many may run at once, whatever
    there is room for; None: as many as there is room for."""

    def __init__(self, tiers: AdapterTiers, vocab_size: Callable[[str], int] | None, max_adapters: int | None) -> None:
        self._tiers, self._vocab_size, self._max = tiers, vocab_size, max_adapters
        self.running: dict[str, int] = {}  # adapter -> sequences; in the order in which the adapters began to run

    def pin(self, sequence: Sequence) -> bool:
        """Pin the sequence's adapter, if it has one; False if there is no room. GenerationFailed if its tokens are not the adapter's. What
        `place` raises is raised here; nothing has changed then."""
        adapter_hash = sequence.adapter_hash
        if not adapter_hash:
            return True
        if self._is_one_too_many(adapter_hash) or not self._tiers.acquire(adapter_hash):
            return False
        self.running[adapter_hash] = self.running.get(adapter_hash, 0) + 1
        try:
            self.check_vocabulary(sequence.request, adapter_hash)
        except ValueError as error:
            self.release(sequence)
            raise GenerationFailed(str(error)) from None
        return True

    def check_vocabulary(self, request: EngineRequest, adapter_hash: str = "") -> None:
        """ValueError if a token is not in the vocabulary of the base, or of a pinned adapter."""
        if self._vocab_size is not None and max(request.token_ids) >= (size := self._vocab_size(adapter_hash)):
            raise ValueError(f"token id {max(request.token_ids)} is not in the vocabulary of {size}")

    def release(self, sequence: Sequence) -> None:
        """The sequence does not run any more."""
        if adapter_hash := sequence.adapter_hash:
            self._tiers.release(adapter_hash)
            self.running[adapter_hash] -= 1
            if not self.running[adapter_hash]:
                del self.running[adapter_hash]

    def lacks_blocks(self, adapter_hash: str) -> bool:
        """Whether it is for want of blocks alone that an adapter found no room, where adapters lie among the KV blocks."""
        return not self._is_one_too_many(adapter_hash) and self._tiers.is_within_budget(adapter_hash)

    def _is_one_too_many(self, adapter_hash: str) -> bool:
        return self._max is not None and len(self.running) >= self._max and adapter_hash not in self.running

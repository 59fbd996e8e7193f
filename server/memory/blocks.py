"""KV blocks: which are free, which hold a prefix that another sequence can reuse.

Owns block ids, reference counts and the prefix index. It does not know tensors: block i is the i-th page of every layer's cache.
The scheduler is its only caller. Prefix caching by hashes of full blocks follows vLLM's and nano-vllm's idea; the identity is ours:
a chain that starts from (base revision, adapter content hash, tenant salt), so a replaced adapter or another tenant never matches.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def root_hash(*parts: str) -> bytes:
    """Where a chain of block hashes starts; `parts` is everything but the tokens that the cached keys and values depend on."""
    return hashlib.blake2b("\x00".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def chain_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of one full block of tokens that follows `parent`."""
    return hashlib.blake2b(array("I", tokens).tobytes(), key=parent, digest_size=16).digest()


class BlockPool:
    """Allocates blocks of `block_size` tokens; a block that is released keeps its prefix until it is needed for something else.

    Every block is in exactly one of two places: referenced (count > 0) or in the free list, which is in order of release."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._references = [0] * num_blocks
        self._is_free = bytearray(b"\x01" * num_blocks)  # the free list again, for allocate_run
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, those with a reusable prefix included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that some sequence references."""
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that hold a known prefix, referenced or not."""
        return len(self._block_of)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The longest run of known blocks from the start of `hashes`. Takes no reference."""
        found = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def can_allocate(self, num_blocks: int, reuse: Sequence[int] = ()) -> bool:
        """Whether `allocate` would succeed."""
        idle = sum(1 for block in reuse if self._references[block] == 0)
        return num_blocks <= len(self._free) - idle

    def allocate(self, num_blocks: int, reuse: Sequence[int] = ()) -> list[int] | None:
        """`reuse` (from match) and `num_blocks` more, each with one more reference; None, and nothing changed, if too few are free."""
        if not self.can_allocate(num_blocks, reuse):
            return None
        for block in reuse:
            if self._references[block] == 0:
                del self._free[block]
                self._is_free[block] = 0
            self._references[block] += 1
        taken = list(reuse)
        for _ in range(num_blocks):
            block, _ = self._free.popitem(last=False)
            self._take(block)
            taken.append(block)
        return taken

    def allocate_run(self, num_blocks: int) -> int | None:
        """The first of `num_blocks` blocks that lie side by side, with a reference each, for something else than tokens; None if there
        is no such run. Taken from the end, since single blocks are taken from the beginning first."""
        first = self._is_free.rfind(b"\x01" * num_blocks)
        if first < 0:
            return None
        for block in range(first, first + num_blocks):
            del self._free[block]
            self._take(block)
        return first

    def _take(self, block: int) -> None:
        self._drop_hash(block)
        self._references[block] = 1
        self._is_free[block] = 0

    def release(self, blocks: Sequence[int]) -> None:
        """Give a reference back for each. Tails are freed first, so that the beginnings of prefixes live longest."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] < 0:
                raise AssertionError(f"block {block} released more often than taken")
            if self._references[block] == 0:
                self._free[block] = None
                self._is_free[block] = 1
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, block_hash: bytes) -> None:
        """The block is full and computed: let others find it. The first block with a hash stays the one that is found."""
        if self._hash_of[block] is None and block_hash not in self._block_of:
            self._hash_of[block] = block_hash
            self._block_of[block_hash] = block

    def _drop_hash(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            self._hash_of[block] = None
            del self._block_of[block_hash]

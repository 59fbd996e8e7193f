"""The block pool against its invariants, and the identity of prefixes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.memory.blocks import BlockPool, chain_hash, root_hash


def test_released_prefix_is_found_until_its_block_is_needed():
    pool = BlockPool(4, 2)
    blocks = pool.allocate(2)
    first = chain_hash(root_hash("base", "", ""), [1, 2])
    second = chain_hash(first, [3, 4])
    pool.publish(blocks[0], first)
    pool.publish(blocks[1], second)
    pool.release(blocks)
    assert pool.match([first, second]) == blocks
    assert pool.match([chain_hash(first, [9, 9])]) == []
    assert pool.allocate(3) is not None  # two that hold nothing, and the tail of the prefix
    assert pool.match([first, second]) == blocks[:1]


def test_allocation_that_does_not_fit_changes_nothing():
    pool = BlockPool(3, 2)
    held = pool.allocate(1)
    assert pool.allocate(3) is None
    assert (pool.num_free, pool.num_used) == (2, 1)
    pool.publish(held[0], b"x")
    pool.release(held)
    assert pool.allocate(3, reuse=held) is None  # one of three free blocks is the reused one
    assert pool.allocate(2, reuse=held) is not None


@pytest.mark.parametrize("other", [("base2", "", ""), ("base", "adapter", ""), ("base", "", "tenant"), ("bas", "e", "")])
def test_identity_parts_caches(other):
    assert root_hash("base", "", "") != root_hash(*other)


def test_double_release_is_noticed():
    pool = BlockPool(2, 2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError):
        pool.release(blocks)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("aprm"), st.integers(0, 5)), max_size=60))
def test_every_block_is_free_or_referenced(actions):
    pool, held, published = BlockPool(8, 2), [], []
    for number, (action, amount) in enumerate(actions):
        if action == "a":
            blocks = pool.allocate(amount)
            if blocks is not None:
                held.append(blocks)
        elif action == "r" and held:
            pool.release(held.pop(amount % len(held)))
        elif action == "p" and held and held[amount % len(held)]:
            block_hash = number.to_bytes(4, "big")
            pool.publish(held[amount % len(held)][0], block_hash)
            published.append(block_hash)
        elif action == "m" and published:
            found = pool.match([published[amount % len(published)]])
            blocks = pool.allocate(0, reuse=found)
            held.append(blocks)
        assert pool.num_used == len({block for blocks in held for block in blocks})
        assert pool.num_free + pool.num_used == 8
    for blocks in held:
        pool.release(blocks)
    assert pool.num_free == 8

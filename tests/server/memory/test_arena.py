"""The arena: pages and runs are where blocks say, and neither touches the other."""

import pytest
import torch

from server.memory.arena import Arena
from server.memory.blocks import BlockPool


def test_pages_and_runs_share_one_tensor():
    arena = Arena(6, 64, torch.float32, torch.device("cpu"))
    keys, values = arena.pages(0, (4, 2, 4)), arena.pages(32, (4, 2, 4))  # [7, 4, 2, 4] each
    assert keys.shape == (7, 4, 2, 4)
    keys[2], values[2] = 1.0, 2.0
    arena.run(4, 300)[:] = 255
    assert arena.data[2 * 64 : 3 * 64].tolist() == [1.0] * 32 + [2.0] * 32
    assert float(keys[3].abs().sum() + values[6].abs().sum()) == 0
    assert arena.num_blocks_for(300) == 2 and arena.block_bytes == 256
    assert arena.data[6 * 64 :].abs().sum() == 0  # the block that stays zero


def test_pages_of_another_type_lie_in_the_same_blocks():
    arena = Arena(6, 64, torch.bfloat16, torch.device("cpu"))  # 128 bytes a block
    keys, values = (arena.pages(offset, (4, 2, 8), torch.float8_e4m3fn) for offset in (0, 64))
    assert keys.shape == (7, 4, 2, 8) and keys.dtype == torch.float8_e4m3fn
    keys.view(torch.uint8)[2], values.view(torch.uint8)[2] = 1, 2
    arena.run(3, 128).fill_(255)
    assert arena.run(2, 128).tolist() == [1] * 64 + [2] * 64
    assert int(keys.view(torch.uint8)[4:].sum()) == 0 and set(values.view(torch.uint8)[3].flatten().tolist()) == {255}


def test_blocks_are_aligned():
    with pytest.raises(ValueError, match="multiple of 64"):
        Arena(4, 5, torch.float32, torch.device("cpu"))


def test_runs_are_side_by_side_and_come_from_the_end():
    pool = BlockPool(10, 4)
    first = pool.allocate(3)
    assert first == [0, 1, 2]
    assert pool.allocate_run(4) == 6
    assert pool.allocate_run(4) is None and pool.num_free == 3
    assert pool.allocate_run(3) == 3 and pool.allocate(1) is None
    pool.release(range(6, 10))
    pool.release([1])
    assert pool.num_free == 5 and pool.allocate_run(5) is None
    assert sorted(pool.allocate(5)) == [1, 6, 7, 8, 9]


def test_a_run_takes_the_room_of_prefixes_and_nobody_finds_them_again():
    pool = BlockPool(4, 4)
    blocks = pool.allocate(4)
    for block in blocks:
        pool.publish(block, bytes([block]))
    pool.release(blocks)
    assert pool.match([bytes([0]), bytes([1])]) == [0, 1]
    assert pool.allocate_run(3) == 1
    assert pool.match([bytes([0]), bytes([1])]) == [0] and pool.num_cached == 1

"""How memory is divided, by the numbers; that the engine divides so is tests/server/engine/test_memory.py's."""

import dataclasses

import pytest

from sizing.budget import (
    GRAPH_BYTES,
    SPARE_BYTES,
    WORKSPACE_BYTES,
    Widths,
    block_bytes,
    set_aside,
    share_apart,
    share_arena,
    workspace_bytes,
)
from sizing.shape import Attention

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Options:
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None
    max_batch_tokens: int = 1024
    max_batch_size: int = 64
    max_sequence_len: int = 4096
    adapter_device_bytes: int | None = None


def test_a_block_is_aligned():
    assert block_bytes(131072, 16) == 2 * MIB and block_bytes(9, 3) == 64


def test_steps_are_kept_room_for():
    mistral = Widths(28672, 4096, 32000)
    kept = set_aside(mistral, Options(), 2, graphs=True)
    assert (kept.spare, kept.graphs) == (SPARE_BYTES, GRAPH_BYTES)
    assert kept.activations == int(1.2 * (1024 * (2 * 28672 + 8 * 4096) * 2 + 64 * 32000 * 26)) + 8 * 1024 * 512 * 4
    assert set_aside(mistral, Options(), 2, graphs=False).total == kept.total - GRAPH_BYTES
    assert set_aside(mistral, Options(max_batch_tokens=4096), 2, graphs=True).activations > 3 * kept.activations


def test_a_captured_steps_workspace_is_kept_room_for():
    mistral = [Attention(32, 8, 128, 128)]
    assert workspace_bytes(mistral, 16, 1, 58) == WORKSPACE_BYTES
    large = workspace_bytes(mistral, 2048, 256, 132)
    assert large == (2048 * 4 // 128 + 256) * 128 * 32 * 129 * 4 + 16 * MIB
    widths = Widths(28672, 4096, 32000)
    more = set_aside(widths, Options(), 2, large, graphs=True).total - set_aside(widths, Options(), 2, graphs=True).total
    assert more == large - WORKSPACE_BYTES


def test_tokens_and_adapters_share_an_arena():
    shares = share_arena(1000 * 2 * MIB, 2 * MIB, Options())
    assert shares.num_blocks == 1000 and shares.adapter_bytes == 500 * 2 * MIB


def test_a_longest_sequence_always_fits_beside_the_adapters():
    shares = share_arena(300 * 2 * MIB, 2 * MIB, Options())  # 256 blocks are one sequence's
    assert shares.adapter_bytes == 44 * 2 * MIB
    assert share_arena(100 * 2 * MIB, 2 * MIB, Options()).adapter_bytes == 0


@pytest.mark.parametrize("asked", [{"num_blocks": 400}, {"kv_cache_bytes": 401 * 2 * MIB - 1}])
def test_what_is_asked_for_is_taken_and_adapters_come_beside_it(asked):
    shares = share_arena(1000 * 2 * MIB, 2 * MIB, Options(adapter_device_bytes=99 * MIB, **asked))
    assert shares.num_blocks == 400 + 50 and shares.adapter_bytes == 99 * MIB
    assert share_arena(1000 * 2 * MIB, 2 * MIB, Options(**asked)).num_blocks == 700


def test_the_plain_path_takes_what_a_full_batch_can_use():
    assert share_apart(10**12, 2 * MIB, Options()).num_blocks == 64 * 256
    shares = share_apart(4000 * 2 * MIB, 2 * MIB, Options())
    assert shares.num_blocks == 1000 and shares.adapter_bytes == 1000 * 2 * MIB

"""Which steps are captured at which sizes; the captures themselves run in test_gpu.py."""

import pytest

from server.engine.graphs import MAX_MIXED_ROWS, decode_sizes, mixed_sizes


@pytest.mark.parametrize("max_rows", [1, 2, 5, 8, 64, 65, 256, 300])
def test_every_number_of_decode_rows_has_a_size(max_rows):
    sizes = [size.num_rows for size in decode_sizes(max_rows)]
    assert sizes == sorted(set(sizes)) and sizes[-1] == max(2, max_rows) and sizes[0] == 2
    for rows in range(1, max_rows + 1):
        size = next(size for size in sizes if size >= rows)
        assert size - rows < max(2, 8, rows / 4)


@pytest.mark.parametrize("max_rows", [1, 15, 16, 17, 100, 512, 1000, 2048, 8192])
@pytest.mark.parametrize("max_sequences", [1, 32, 256])
def test_steps_with_prompts_are_padded_by_little_and_have_room_for_every_sequence(max_rows, max_sequences):
    sizes = mixed_sizes(max_rows, max_sequences)
    numbers = [size.num_rows for size in sizes]
    assert numbers == sorted(set(numbers)) and (numbers[-1] == min(max_rows, MAX_MIXED_ROWS) if max_rows >= 16 else not numbers)
    for rows in range(2, numbers[-1] + 1) if numbers else ():
        size = next(size for size in sizes if size.num_rows >= rows)
        assert size.num_rows - rows < max(16, rows / 4)
        # A step of so many rows has at most so many sequences.
        assert size.num_sequences >= min(rows, max_sequences)

"""What the sweep of quantized products tries: ways that exist, for the number of rows that they are for."""

import pytest

from benchmarks.gpu_quant_choices import variations
from server.kernels.launch import card_of
from server.kernels.quantized_launch import Dense, Few, Tile, choose


@pytest.mark.parametrize("code, bits", [("int4", 4), ("int8", 8)])
@pytest.mark.parametrize("num_rows", [1, 2, 8, 9, 16, 17, 32, 64, 128, 129, 512, 4096])
def test_the_card_s_choice_is_first_and_the_others_fit(code, bits, num_rows):
    default = choose(card_of((9, 0), 132), num_rows, 4096, 6144, code)
    found = variations(default, bits, num_rows)
    assert found[0] == default and len(found) == len({*found}) > 1
    for choice in found:
        if isinstance(choice, Few):
            assert bits == 8 and num_rows <= choice.rows
        if bits == 8 and isinstance(choice, Tile):
            assert not (choice.join or choice.scaled)
    kinds = {type(choice) for choice in found}
    assert Dense in kinds or num_rows <= 32

"""Products with weights of few bits against float64: every code, group and way of computing. In Triton's interpreter, or on a card."""

import pytest
import torch

from server.kernels import quantized
from server.kernels.launch import card_of
from server.kernels.quantized import NF4, QuantizedWeight, check_group, dequantize, multiply_reference, pack, together, unpack
from server.kernels.quantized_launch import Dense, Few, Tile, choose
from tests.server.kernels.packed import DEVICE, ON_CARD

kernels = pytest.importorskip("server.kernels.quantized_kernels", reason="Triton is not installed", exc_type=ImportError)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
WAYS = {
    "few 1": (1, Few(1, 16, 1)), "few 2": (2, Few(2, 16, 1)), "few 3 of 4": (3, Few(4, 32, 1)),
    "tile": (9, Tile(16, 32, 1, 4, 2)), "tile of parts": (17, Tile(16, 32, 2, 4, 2)), "tile of a large part": (5, Tile(16, 32, 4, 4, 1)),
    "dense": (5, Dense(24)), "tile that joins": (17, Tile(16, 32, 4, 4, 2, True, True)),
    "tile of scaled numbers": (9, Tile(16, 32, 2, 4, 2, False, True, True)),
}  # fmt: skip


def random_weight(code: str, n: int, k: int, group: int, *, zeros: str = "whole", order: bool = False) -> QuantizedWeight:
    """Random codes, scales and zeros, with what they stand for the size of a linear's weight."""
    groups = k // group
    scales = (0.5 + torch.rand(n, groups)) / k**0.5
    random_order = torch.randperm(k, device=DEVICE) if order else None
    if code == "int8":
        data = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        return QuantizedWeight(code, data.to(DEVICE), (scales / 64).to(DEVICE), None, k, group, random_order)
    if code == "fp8":
        return QuantizedWeight(code, torch.randn(n, k).to(torch.float8_e4m3fn).to(DEVICE), scales.to(DEVICE), None, k, group, random_order)
    data = pack(torch.randint(0, 16, (n, k), dtype=torch.uint8)).to(DEVICE)
    if code == "nf4":
        return QuantizedWeight(code, data, scales.half().to(DEVICE), None, k, group, random_order)
    zero = {"none": None, "whole": torch.randint(0, 17, (n, groups)).half(), "any": 15 * torch.rand(n, groups).half()}[zeros]
    return QuantizedWeight(
        code, data, (scales / 4).half().to(DEVICE), None if zero is None else zero.to(DEVICE), k, group, random_order, zeros != "any"
    )


def exact(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """The formula in float64, code by code."""
    if weight.bits == 8:
        value = weight.data.double()
    else:
        codes = unpack(weight.data, weight.in_features).long()
        value = torch.tensor(NF4, dtype=torch.float64, device=DEVICE)[codes] if weight.code == "nf4" else codes.double()
    of = torch.arange(weight.in_features, device=DEVICE) // weight.group
    w = value if weight.zeros is None else value - weight.zeros.double()[:, of]
    w = w * weight.scales.double()[:, of]
    x = x.double() if weight.order is None else x.double()[:, weight.order]
    return x @ w.T + (0 if bias is None else bias.double())


def check(weight: QuantizedWeight, num_rows: int, choice, dtype: torch.dtype, *, with_bias: bool = False) -> None:
    room = torch.full((num_rows, weight.in_features + 16), torch.nan, device=DEVICE).to(dtype)
    x = room[:, 8 : 8 + weight.in_features].normal_()
    bias = torch.randn(weight.out_features, device=DEVICE).to(dtype) if with_bias else None
    right = exact(x, weight, bias)
    for result in (kernels.multiply(x, weight, bias, choice), multiply_reference(x, weight, bias)):
        assert result.dtype == dtype and result.shape == right.shape
        error = ((result.double() - right).abs().max() / right.abs().max()).item()
        assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("code", quantized.CODES)
def test_every_code_in_every_way(code, way):
    torch.manual_seed(0)
    num_rows, choice = WAYS[way]
    k = 320
    weight = random_weight(code, 40, k, k if code in ("int8", "fp8") else 64)
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if ON_CARD else (torch.float32,)
    for dtype in dtypes:
        check(weight, num_rows, choice, dtype, with_bias=way != "few 2")


def test_a_product_that_joins_leaves_its_counts_as_they_were():
    torch.manual_seed(5)
    weight, x = random_weight("int4", 80, 512, 128), torch.randn(20, 512, device=DEVICE)
    in_two = kernels.multiply(x, weight, None, Tile(16, 32, 4, 4, 2))
    for _ in range(3):  # a count that was left over would have the sum taken too early, or by nobody
        assert torch.equal(kernels.multiply(x, weight, None, Tile(16, 32, 4, 4, 2, join=True)), in_two)


@pytest.mark.parametrize(
    "k, group, zeros",
    [(128, 16, "whole"), (96, 32, "any"), (192, 64, "none"), (256, 128, "any"), (512, 256, "whole"), (160, 160, "any"), (192, 64, "whole")],
)
def test_groups_zeros_and_ragged_units(k, group, zeros):
    torch.manual_seed(1)
    weight = random_weight("int4", 16, k, group, zeros=zeros)
    for way in ("few 2", "tile of parts", "dense"):
        check(weight, *WAYS[way], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zeros", ["none", "whole", "any"])
def test_half_precision_makes_numbers_of_codes_by_their_bits(zeros, dtype):
    torch.manual_seed(2)
    weight = random_weight("int4", 24, 256, 128, zeros=zeros)
    for way in ("few 1", "tile", "dense"):
        check(weight, *WAYS[way], dtype)


def test_inputs_in_another_order():
    torch.manual_seed(3)
    weight = random_weight("int4", 24, 256, 64, order=True)
    for way in ("few 1", "tile", "dense"):
        check(weight, *WAYS[way], torch.float32, with_bias=True)
    x = torch.randn(3, 256, device=DEVICE)
    assert torch.allclose(x @ dequantize(weight).T, exact(x, weight, None).float(), atol=1e-5)


def test_what_is_packed_is_unpacked():
    codes = torch.randint(0, 16, (5, 272), dtype=torch.uint8)
    words = pack(codes)
    assert words.shape == (5, 48) and words.dtype == torch.int32 and torch.equal(unpack(words, 272), codes)
    assert words.nbytes == 5 * 384 // 2  # a whole unit for the rest


def test_siblings_become_one_or_stay_apart():
    a, b = random_weight("int4", 8, 256, 64), random_weight("int4", 16, 256, 64, zeros="any")
    both = together([a, b])
    assert torch.equal(dequantize(both), torch.cat([dequantize(a), dequantize(b)])) and not both.integer_zeros
    assert torch.equal(dequantize(both.rows(8, 24)), dequantize(b))
    assert both.num_bytes == a.num_bytes + b.num_bytes
    fp8 = random_weight("fp8", 8, 256, 256)
    assert together([fp8, fp8]).data.dtype == torch.float8_e4m3fn
    for other in (random_weight("int4", 8, 256, 128), random_weight("int4", 8, 256, 64, zeros="none"), random_weight("nf4", 8, 256, 64),
                  random_weight("int4", 8, 256, 64, order=True)):  # fmt: skip
        assert together([a, other]) is None
    ordered = random_weight("int4", 8, 256, 64, order=True)
    assert torch.equal(together([ordered, ordered]).order, ordered.order)


def test_wrong_groups_and_inputs_are_refused():
    for in_features, group in ((256, 48), (256, 8), (200, 64), (96, 96), (4096, 192)):
        with pytest.raises(ValueError, match=f"{in_features} inputs cannot be in groups of {group}: allowed are 16, 32, 64"):
            check_group(in_features, group)
    for in_features, group in ((256, 256), (576, 576), (4096, 128), (48, 16)):
        check_group(in_features, group)
    with pytest.raises(ValueError, match=r"x: torch.float64 \[2, 256\]; expected \[rows, 256\]"):
        kernels.multiply(torch.zeros(2, 256, dtype=torch.float64), random_weight("int4", 8, 256, 64), None, Few(2, 8, 1))


@pytest.mark.parametrize("card", [card_of((9, 0), 132), card_of((8, 9), 58), card_of((8, 0), 108)], ids=lambda card: card.name)
def test_choices_cover_every_number_of_rows(card):
    for k, n in ((4096, 6144), (4096, 28672), (14336, 4096), (576, 960), (64, 96)):
        for code, expected in (("int4", {Tile, Dense}), ("nf4", {Tile, Dense}), ("int8", {Few, Tile, Dense}), ("fp8", {Few, Tile, Dense})):
            ways = [choose(card, rows, k, n, code) for rows in range(1, 600)]
            kinds = [type(way) for way in ways]
            assert kinds == sorted(kinds, key=[Few, Tile, Dense].index) and set(kinds) == expected
            for rows, way in enumerate(ways, 1):
                if isinstance(way, Few):
                    assert way.rows >= rows and way.rows in (1, 2, 4)
                elif isinstance(way, Tile):
                    assert way.block_m >= min(rows, 64) and way.split_k in (1, 2, 4, 8)
                else:
                    assert way.block_rows > 0

"""The meaning of a LoRA delta against the formula, written out in float64."""

import pytest
import torch

from server.kernels.lora import GroupDelta, Part, add_delta, fuse


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("ranks", [(1, 3), (8, 0), (16, 5)])
def test_matches_the_formula(rows, ranks):
    torch.manual_seed(rows)
    outs, k = (6, 10), 12
    a = torch.randn(sum(ranks), k)
    x, y = torch.randn(rows, k), torch.randn(rows, sum(outs) + 3)
    expected = y.double().clone()
    parts, row, column = [], 0, 0
    for rank, out in zip(ranks, outs, strict=True):
        if rank:
            b, gain, bias, scale = torch.randn(rank, out), torch.rand(out), torch.randn(out), 0.7
            parts.append(Part(column, column + out, row, row + rank, scale, b, gain, bias))
            delta = x.double() @ a[row : row + rank].double().T @ b.double()
            columns = expected[:, column : column + out]
            expected[:, column : column + out] = columns * gain + scale * delta + bias
        row, column = row + rank, column + out
    add_delta(y, x, GroupDelta(a, tuple(parts)))
    assert torch.allclose(y.double(), expected, atol=1e-4)


def test_fused_parts_mean_the_same():
    torch.manual_seed(0)
    x, y, a = torch.randn(3, 12), torch.randn(3, 30), torch.randn(7, 12)
    parts = (
        Part(2, 10, 0, 3, 0.5, torch.randn(3, 8)),
        Part(10, 14, 3, 4, 2.0, torch.randn(1, 4)),
        Part(20, 29, 4, 7, -1.0, torch.randn(3, 9)),
    )
    expected, fused = y.clone(), y.clone()
    add_delta(expected, x, GroupDelta(a, parts))
    one = fuse(GroupDelta(a, parts))
    add_delta(fused, x, one)
    assert len(one.parts) == 1 and torch.allclose(expected, fused, atol=1e-5)
    for special in (Part(0, 1, bias=torch.ones(1)), parts[0]._replace(gain=torch.ones(8))):
        assert len(fuse(GroupDelta(a, (*parts, special))).parts) == 4


def test_a_replaced_weight_takes_the_place_of_the_base():
    torch.manual_seed(0)
    x, y, weight, bias = torch.randn(3, 4), torch.randn(3, 10), torch.randn(5, 4), torch.randn(5)
    before = y.clone()
    add_delta(y, x, GroupDelta(None, (Part(2, 7, weight=weight, bias=bias),)))
    assert torch.allclose(y[:, 2:7], x @ weight.T + bias, atol=1e-5)
    assert torch.equal(y[:, :2], before[:, :2]) and torch.equal(y[:, 7:], before[:, 7:])

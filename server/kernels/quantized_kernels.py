"""Products with quantized weights on a GPU, as quantized.py means them: `multiply`, by the way that quantized_launch.py chose.

Every launch follows from shapes alone and sums are added in one order: a captured graph gives the same bits each time.
Needs Triton: import it where there is a GPU (or Triton's interpreter). Called by model/ for every quantized linear.
"""

import torch

from server.kernels.quantized import QuantizedWeight
from server.kernels.quantized_dense import dense, scaled
from server.kernels.quantized_few import few
from server.kernels.quantized_launch import Choice, Few, Tile
from server.kernels.quantized_tile import TYPES, tile


def multiply(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, choice: Choice) -> torch.Tensor:
    """x [rows, in] -> [rows, out] in x's type, as quantized.multiply_reference means it. ValueError if x does not fit.

    The error beside it: rounding of sums; a Tile that is scaled and Dense round the weight to x's type, a Tile of zeros that are not whole
    the code less its zero; Dense of fp8 rounds each row of x to e4m3 (3 bits of mantissa) as well."""
    if x.dtype not in TYPES or x.ndim != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"x: {x.dtype} {list(x.shape)}; expected [rows, {weight.in_features}] of one of {[str(t) for t in TYPES]}")
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    if isinstance(choice, Few):
        few(x, weight, bias, y, choice)
    elif isinstance(choice, Tile):
        tile(x, weight, bias, y, choice)
    elif weight.code == "fp8":
        scaled(x, weight, bias, y)
    else:
        dense(x, weight, bias, y, choice)
    return y

"""Which quantized products are computed at the start, so that no step waits for a compilation."""

import torch

from server.kernels.launch import card_of
from server.model.quantization import SCHEMES, linear


def test_what_triton_compiles_for_apart_is_warmed_up_apart(monkeypatch):
    launched, seen = [], set()
    monkeypatch.setattr(linear, "_card", lambda device: card_of((9, 0), 132))
    monkeypatch.setattr(linear, "_multiply", lambda x, weight, bias: launched.append((len(x), weight.out_features)))
    for out_features in (512, 528, 521):  # the second is like the first; a vocabulary may have any number of rows
        weight = SCHEMES["int4"].quantize(torch.randn(out_features, 256))
        linear.QuantizedProduct([weight], None).warm_up(300, torch.bfloat16, seen)
    assert (257, 512) in launched and (257, 528) not in launched and (257, 521) in launched

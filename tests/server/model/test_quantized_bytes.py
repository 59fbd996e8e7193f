"""The planner's bytes of a weight are those that the engine holds: every scheme, rounded while loading or read from a checkpoint."""

from dataclasses import replace

import pytest
import torch

from server.model.quantization import SCHEMES
from sizing.quantization import scheme_named
from tests.server.model.checkpoints import FORMATS, GROUP


@pytest.mark.parametrize("name", sorted(name for name, scheme in SCHEMES.items() if scheme.quantize))
@pytest.mark.parametrize("out_features, in_features", [(96, 1024), (64, 576), (40, 192)])
def test_a_weight_that_is_rounded_while_loading(name, out_features, in_features):
    quantized = SCHEMES[name].quantize(torch.randn(out_features, in_features))
    assert quantized.num_bytes == scheme_named(name).num_bytes(out_features, in_features)


@pytest.mark.parametrize("form", FORMATS)
def test_a_weight_that_is_read_from_a_checkpoint(form):
    name, write, config = FORMATS[form]
    tensors, _ = write(64, 256, torch.Generator().manual_seed(0))
    reader = SCHEMES[name].reader(config)
    scheme = scheme_named(name)
    if scheme.group_size == 128:
        scheme = replace(scheme, group_size=GROUP)
    if form == "gptq":  # the columns are in order, and none is kept: the planner cannot know
        scheme = replace(scheme, column_bytes=0)
    assert reader.read(tensors, 256, 64).num_bytes == scheme.num_bytes(64, 256)
    if name in ("awq", "gptq"):
        assert sum(tensor.nbytes for tensor in tensors.values()) == scheme.file_bytes(64, 256)


def test_bits_in_the_documentation_are_those_of_the_arithmetic():
    assert {name: scheme.bits for name, scheme in SCHEMES.items()} == {name: 8 * scheme_named(name).bytes_per_weight for name in SCHEMES}

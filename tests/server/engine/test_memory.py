"""The engine divides its memory by sizing's arithmetic, and an adapter takes what sizing says."""

import pytest
import torch

from server.adapters.pack import read_header
from server.engine.backends import Backends, divide, free_bytes
from server.engine.graphs import MAX_MIXED_ROWS
from server.kernels import grouped
from server.model.arena_adapters import lay_out
from server.model.attention import ATTENTION_NAME
from server.model.base import BaseModel
from server.model.flashinfer import HEAD_DIMS
from server.types import EngineOptions
from sizing import adapters, budget, memory
from sizing.models import shape_of
from tests.server.engine.peft_oracle import pack, save_adapter
from tests.server.engine.tiny_models import make_config, make_model

PLAIN, ARENA = (Backends(kernels, "sdpa", False, False, False, torch.float32) for kernels in ("torch", "triton"))
OPTIONS = EngineOptions(model_dir="", max_sequence_len=64, num_blocks=100, adapter_device_bytes=1 << 20)


def test_the_kernels_limits_are_those_that_plans_are_made_with():
    assert (adapters.RANK_CAP, adapters.DESCRIPTOR_BYTES) == (grouped.RANK_CAP, 8 * grouped.DESC_WIDTH)
    assert (memory.CAPTURED_HEAD_DIMS, memory.MAX_CAPTURED_ROWS) == (HEAD_DIMS, MAX_MIXED_ROWS)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "deepseek_v3"])
def test_the_engine_divides_as_sizing_says(model_type):
    base = BaseModel(make_model(model_type, attention=ATTENTION_NAME))
    shape = shape_of(model_type, make_config(model_type).to_dict())
    size = budget.block_bytes(shape.kv_values_per_token * 4, OPTIONS.block_size)
    for backends, share in ((PLAIN, budget.share_apart), (ARENA, budget.share_arena)):
        found = divide(base, OPTIONS, backends)
        shares = share(free_bytes(base.device), size, OPTIONS)
        assert (found.num_blocks, found.adapter_device_bytes, found.block_elements) == (shares.num_blocks, 1 << 20, size // 4)


@pytest.mark.parametrize(
    ("rank", "targets"), [(4, ["q_proj", "v_proj"]), (3, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])]
)
def test_an_adapter_takes_the_bytes_that_are_planned(rank, targets, tmp_path):
    base = BaseModel(make_model("llama", attention=ATTENTION_NAME))
    folder = save_adapter(tmp_path / "adapter", "llama", seed=0, r=rank, target_modules=targets)
    ref = pack(folder, base.layout, tmp_path / "pack")
    header, _ = read_header(tmp_path / "pack")
    first_site: dict[int, int] = {}
    for index, site in enumerate(base.layout.sites):
        first_site.setdefault(site.group, index)
    assert ref.hash == header.hash
    planned = adapters.adapter_bytes(shape_of("llama", make_config("llama").to_dict()), rank, targets, item_bytes=4)
    assert planned == lay_out(header, base.layout, base.group_shapes, first_site).num_bytes

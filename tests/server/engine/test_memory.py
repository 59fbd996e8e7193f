"""The engine divides its memory by sizing's arithmetic, and an adapter takes what sizing says."""

import dataclasses
from types import SimpleNamespace

import msgspec
import pytest
import torch

from server.adapters.pack import read_header
from server.engine.backends import Backends, choose_backends, divide, free_bytes
from server.engine.captures import MAX_MIXED_ROWS
from server.errors import AdapterRefused
from server.kernels import grouped
from server.memory.slabs import HostSlabs
from server.model import arena_adapters
from server.model.arena_adapters import ArenaCarrier, lay_out
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


@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "deepseek_v3"])
def test_the_engine_divides_as_sizing_says(model_type, kv):
    base = BaseModel(make_model(model_type, attention=ATTENTION_NAME))
    options = msgspec.structs.replace(OPTIONS, kv_cache_dtype=kv)
    kept_in = choose_backends(base, options).kv_dtype
    shape = shape_of(model_type, make_config(model_type).to_dict())
    size = budget.block_bytes(shape.kv_values_per_token * budget.kv_item_bytes(kv, 4), OPTIONS.block_size)
    assert kept_in.itemsize == budget.kv_item_bytes(kv, 4) == (1 if kv == "fp8" else 4)
    for backends, share in ((PLAIN, budget.share_apart), (ARENA, budget.share_arena)):
        backends = dataclasses.replace(backends, kv_dtype=kept_in)
        found = divide(base, options, backends)
        shares = share(free_bytes(base.device), size, options)
        assert (found.num_blocks, found.adapter_device_bytes, found.block_elements) == (shares.num_blocks, 1 << 20, size // 4)


def test_a_cache_of_one_byte_holds_as_many_times_more_tokens_of_the_same_memory():
    base, tokens = BaseModel(make_model("llama", attention=ATTENTION_NAME)), {}
    for kv in ("auto", "fp8"):
        options = msgspec.structs.replace(OPTIONS, num_blocks=None, kv_cache_bytes=6144 * 200, kv_cache_dtype=kv)
        backends = choose_backends(base, options)
        tokens[kv] = divide(base, options, backends).num_blocks * options.block_size
        base.attach_cache(4, options.block_size, backends.kv_dtype)
        held = sum(tensor.nbytes for tensor in (*base.attention.keys, *base.attention.values))
        assert held == 5 * options.block_size * 3 * 2 * 2 * 8 * backends.kv_dtype.itemsize  # layers, K and V, heads, width
    assert tokens == {"auto": 200 * 16, "fp8": 800 * 16}


def test_a_card_without_e4m3_is_refused_at_the_start(monkeypatch):
    base = BaseModel(make_model("llama", attention=ATTENTION_NAME))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    base.device = torch.device("cuda")
    with pytest.raises(ValueError, match="kv_cache_dtype 'fp8' needs a GPU of compute capability 8.9 or above; this one has 8.6"):
        choose_backends(base, msgspec.structs.replace(OPTIONS, kv_cache_dtype="fp8"))


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


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("a fault of ours"), AdapterRefused("it is damaged")])
def test_a_pack_that_cannot_be_read_holds_no_memory(error, tmp_path, monkeypatch):
    base, slabs = BaseModel(make_model("llama", attention=ATTENTION_NAME)), HostSlabs(pinned=False)
    ref = pack(save_adapter(tmp_path / "adapter", "llama", seed=0), base.layout, tmp_path / "pack")
    arena = SimpleNamespace(device=torch.device("cpu"))
    carrier = ArenaCarrier(base.layout, base.group_shapes, base.placer, arena, None, slabs)

    def fail(path, data_offset, into):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(arena_adapters, "read_data", fail)
        with pytest.raises(type(error)):
            carrier.read(ref)
    assert slabs.total_bytes > 0 and all(all(slab.is_free) for slab in slabs._slabs)
    host = carrier.read(ref)
    assert host.bytes > 0 and not all(all(slab.is_free) for slab in slabs._slabs)
    carrier.leave_host(host)

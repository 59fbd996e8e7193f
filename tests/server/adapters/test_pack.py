"""The pack's format: where tensors lie, what they hold, and that a damaged file is refused."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from server.adapters import pack
from server.adapters.pack import ALIGNMENT, load_pack, read_header, view_tensor, write_pack
from server.adapters.parts import DTYPES
from server.errors import AdapterRefused
from tests.server.adapters.layouts import HIDDEN, describe, llama, tied_llama, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Rank 3 in half precision gives rows that are no multiple of 64 bytes: padding between siblings would show.
    return train(llama(), tmp_path_factory.mktemp("pack") / "adapter", target_modules=ALL, r=3, rank_pattern={"k_proj": 1})


@pytest.mark.parametrize("dtype", DTYPES)
def test_siblings_a_are_one_matrix_and_everything_else_is_aligned(folder, tmp_path, dtype):
    layout = describe(llama(), dtype)
    header = write_pack(folder, layout, "h", tmp_path / "pack")
    _, data = load_pack(tmp_path / "pack")
    by_group = {}
    for packed in header.sites:
        assert packed.group == layout.sites[packed.site].group
        by_group.setdefault(packed.group, []).append(packed)
        assert packed.b.offset % ALIGNMENT == 0
    groups = [sites for group, sites in by_group.items() if group >= 0 and len(sites) > 1]
    assert len(groups) == 4  # q, k, v and gate, up of two layers
    for siblings in groups:
        assert siblings[0].a.offset % ALIGNMENT == 0
        ranks = [site.rank for site in siblings]
        matrix = view_tensor(data, type(siblings[0].a)(siblings[0].a.offset, [sum(ranks), HIDDEN]), dtype)
        parts = np.split(matrix, np.cumsum(ranks)[:-1])
        for site, part in zip(siblings, parts, strict=True):
            np.testing.assert_array_equal(part, view_tensor(data, site.a, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_holds_the_files_numbers(folder, tmp_path, dtype):
    layout = describe(llama(), dtype)
    header = write_pack(folder, layout, "h", tmp_path / "pack")
    _, data = load_pack(tmp_path / "pack")
    tensors = load_file(folder / "adapter_model.safetensors")
    for packed in header.sites:
        site = layout.sites[packed.site]
        names = ("lora_embedding_A", "lora_embedding_B") if site.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        a, b = (tensors[f"base_model.model.{site.name}.{name}"].astype(DTYPES[dtype]) for name in names)
        np.testing.assert_array_equal(view_tensor(data, packed.a, dtype), a.T if site.kind == "embedding" else a)
        np.testing.assert_array_equal(view_tensor(data, packed.b, dtype), b.T)
        assert packed.rank == b.shape[1] and packed.scale == 8 / packed.rank
    assert header.max_rank == 3 and header.dtype == dtype and DTYPES["bfloat16"] == ml_dtypes.bfloat16


def test_same_input_gives_the_same_bytes(folder, tmp_path):
    layout = describe(llama())
    for name in ("one", "two"):
        write_pack(folder, layout, "h", tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    header, data_offset = read_header(tmp_path / "one")
    assert data_offset % ALIGNMENT == 0 and header.hash == "h" and header.vocab_size == layout.vocab_size
    assert (tmp_path / "one").stat().st_size == data_offset + header.data_bytes + 32


def test_rows_of_a_tied_head_lie_there_once(tmp_path):
    train(tied_llama(), tmp_path / "adapter", trainable_token_indices=[1, 2])
    header = write_pack(tmp_path / "adapter", describe(tied_llama()), "h", tmp_path / "pack")
    assert [tokens.module for tokens in header.tokens] == ["model.embed_tokens", "lm_head"]
    assert header.tokens[0].rows == header.tokens[1].rows


def test_big_tensors_are_written_in_blocks(folder, tmp_path, monkeypatch):
    from server.adapters import parts

    write_pack(folder, describe(llama(), hashes=False), "h", tmp_path / "one")
    monkeypatch.setattr(parts, "BLOCK_BYTES", 100)
    write_pack(folder, describe(llama(), hashes=False), "h", tmp_path / "two")
    one, two = (load_pack(tmp_path / name)[1].view(np.float32) for name in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_nothing_is_left_when_writing_fails(folder, tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_pack(folder, describe(llama()), "h", tmp_path / "pack")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def good(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "pack"
    write_pack(folder, describe(llama()), "h", path)
    return path.read_bytes(), read_header(path)[1]


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 1 << 16), bit=st.integers(0, 7))
def test_any_flipped_bit_of_the_header_is_refused(good, tmp_path_factory, position, bit):
    raw, data_offset = good
    damaged = bytearray(raw)
    end = 48 + int.from_bytes(raw[12:16], "little")  # padding behind the header carries nothing
    damaged[position % end] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    with pytest.raises(AdapterRefused):
        read_header(path)


@settings(max_examples=100, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), extra=st.integers(0, 3))
def test_any_other_length_is_refused(good, tmp_path_factory, share, extra):
    raw, _ = good
    path = tmp_path_factory.getbasetemp() / "cut"
    path.write_bytes(raw + bytes(extra) if extra else raw[: int(share * len(raw))])
    with pytest.raises(AdapterRefused):
        read_header(path)
    with pytest.raises(AdapterRefused):
        load_pack(path)


@pytest.mark.parametrize("change", ["offset", "odd", "shape", "empty", "negative"])
def test_tensor_outside_the_data_is_refused_though_the_checksum_holds(folder, tmp_path, change):
    import msgspec

    path = tmp_path / "pack"
    header = write_pack(folder, describe(llama()), "h", path)
    data = path.read_bytes()[read_header(path)[1] :]
    tensor = header.sites[0].b
    changed = {
        "offset": {"offset": header.data_bytes},
        "odd": {"offset": tensor.offset + 1},
        "shape": {"shape": [1 << 60, 1 << 60]},
        "empty": {"shape": []},
        "negative": {"offset": -64},
    }[change]
    site = msgspec.structs.replace(header.sites[0], b=msgspec.structs.replace(tensor, **changed))
    path.write_bytes(pack._head_bytes(msgspec.structs.replace(header, sites=[site])) + data)
    with pytest.raises(AdapterRefused):
        read_header(path)


def test_missing_pack_and_folder_in_its_place_are_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(AdapterRefused):
            read_header(path)


def test_packing_needs_no_torch():
    script = "import sys, server.adapters.pack, server.adapters.merge; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_pack_is_readable_by_others(folder, tmp_path):
    write_pack(folder, describe(llama()), "h", tmp_path / "pack")
    assert os.stat(tmp_path / "pack").st_mode & 0o777 == 0o644

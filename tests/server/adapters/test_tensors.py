"""Weights files are untrusted: the header's rules hold, or the file is refused; nothing else is ever raised."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from server.adapters.pack import write_pack
from server.adapters.tensors import open_tensors
from server.errors import AdapterRefused
from tests.server.adapters.layouts import describe, llama, train
from tests.server.adapters.test_refusals import Q, change, refusal, zeros

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


@pytest.fixture
def folder(tmp_path):
    return train(llama(), tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int64, np.bool_, np.uint8])
def test_other_dtypes_are_refused_by_key(folder, dtype):
    change(folder, add={f"{Q}.lora_A.weight": zeros(4, 32).astype(dtype)})
    message = refusal(folder)
    assert f"{Q}.lora_A.weight" in message and "F32, F16, BF16" in message


def test_pickle_is_refused_by_name(folder):
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refusal(folder)
    torch.save({}, folder / "adapter_model.bin")
    assert "pickle ('adapter_model.bin')" in refusal(folder)


def test_weights_in_several_files_are_read_together(folder):
    path = folder / "adapter_model.safetensors"
    tensors = sorted(load_file(path).items())
    write_pack(folder, describe(llama()), "h", folder.parent / "one")
    path.unlink()
    save_file(dict(tensors[:1]), folder / "part-1.safetensors")
    save_file(dict(tensors[1:]), folder / "part-2.safetensors")
    write_pack(folder, describe(llama()), "h", folder.parent / "two")
    assert (folder.parent / "one").read_bytes() == (folder.parent / "two").read_bytes()
    save_file(dict(tensors), folder / "part-2.safetensors")
    with pytest.raises(AdapterRefused, match="is in two files"):
        write_pack(folder, describe(llama()), "h", folder.parent / "three")


def test_file_that_is_cut_off_while_it_is_read_is_refused(folder):
    with open_tensors(folder) as tensors:
        os.truncate(folder / "adapter_model.safetensors", 1000)
        with pytest.raises(AdapterRefused, match="was cut off while it was read"):
            for tensor in tensors.values():
                tensor.read()


def header_file(folder, header: bytes, data: bytes = b""):
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"x": 1},
        {"x": entry(extra=1)},
        {"x": entry(shape=[0], data_offsets=[0, 0])},
        {"x": entry(shape=[-2])},
        {"x": entry(shape=[2.0])},
        {"x": entry(shape=[True, 2])},
        {"x": entry(shape=[1 << 62, 4])},
        {"x": entry(dtype=None)},
        {"x": entry(dtype=["F32"])},
        {"x": entry(data_offsets=[0, 9])},
        {"x": entry(data_offsets=[4, 12])},
        {"x": entry(data_offsets=[8, 0])},
        {"x": entry(data_offsets=["0", 8])},
        {"x": entry(), "y": entry()},
        {"x": entry(shape=[1], data_offsets=[0, 4])},
        {"x": entry(), "__metadata__": {"a": 1}},
        {"x": entry(), "__metadata__": []},
    ],
)
def test_safetensors_header_that_breaks_the_format_is_refused(folder, header):
    header_file(folder, json.dumps(header).encode(), bytes(8))
    refusal(folder)


@pytest.mark.parametrize("raw", [b"", b" {}", b"{", b"\xff", b'{"x": 1, "x": 1}', b"[" * 50_000, b'{"x": NaN}'])
def test_safetensors_header_that_is_no_json_is_refused(folder, raw):
    header_file(folder, raw)
    refusal(folder)


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, 1500), position=st.integers(0, 700), bit=st.integers(0, 7))
def test_damaged_file_raises_nothing_but_refusals(tmp_path_factory, cut, position, bit):
    folder = tmp_path_factory.mktemp("damaged")
    good = bytearray(GOOD)
    good[position % len(good)] ^= 1 << bit
    (folder / "adapter_model.safetensors").write_bytes(good if cut % 2 else good[:cut])
    try:
        with open_tensors(folder) as tensors:
            assert len(tensors) <= 4 and all(tensor.read().shape == tensor.shape for tensor in tensors.values())
    except AdapterRefused as refused:
        assert str(folder) not in refused.message


def _good() -> bytes:
    names = ("lora_A.weight", "lora_B.weight")
    return save({f"{Q}.{name}": zeros(4, 8).astype(ml_dtypes.bfloat16) for name in names}, metadata={"format": "pt"})


GOOD = _good()

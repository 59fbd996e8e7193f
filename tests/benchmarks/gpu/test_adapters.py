"""Random adapters: PEFT's own format, each with weights of its own, made by several processes as by one."""

from dataclasses import replace

import pytest
from peft import LoraConfig
from safetensors.torch import load_file

from benchmarks.gpu import adapters
from benchmarks.gpu.adapters import write_adapters
from benchmarks.gpu.models import linears
from benchmarks.gpu.workloads import TINY
from server.sources.content import hash_adapter


def test_every_adapter_is_another_one_in_pefts_format(tmp_path):
    folders = write_adapters(tmp_path, "tiny", TINY.few)
    assert len({hash_adapter(folder) for folder in folders}) == TINY.few.count == len(folders)
    config = LoraConfig.from_pretrained(folders[0])
    assert (config.r, config.lora_alpha, len(config.target_modules)) == (4, 8, 7)
    tensors = load_file(folders[0] / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(linears("tiny", "all")) and all(tensor.abs().sum() > 0 for tensor in tensors.values())
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (64, 4)


@pytest.mark.slow
def test_several_processes_make_what_one_makes(tmp_path, monkeypatch):
    eight = replace(TINY.many, count=8)
    alone = write_adapters(tmp_path / "alone", "tiny", eight)
    monkeypatch.setattr(adapters.os, "cpu_count", lambda: 3)
    together = write_adapters(tmp_path / "together", "tiny", eight)
    assert [hash_adapter(folder) for folder in alone] == [hash_adapter(folder) for folder in together]


def test_what_is_there_is_not_made_again_and_half_of_one_is(tmp_path):
    folders = write_adapters(tmp_path, "tiny", TINY.few)
    weights = folders[0] / "adapter_model.safetensors"
    (folders[1] / "adapter_config.json").unlink()
    before = [weights.stat().st_mtime_ns, hash_adapter(folders[2])]
    assert write_adapters(tmp_path, "tiny", replace(TINY.few, count=4))[:3] == folders
    assert [weights.stat().st_mtime_ns, hash_adapter(folders[2])] == before
    assert (folders[1] / "adapter_config.json").exists()

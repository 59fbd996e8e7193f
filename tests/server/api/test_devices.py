"""Which devices the engines get, and what of the host each may take."""

import pytest

from server.api.app import options_of_each
from server.api.devices import count_gpus, engine_devices
from server.types import EngineOptions


@pytest.mark.parametrize(
    "environment, folders, count",
    [({}, 4, 4), ({}, 0, 0), ({"CUDA_VISIBLE_DEVICES": "0,2"}, 4, 2), ({"CUDA_VISIBLE_DEVICES": ""}, 4, 0)]
    + [({"CUDA_VISIBLE_DEVICES": "1,-1,2"}, 4, 1), ({"CUDA_VISIBLE_DEVICES": "GPU-1a,GPU-2b"}, 2, 2)]
    + [({"CUDA_VISIBLE_DEVICES": "0,4,1"}, 4, 1)],
)
def test_gpus_are_counted_without_torch(environment, folders, count, tmp_path):
    for index in range(folders):
        (tmp_path / f"0000:0{index}:00.0").mkdir()
    assert count_gpus(environment, tmp_path) == count
    assert count_gpus({}, tmp_path / "none") == 0 and count_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path / "none") == 2


def test_each_engine_has_its_device():
    assert engine_devices("auto", None, 0) == ["auto"] and engine_devices("auto", None, 1) == ["auto"]
    assert engine_devices("auto", None, 4) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert engine_devices("cuda", 2, 4) == ["cuda:0", "cuda:1"] and engine_devices("cpu", 2, 4) == ["cpu", "cpu"]
    assert engine_devices("cuda", None, 0) == ["cuda"] and engine_devices("auto", 2, 0) == ["cpu", "cpu"]
    assert engine_devices("cuda:1", None, 4) == ["cuda:1"] and engine_devices("auto", 1, 4) == ["auto"]
    with pytest.raises(ValueError, match="no GPU was found"):
        engine_devices("cuda", 2, 0)
    with pytest.raises(ValueError, match="num_engines 5: there are 4 GPUs"):
        engine_devices("auto", 5, 4)
    with pytest.raises(ValueError, match="several engines need device auto"):
        engine_devices("cuda:1", 2, 4)


def test_the_host_is_divided_among_the_engines():
    options = EngineOptions(model_dir="x", adapter_host_bytes=100)
    assert options_of_each(options, None, 0) == [options] == options_of_each(options, None, 1)
    each = options_of_each(options, None, 4)
    assert [(one.device, one.adapter_host_bytes) for one in each] == [(f"cuda:{index}", 25) for index in range(4)]
    assert all(one.num_threads >= 1 for one in each)
    auto = options_of_each(EngineOptions(model_dir="x", num_threads=3), 2, 4)
    assert all(one.num_threads == 3 and one.adapter_host_bytes > 0 for one in auto)

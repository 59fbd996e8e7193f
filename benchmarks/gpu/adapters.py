"""Random adapters: PEFT folders that every engine reads, packs of them for ours, and their registration in a server's store.

Every adapter has weights of its own (our engine goes by content and would fold copies). Work that is much is spread over processes; what is
there already is not made again. Called by the parts before anything is timed.
"""

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.gpu.models import MODULES, linears
from benchmarks.gpu.workloads import AdapterSet

Item = TypeVar("Item")
Result = TypeVar("Result")

_MIN_SHARE = 4  # items that are worth a process
_MAX_PROCESSES = 12
_SETTLED_S = 2.5  # the store remembers no folder that was written to a moment ago (server.sources.content.SETTLE_S)


def write_adapters(root: Path, model: str, adapters: AdapterSet) -> list[Path]:
    """The set's PEFT folders below `root`, in order."""
    folders = [root / "adapters" / adapters.id(model, index) for index in range(adapters.count)]
    folders[0].parent.mkdir(parents=True, exist_ok=True)
    missing = [(index, str(folder)) for index, folder in enumerate(folders) if not (folder / "adapter_config.json").exists()]
    _spread(partial(_write_adapter, model, adapters.rank, adapters.modules), missing)
    return folders


def pack_adapters(folders: Sequence[Path], layout: bytes, into: Path) -> list[tuple[str, Path]]:
    """(content hash, pack) of each folder, for the base that `layout` describes (server.types.BaseLayout as msgpack)."""
    into.mkdir(parents=True, exist_ok=True)
    packed = _spread(partial(_pack_adapter, layout, str(into)), [str(folder) for folder in folders])
    return [(hash, Path(path)) for hash, path in packed]


def register_adapters(ids: Sequence[str], changed_at: float, layout: bytes, model_dir: Path, adapters_dir: Path, store_dir: Path) -> None:
    """Put the adapters' packs into the store of a server of `adapters_dir`, by the server's own code. `changed_at`: when the last of their
    files was written (seconds since the epoch)."""
    time.sleep(max(0.0, changed_at + _SETTLED_S - time.time()))
    _spread(partial(_register_adapter, layout, model_dir, adapters_dir, store_dir), ids)


def _spread(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`work` on every item, in processes if there is much to do."""
    num_processes = min((os.cpu_count() or 1) - 1, _MAX_PROCESSES, len(items) // _MIN_SHARE)
    if num_processes < 2:
        return [work(item) for item in items]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=_use_one_thread) as pool:
        return list(pool.map(work, items, chunksize=max(1, len(items) // (4 * num_processes))))


def _use_one_thread() -> None:
    """In a process of the pool, before it imports torch: the processes share the cores already."""
    os.environ["OMP_NUM_THREADS"] = "1"


def _write_adapter(model: str, rank: int, modules: str, item: tuple[int, str]) -> None:
    from safetensors.numpy import save_file

    index, path = item
    folder = Path(path)
    folder.mkdir(exist_ok=True)
    pool, places = _random_pool(), random.Random(rank * 1_000_003 + index)

    def factor(rows: int, columns: int) -> Any:
        at = places.randrange(len(pool) - rows * columns)
        return pool[at : at + rows * columns].reshape(rows, columns)

    tensors = {}
    for name, num_in, num_out in linears(model, modules):
        tensors[f"base_model.model.{name}.lora_A.weight"] = factor(rank, num_in)
        tensors[f"base_model.model.{name}.lora_B.weight"] = factor(num_out, rank)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": MODULES[modules],
        "base_model_name_or_path": model,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))  # last: a folder that has it is whole


@cache
def _random_pool() -> Any:
    """Random numbers that every adapter's factors are cut from, each at places of its own: drawing them all anew takes minutes, and torch,
    which could, takes each process ten seconds to import. bfloat16 [16 Mi]."""
    import ml_dtypes
    import numpy as np

    return (np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32) * np.float32(0.01)).astype(ml_dtypes.bfloat16)


def _pack_adapter(layout: bytes, into: str, path: str) -> tuple[str, str]:
    import msgspec

    from server.adapters.pack import write_pack
    from server.sources.content import hash_adapter
    from server.types import BaseLayout

    folder, base = Path(path), msgspec.msgpack.decode(layout, type=BaseLayout)
    hash = hash_adapter(folder)
    out = Path(into) / f"{hash}-{base.fingerprint}.pack"
    if not out.exists():
        write_pack(folder, base, hash, out)
    return hash, str(out)


def _register_adapter(layout: bytes, model_dir: Path, adapters_dir: Path, store_dir: Path, id: str) -> None:
    import msgspec

    from server.api.selection import AdapterSelection
    from server.types import BaseLayout

    source, packer = _packer(model_dir, adapters_dir, store_dir)
    packer.make(source, AdapterSelection("local", id), [source.snapshot(id)], msgspec.msgpack.decode(layout, type=BaseLayout))


@cache
def _packer(model_dir: Path, adapters_dir: Path, store_dir: Path) -> tuple[Any, Any]:
    """The server's source and packer, one of each a process."""
    from server.api.adapter_tokenizers import AdapterTokenizers
    from server.api.packing import AdapterPacker
    from server.api.text.tokenizer import load_tokenizer
    from server.sources import SourceOptions, Sources, Store

    store = Store(store_dir)
    packer = AdapterPacker(store, AdapterTokenizers(load_tokenizer(model_dir), store), max_merged_rank=256)
    return Sources(SourceOptions(adapters_dir=adapters_dir)).get("local"), packer

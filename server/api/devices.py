"""Which GPUs there are, without torch: one engine is started for each. `__main__` counts, api.app divides."""

from collections.abc import Mapping
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/gpus")  # one folder a GPU


def count_gpus(environment: Mapping[str, str], driver: Path = DRIVER) -> int:
    """GPUs that a process of ours would see: CUDA_VISIBLE_DEVICES if it is set (CUDA's rule: up to the first entry that is none), else what
    NVIDIA's driver lists."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return sum(1 for _ in driver.iterdir()) if driver.is_dir() else 0
    count = 0
    for entry in visible.split(","):
        if not entry.strip() or entry.strip().startswith("-"):
            break
        count += 1
    return count


def engine_devices(device: str, num_engines: int | None, num_gpus: int) -> list[str]:
    """The device of each engine. ValueError names the setting that cannot be met."""
    if device not in ("auto", "cuda"):  # one that was named
        if device.startswith("cuda") and (num_engines or 1) > 1:
            raise ValueError(f"num_engines {num_engines} with device {device}: several engines need device auto or cuda")
        return [device] * (num_engines or 1)
    if num_gpus == 0:
        return [device] * (num_engines or 1)
    if (num_engines or 1) > num_gpus:
        raise ValueError(f"num_engines {num_engines}: there are {num_gpus} GPUs")
    count = num_engines or num_gpus
    return [device] if count == 1 else [f"cuda:{index}" for index in range(count)]

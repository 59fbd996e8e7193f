"""Which GPUs there are, without torch: one engine is started for each. `__main__` counts, api.app divides."""

from collections.abc import Mapping
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/gpus")  # one folder a GPU; a container sees those that it was given


def count_gpus(environment: Mapping[str, str], driver: Path = DRIVER) -> int:
    """GPUs that a process of ours would see: what NVIDIA's driver lists, or of these the entries of CUDA_VISIBLE_DEVICES, up to the first
    that is none (CUDA's rule). Without the driver's list (WSL) CUDA_VISIBLE_DEVICES is believed."""
    present = sum(1 for _ in driver.iterdir()) if driver.is_dir() else None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present or 0
    count = 0
    for entry in (entry.strip() for entry in visible.split(",")):
        if not entry or entry.startswith("-") or (present is not None and entry.isdecimal() and int(entry) >= present):
            break
        count += 1
    return count


def engine_devices(device: str, num_engines: int | None, num_gpus: int) -> list[str]:
    """The device of each engine. ValueError names the setting that cannot be met."""
    wanted = num_engines or 1
    if device.startswith("cuda:") and wanted > 1:
        raise ValueError(f"num_engines {wanted} with device {device}: several engines need device auto or cuda")
    if device not in ("auto", "cuda"):  # one that was named
        return [device] * wanted
    if num_gpus == 0 and wanted > 1:  # none was found: two engines that each look for themselves could find the same one
        if device == "cuda":
            raise ValueError(f"num_engines {wanted} with device cuda: no GPU was found; CUDA_VISIBLE_DEVICES can name them")
        return ["cpu"] * wanted
    if wanted > max(num_gpus, 1):
        raise ValueError(f"num_engines {wanted}: there are {num_gpus} GPUs")
    count = num_engines or max(num_gpus, 1)
    return [device] if count == 1 else [f"cuda:{index}" for index in range(count)]

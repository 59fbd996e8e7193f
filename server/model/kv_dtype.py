"""What keys and values are kept in: the model's type, or e4m3 (OCP's 8-bit float, arXiv 2209.05433) without a scale.

Owns what the option's names mean, which cards can, and how torch's operators write and read such a cache. The GPU's own write is
kernels.cache. A number beyond +-448, e4m3's greatest, is kept as that; NaN stays NaN; the rest is rounded to the nearest, ties to even.
"""

import torch

FP8 = torch.float8_e4m3fn
MOST = torch.finfo(FP8).max  # 448
LEAST_CARD = (8, 9)  # compute capability from which on a GPU converts e4m3 itself: L4, L40S, H100


def dtype_of(option: str, model_dtype: torch.dtype) -> torch.dtype:
    """What EngineOptions.kv_cache_dtype means for a model that computes in `model_dtype`. ValueError if there is no such name."""
    if option not in ("auto", "fp8"):
        raise ValueError(f"kv_cache_dtype must be auto or fp8. Given: '{option}'")
    return FP8 if option == "fp8" else model_dtype


def check_card(kv_dtype: torch.dtype, device: torch.device) -> None:
    """ValueError if this GPU is too old for such a cache."""
    if kv_dtype == FP8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CARD:
        need, have = (".".join(map(str, card)) for card in (LEAST_CARD, torch.cuda.get_device_capability(device)))
        raise ValueError(f"kv_cache_dtype 'fp8' needs a GPU of compute capability {need} or above; this one has {have}")


def stored(rows: torch.Tensor, kv_dtype: torch.dtype) -> torch.Tensor:
    """Keys or values as a cache of `kv_dtype` keeps them, in the type of `movable`."""
    # Without the clamp it depends on torch's version and device whether what is too large becomes 448 or NaN.
    return rows.clamp(-MOST, MOST).to(FP8).view(torch.uint8) if kv_dtype == FP8 else rows


def movable(cache: torch.Tensor) -> torch.Tensor:
    """The same memory in a type that torch's index operators take: e4m3 as bytes."""
    return cache.view(torch.uint8) if cache.dtype == FP8 else cache

"""What a failure means: for the device, for the request that it ends, for its caller."""

import traceback

from server.errors import GenerationFailed, ServerError
from server.types import SequenceOutput


def is_fatal(error: Exception) -> bool:
    """Whether the device itself is lost (a CUDA error leaves its context unusable), so that no other request could run either."""
    import torch  # here, since the scheduler needs none of it

    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


def is_out_of_memory(error: Exception) -> bool:
    """Whether less work at a time might have found room."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError)


def let_go(error: Exception) -> None:
    """Free what the frames that failed still hold: a step's tensors would be in the way of the steps that are tried instead."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__


def failure(request_id: str, error: Exception) -> SequenceOutput:
    """The last output of a request that ends with `error`; what is no ServerError is not told beyond its class."""
    if isinstance(error, ServerError):
        output = SequenceOutput(request_id, finish_reason="error", error=error.message, error_kind=type(error).__name__)
        output.error_param, output.retry_after_s = error.param, error.retry_after_s
        return output
    said = f"the adapter could not be loaded ({type(error).__name__})"
    return SequenceOutput(request_id, finish_reason="error", error=said, error_kind="GenerationFailed")


def cannot_be_pinned(error: Exception) -> Exception:
    """What the caller is told of an adapter that cannot be used."""
    if isinstance(error, GenerationFailed):
        return error
    return GenerationFailed(f"the adapter could not be put on the device ({type(error).__name__})")

"""What the engine's last word on a request means to its caller. api.engine calls it; knows neither HTTP nor processes."""

import server.errors
from server.errors import GenerationFailed, ServerError, Unavailable
from server.types import SequenceOutput


def unless_failed(output: SequenceOutput | ServerError) -> SequenceOutput:
    """The output, or its error raised."""
    if isinstance(output, ServerError):
        raise output
    if output.finish_reason == "aborted":
        raise Unavailable("the request was ended because the engine is stopping", retry_after_s=1.0)
    if output.finish_reason == "error":
        kind = getattr(server.errors, output.error_kind or "", GenerationFailed)
        known = isinstance(kind, type) and issubclass(kind, ServerError)
        again = {} if output.retry_after_s is None else {"retry_after_s": output.retry_after_s}
        raise (kind if known else GenerationFailed)(output.error or "unknown error", param=output.error_param, **again)
    return output

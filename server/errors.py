"""Every error that crosses a boundary of the server: its HTTP status, its type in LoRAX's vocabulary, and a message for the caller.

Owns the vocabulary alone; it does not know who raises or who renders. A message never carries a path of this machine, a token or a prompt.
"""

SHUTTING_DOWN = "the server is shutting down"  # of the 503s of a drain; the instance's agent knows it by them


class ServerError(Exception):
    """An error that the caller is told about. `status` is HTTP's, `error_type` is LoRAX's (`{"error": ..., "error_type": ...}`)."""

    status = 500
    error_type = "internal"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param  # the request's field that is at fault, where there is one
        self.code: str | None = None  # OpenAI's name of the fault, where its clients look for one
        self.retry_after_s = retry_after_s
        self.headers: dict[str, str] = {}  # what a response says beside it


class ValidationFailed(ServerError):
    """The request is wrong; the message names the field and what is allowed."""

    status = 422
    error_type = "validation"


class BodyUnreadable(ServerError):
    """The body never became a request."""


class BodyMismatch(ValidationFailed, BodyUnreadable):
    """The body is JSON and no request: a field is missing, unknown or of another type."""


class MalformedBody(BodyUnreadable):
    """The body is not JSON."""

    status = 400
    error_type = "validation"


class BodyTooLarge(BodyUnreadable):
    """The body is longer than the server reads."""

    status = 413
    error_type = "validation"


class WrongMediaType(BodyUnreadable):
    """The body is not said to be JSON."""

    status = 415
    error_type = "validation"


class TemplateFailed(ServerError):
    """A chat template refused the messages, or there is none."""

    status = 422
    error_type = "template_error"


class AdapterNotFound(ServerError):
    """No adapter under that id in that source (or not for this caller: the same words for both)."""

    status = 424
    error_type = "generation"


class AdapterRefused(ServerError):
    """The adapter exists but cannot be applied exactly; the message names the key or field and the reason."""

    status = 424
    error_type = "generation"


class SourceUnavailable(ServerError):
    """The source did not answer, or denied us; the next request tries again."""

    status = 424
    error_type = "generation"


class GenerationFailed(ServerError):
    """The engine failed this request alone."""

    status = 424
    error_type = "generation"


class IncompleteGeneration(ServerError):
    """The engine ended a request without saying why: a fault of ours."""

    status = 500
    error_type = "incomplete_generation"


class Overloaded(ServerError):
    """The queue is full; try again after `retry_after_s`."""

    status = 429
    error_type = "overloaded"

    def __init__(self, message: str = "Model is overloaded", *, retry_after_s: float = 1.0, param: str | None = None) -> None:
        super().__init__(message, param=param, retry_after_s=retry_after_s)


class LimitReached(Overloaded):
    """A tenant or an adapter has as much as it may; the message names the limit."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0, param: str | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s, param=param)
        self.code = "rate_limit_exceeded"


class Unavailable(ServerError):
    """The engine is starting, gone or draining."""

    status = 503
    error_type = "unavailable"


class Unauthorized(ServerError):
    """The caller did not show a key that is known here."""

    status = 401
    error_type = "unauthorized"


class Forbidden(ServerError):
    """The caller may not do this, or nobody may on this server."""

    status = 403
    error_type = "forbidden"


class Conflict(ServerError):
    """What is there already stands against it; the message says what would help."""

    status = 409
    error_type = "conflict"

"""The life of one request in numbers: metrics, one log line, LoRAX's timing headers. Never prompts, tokens or secrets.

Owns the request's id and its moments. Each generating route makes one Record and tells it how things go.
"""

import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from server.api.adapters import AdapterSelection, ResolvedAdapter
from server.api.body import ClientGone
from server.api.generation import Generation
from server.api.selection import AdapterTier
from server.api.tenants.limits import Lease
from server.errors import (
    AdapterNotFound,
    AdapterRefused,
    IncompleteGeneration,
    Overloaded,
    ServerError,
    SourceUnavailable,
    TemplateFailed,
    Unavailable,
)
from server.metrics import Metrics

log = logging.getLogger("server.api.request")

_CAUSES: tuple[tuple[type[ServerError], str], ...] = (
    (Overloaded, "overloaded"),
    (Unavailable, "unavailable"),
    (TemplateFailed, "template"),
    (IncompleteGeneration, "incomplete"),
    (AdapterNotFound, "download_adapter"),
    (AdapterRefused, "download_adapter"),
    (SourceUnavailable, "download_adapter"),
)


# The caller's trace context, W3C's headers; set before the route runs, if traces are made at all.
TRACE_PARENT: ContextVar[Mapping[str, str] | None] = ContextVar("trace parent", default=None)


class Record:
    """One request from arrival to its last byte; ends exactly once. `status` and `outcome` say how, once it has."""

    def __init__(self, metrics: Metrics, route: str, model_name: str, tenant: str = "") -> None:
        self.id = uuid.uuid4().hex
        self.route, self.model_name, self.tenant = route, model_name, tenant
        self.status, self.outcome = 0, ""
        self.adapter_tier: AdapterTier | None = None  # where its adapter was found; None: the base, or not known yet
        self.trace_parent = TRACE_PARENT.get() or {}
        self.arrived_at = time.monotonic()
        self.submitted_at: float | None = None
        self._metrics = metrics
        self.lease: Lease | None = None  # of its tenant's limits
        self._selection: AdapterSelection | None = None
        self._generation: Generation | None = None
        self._num_prompt_chars = 0
        self._ended = False
        metrics.request_count.inc()
        metrics.underway[self.id] = self

    @property
    def adapter(self) -> str | None:
        """The id of its adapter; None: the base, several merged, or not known yet."""
        return self._selection.adapter_id or None if self._selection is not None else None

    @property
    def state(self) -> Literal["preparing", "waiting", "running"]:
        """What it is waiting for."""
        if self._generation is None:
            return "preparing"
        has_begun = any(sequence.first_token_at is not None for sequence in self._generation.sequences)
        return "running" if has_begun else "waiting"

    @property
    def num_prompt_tokens(self) -> int:
        """0 before it is tokenized."""
        return self._generation.num_prompt_tokens if self._generation is not None else 0

    @property
    def num_generated_tokens(self) -> int:
        """Of all its sequences, so far."""
        return self._generation.num_generated_tokens if self._generation is not None else 0

    def phases(self, now: float) -> list[tuple[str, float, float]]:
        """What it waited for until `now`: (name, start, end), monotonic seconds."""
        if self._generation is None or self.submitted_at is None:
            return [("prepare", self.arrived_at, now)]
        begun_at = min(now, self.submitted_at + max((one.queued_s for one in self._generation.sequences), default=0.0))
        return [("prepare", self.arrived_at, self.submitted_at), ("queue", self.submitted_at, begun_at), ("generate", begun_at, now)]

    def chose(self, selection: AdapterSelection | None) -> None:
        """The request names this adapter."""
        self._selection = selection

    @property
    def is_waiting(self) -> bool:
        """It has no token yet."""
        return self.state != "running"

    @property
    def num_used_tokens(self) -> int:
        """Read and generated so far."""
        return self.num_prompt_tokens + self.num_generated_tokens

    def found(self, adapter: ResolvedAdapter | None) -> None:
        """Its adapter is at hand."""
        self.adapter_tier = adapter.tier if adapter is not None else None

    def submitted(self, generation: Generation, num_prompt_chars: int) -> None:
        """Checked, tokenized, on its way to the engine. LimitReached if its tokens are too many now."""
        if self.lease is not None:
            self.lease.take(generation.plan.max_tokens)
        self._generation, self._num_prompt_chars = generation, num_prompt_chars
        self.submitted_at = time.monotonic()
        self._metrics.validation_duration.observe(self.submitted_at - self.arrived_at)
        self._metrics.input_length.observe(generation.num_prompt_tokens)
        self._metrics.max_new_tokens.observe(max(generation.plan.max_new_tokens))

    def succeeded(self) -> None:
        """Answered in full."""
        if self._ended or self._generation is None:
            return
        metrics, times = self._metrics, self._times()
        metrics.request_success.inc()
        metrics.queue_duration.observe(times["queue"])
        metrics.inference_duration.observe(times["inference"])
        metrics.time_per_token.observe(times["per_output_token"])
        metrics.time_to_first_token.observe(times["first_token"])
        metrics.generated_tokens.observe(self._generation.num_generated_tokens)
        if self._selection is not None:
            metrics.adapters.succeeded(
                *self._labels(self._selection), num_tokens=self._generation.num_generated_tokens,
                first_token_s=times["first_token"], duration_s=times["total"],
            )  # fmt: skip
        reasons = ",".join(sorted({sequence.finish_reason or "none" for sequence in self._generation.sequences}))
        self._end(200, f"finish={reasons}")

    def failed(self, error: BaseException) -> None:
        """Ended by `error`; anything but a ServerError is a fault of ours and is logged with its traceback."""
        if self._ended:
            return
        if self._selection is not None:
            self._metrics.adapters.failed(*self._labels(self._selection))
        if isinstance(error, ServerError):
            cause = next((cause for kind, cause in _CAUSES if isinstance(error, kind)), None)
            self._metrics.failed(cause or (error.error_type if error.error_type in ("validation", "generation") else "internal"))
            self._end(error.status, f"error={type(error).__name__}")
        elif isinstance(error, Exception) and not isinstance(error, ClientGone):
            self._metrics.failed("internal")
            log.error("request %s failed", self.id, exc_info=error)
            self._end(500, f"error={type(error).__name__}")
        else:  # the client is gone, or we are shutting down
            self._metrics.failed("dropped")
            self._end(499, "dropped")

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Whatever the block raises has ended the request."""
        try:
            yield
        except BaseException as error:
            self.failed(error)
            raise

    @staticmethod
    def _labels(selection: AdapterSelection) -> tuple[str, str]:
        return selection.adapter_id or "_merged", selection.source

    def _end(self, status: int, outcome: str) -> None:
        self._ended, self.status, self.outcome = True, status, outcome
        self._metrics.underway.pop(self.id, None)
        total_s = time.monotonic() - self.arrived_at
        self._metrics.request_duration.observe(total_s)
        self._metrics.on_end(self)
        log.info(
            "%s %s status=%d %s%s adapter=%s prompt_tokens=%d generated_tokens=%d total_ms=%d", self.route, self.id, status, outcome,
            f" tenant={self.tenant}" if self.tenant else "",
            _ascii(",".join(self._selection.ids)) if self._selection is not None else "-",
            self.num_prompt_tokens, self.num_generated_tokens, total_s * 1000,
        )  # fmt: skip

    def _times(self) -> dict[str, float]:
        """Seconds by phase; of several sequences the slowest counts."""
        generation = self._generation
        assert generation is not None and self.submitted_at is not None
        now = time.monotonic()
        first_at = min((s.first_token_at for s in generation.sequences if s.first_token_at is not None), default=now)
        end_at = max((s.finished_at for s in generation.sequences if s.finished_at is not None), default=now)
        queue = max((s.queued_s for s in generation.sequences), default=0.0)
        num = max((len(s.tokens) for s in generation.sequences), default=0)
        return {
            "total": now - self.arrived_at,
            "validation": self.submitted_at - self.arrived_at,
            "queue": queue,
            "inference": max(0.0, end_at - self.submitted_at - queue),
            "first_token": first_at - self.arrived_at,
            "per_output_token": (end_at - first_at) / (num - 1) if num > 1 else 0.0,
        }

    def headers(self, compute_type: str) -> Mapping[str, str]:
        """LoRAX's response headers of a finished generation; times in whole milliseconds."""
        generation, times = self._generation, self._times()
        assert generation is not None
        num_tokens = max(1, generation.num_generated_tokens)
        return {
            **self.stream_headers(compute_type),
            "x-compute-time": _ms(times["total"]),
            "x-total-time": _ms(times["total"]),
            "x-prompt-tokens": str(generation.num_prompt_tokens),
            "x-generated-tokens": str(generation.num_generated_tokens),
            "x-skipped-tokens": "0",
            "x-total-tokens": str(generation.num_prompt_tokens + generation.num_generated_tokens),
            "x-validation-time": _ms(times["validation"]),
            "x-queue-time": _ms(times["queue"]),
            "x-inference-time": _ms(times["inference"]),
            "x-time-per-token": _ms(times["inference"] / num_tokens),
            "x-time-to-first-token": _ms(times["first_token"]),
            "x-time-per-output-token": _ms(times["per_output_token"]),
        }

    def stream_headers(self, compute_type: str) -> dict[str, str]:
        """Those that are known before the first token."""
        headers = {
            "x-compute-type": compute_type,
            "x-compute-characters": str(self._num_prompt_chars),
            "x-model-id": _ascii(self.model_name),
            "x-request-id": self.id,
        }
        if self.lease is not None:
            headers |= self.lease.headers()
        if self._selection is not None:
            headers |= {"x-adapter-id": _ascii(",".join(self._selection.shown_ids)), "x-adapter-source": self._selection.source}
        if self.adapter_tier is not None:
            headers["x-adapter-tier"] = self.adapter_tier
        return headers


def _ms(seconds: float) -> str:
    return str(int(seconds * 1000))


def _ascii(text: str) -> str:
    """Header values are latin-1 without control characters; everything else is spelled out."""
    return "".join(c if " " <= c <= "~" else f"%{c.encode().hex()}" for c in text)

"""OpenTelemetry traces over OTLP/HTTP, off unless otlp-endpoint is set: a span a request, with what it waited for as its children.

Owns the exporter and its thread. Spans are made when a request has ended, from the moments that its Record kept, so that a request itself
does nothing for them. They carry names, counts and times, never prompts, answers or tokens. api.app makes one `Traces`; metrics.on_end
calls it. The packages are the extra `tracing`.
"""

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from server import __version__
from server.api.record import TRACE_PARENT, Record

log = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 3.0
_EXPORT_TIMEOUT_S = 5.0
_EXPORT_EVERY_MS = 1000
_HEADERS = ("traceparent", "tracestate")  # W3C Trace Context


class TraceParent:
    """Keeps the caller's trace context for the Record that the route makes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            TRACE_PARENT.set({name: headers[name] for name in _HEADERS if name in headers})
        await self._app(scope, receive, send)


class Traces:
    """Sends the spans of ended requests to a collector, in the background. ValueError, naming the setting, without the packages."""

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
        except ImportError:
            raise ValueError("--otlp-endpoint needs the extra `tracing`: pip install 'manylora[tracing]'") from None
        url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
        resource = Resource({"service.name": "manylora", "service.version": __version__})
        # Given here, so that OTEL_* variables decide nothing of it; they may still hold the collector's headers and certificates.
        self._provider = TracerProvider(sampler=ParentBased(ALWAYS_ON), resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=url, timeout=_EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_EVERY_MS))
        self._tracer = self._provider.get_tracer("manylora", __version__)

    def __call__(self, record: Record) -> None:
        """The request of this record has ended."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        now, wall = time.monotonic(), time.time_ns()

        def at(moment: float) -> int:
            return wall - int((now - moment) * 1e9)

        context = TraceContextTextMapPropagator().extract(record.trace_parent)
        span = self._tracer.start_span(
            f"POST {record.route}", context, SpanKind.SERVER, _attributes(record), start_time=at(record.arrived_at)
        )
        if record.status >= 500 or record.status == 424:
            span.set_status(Status(StatusCode.ERROR, record.outcome))
        children = set_span_in_context(span)
        for name, start, end in record.phases(now):
            self._tracer.start_span(name, children, start_time=at(start)).end(at(end))
        span.end(wall)

    async def close(self) -> None:
        """Send what is left, as far as a few seconds take."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await asyncio.to_thread(self._provider.shutdown)


def _attributes(record: Record) -> dict[str, Any]:
    """Names of OpenTelemetry's semantic conventions where they have one."""
    values = {
        "http.request.method": "POST",
        "http.route": record.route,
        "http.response.status_code": record.status,
        "gen_ai.request.model": record.model_name,
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": record.num_generated_tokens,
        "manylora.request_id": record.id,
        "manylora.tenant": record.tenant or None,
        "manylora.adapter": record.adapter,
        "manylora.outcome": record.outcome,
    }
    return {name: value for name, value in values.items() if value is not None}

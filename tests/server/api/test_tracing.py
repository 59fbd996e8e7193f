"""Traces over OTLP: what a collector gets, that a caller's trace goes on, and that an absent collector disturbs nobody."""

import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.server.api.live import LiveServer, live_server, wait_for
from tests.server.api.test_adapters import write_adapter

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """A collector of spans on 127.0.0.1."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []
        self.paths: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
                collector.paths.add(self.path)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.resources.append({one.key: one.value.string_value for one in resource.resource.attributes})
                    for scope in resource.scope_spans:
                        collector.spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, collector: Collector) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("traced")
    write_adapter(folder / "adapters" / "mine")
    with live_server(folder, model_dir, otlp_endpoint=collector.url) as server:
        yield server


def attributes(span: Span) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def test_a_request_is_a_span_of_the_callers_trace(traced: LiveServer, collector: Collector) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    body = {"inputs": "a secret", "parameters": {"max_new_tokens": 3, "adapter_id": "mine", "api_token": "hf_token"}}
    started_ns = time.time_ns()
    answer = traced.client.post("/generate", json=body, headers=headers)
    (span,) = wait_for(lambda: collector.named("POST /generate"))
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.kind) == (TRACE_ID, PARENT_ID, Span.SPAN_KIND_SERVER)
    assert started_ns - 10**9 < span.start_time_unix_nano < span.end_time_unix_nano < time.time_ns()
    shown = attributes(span)
    assert shown["manylora.adapter"] == "mine" and shown["gen_ai.request.model"] == "base" and shown["http.response.status_code"] == 200
    assert (shown["gen_ai.usage.input_tokens"], shown["gen_ai.usage.output_tokens"]) == (2, 3)
    assert shown["manylora.request_id"] == answer.headers["x-request-id"]
    children = [one for one in collector.spans if one.parent_span_id == span.span_id]
    assert sorted(one.name for one in children) == ["generate", "prepare", "queue"]
    assert all(span.start_time_unix_nano <= one.start_time_unix_nano <= one.end_time_unix_nano for one in children)
    assert "secret" not in str(collector.spans) and "hf_token" not in str(collector.spans)
    assert collector.paths == {"/v1/traces"} and collector.resources[0]["service.name"] == "manylora"


def test_failures_and_refusals_are_told_apart(traced: LiveServer, collector: Collector) -> None:
    traced.post("/", {"inputs": ""})
    traced.post("/generate_stream", {"inputs": "a", "parameters": {"adapter_id": "nobody"}})
    (refused,) = wait_for(lambda: collector.named("POST /"))
    (failed,) = wait_for(lambda: collector.named("POST /generate_stream"))
    assert refused.status.code == 0 and attributes(refused)["http.response.status_code"] == 422
    assert failed.status.code == 2 and attributes(failed)["manylora.outcome"] == "error=AdapterNotFound"
    assert len(refused.parent_span_id) == 0


def test_an_absent_collector_disturbs_nobody(tmp_path: Path, model_dir: Path) -> None:
    with live_server(tmp_path, model_dir, otlp_endpoint="http://127.0.0.1:9") as server:
        assert server.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}}).status_code == 200
        started_at = time.monotonic()
    assert time.monotonic() - started_at < 15


def test_none_are_made_unless_they_are_asked_for(live: LiveServer) -> None:
    assert live.api.traces is None

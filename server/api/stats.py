"""GET /v1/stats: what this server does now, as one small document for a page that asks each second. For whoever shows the admin key.

Owns the document's shape. The numbers are those of /metrics, which scrapers read; what grows is a total, and the reader makes rates of it.
"""

import time
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from server.api.admin import AdminApi, admin_responses
from server.api.engines import Engines
from server.api.schemas_common import ResponseModel
from server.api.schemas_openai import OpenAIError
from server.api.state import Api
from server.api.stream import json_response
from server.metrics import load_ratio

router = APIRouter(tags=["server"])


class EngineLine(ResponseModel):
    """One engine."""

    device: str
    unhealthy: str | None = Field(description="Why it does not serve; null: it does.")


class Queue(ResponseModel):
    """Requests that have not ended."""

    preparing: int = Field(description="Checked, their adapters fetched, tokenized.")
    waiting: int = Field(description="With the engine, without a token yet.")
    running: int
    max_batch_size: int = Field(description="Sequences of one step at most, all engines together.")
    load: float = Field(description="What is queued and running against what fits at once; 1: a newcomer waits.")


class Blocks(ResponseModel):
    """KV blocks."""

    total: int
    used: int
    cached: int = Field(description="That hold a prefix which can be used again, in use or not.")


class Totals(ResponseModel):
    """Since the start of this server."""

    requests: int
    succeeded: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    first_token_s: float = Field(description="Seconds to the first token, all requests added up.")


class Tiers(ResponseModel):
    """Where adapters are, each counted in the nearest tier that has it."""

    device: int
    host: int
    disk: int = Field(description="Used since the start and in no memory now.")
    device_bytes: int
    host_bytes: int = Field(description="Copies of adapters on the device included.")
    device_bytes_max: int


class AdapterTotals(ResponseModel):
    """One adapter since the start; `_other` are those beyond --metrics-max-adapters together."""

    adapter: str
    source: str
    requests: int
    failures: int
    tokens: int
    first_token_s: float = Field(description="Seconds to the first token, all its requests added up.")


class Stats(ResponseModel):
    """One server at one moment."""

    object: str
    server: str = Field(description="Which server of a fleet answers; another one after each start.")
    time: float = Field(description="Seconds since 1970.")
    uptime_s: float
    draining: bool
    engines: list[EngineLine]
    queue: Queue
    kv: Blocks
    totals: Totals
    tiers: Tiers
    adapters: list[AdapterTotals]


@router.get("/v1/stats", response_model=Stats, responses=admin_responses(OpenAIError))
async def stats(api: AdminApi) -> Response:
    """Queue, KV blocks, tiers and each adapter's totals on the server that answers."""
    return json_response(stats_of(api))


def stats_of(api: Api) -> dict[str, Any]:
    """The document; see Stats."""
    numbers, now = api.metrics.engine_numbers(), time.time()
    clients = api.engine.clients if isinstance(api.engine, Engines) else [api.engine]

    def whole(field: str) -> int:
        return int(numbers.get(field, 0))

    states = [one.state for one in api.metrics.underway.values()]
    sums, num_by_tier = api.metrics.request_sums(), api.status.num_by_tier()
    return {
        "object": "stats",
        "server": api.server_id,
        "time": now,
        "uptime_s": max(0.0, now - api.started_at),
        "draining": api.admission.draining,
        "engines": [{"device": client.device, "unhealthy": client.unhealthy_reason()} for client in clients],
        "queue": {state: states.count(state) for state in ("preparing", "waiting", "running")}
        | {"max_batch_size": whole("max_batch_size"), "load": load_ratio(numbers)},
        "kv": {"total": whole("num_blocks"), "used": whole("num_blocks_used"), "cached": whole("num_blocks_cached")},
        "totals": {
            "requests": int(sums.requests), "succeeded": int(sums.succeeded), "failed": int(sums.failed),
            "prompt_tokens": whole("num_prompt_tokens"), "cached_tokens": whole("num_cached_tokens"),
            "output_tokens": whole("num_output_tokens"), "preemptions": whole("num_preemptions"), "first_token_s": sums.first_token_s,
        },
        "tiers": {
            **{tier: num_by_tier[tier] for tier in ("device", "host", "disk")},
            "device_bytes": whole("adapter_bytes_device"), "host_bytes": whole("adapter_bytes_host"),
            "device_bytes_max": sum(client.last_ready.adapter_bytes for client in clients if client.last_ready is not None),
        },
        "adapters": api.metrics.adapters.totals(),
    }  # fmt: skip

"""Routes about the server itself: is it well, what does it serve, how much did it do.

Owns no state; the engine client, the settings and the metrics do.
"""

import asyncio
from contextlib import suppress
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from server import __version__
from server.api.body import body_docs, error_content, read_body
from server.api.engine import EngineClient
from server.api.engines import Engines
from server.api.metrics_json import as_json
from server.api.names import shown
from server.api.sampling import refuse
from server.api.schemas_native import ERRORS, ErrorResponse, TokenizeRequest, TokenizeResponse
from server.api.schemas_openai import OpenAIError
from server.api.state import Api, ApiState
from server.api.stream import json_response, native_error, unless_gone
from server.api.tenants.access import Access
from server.errors import SHUTTING_DOWN, AdapterNotFound, ServerError
from server.metrics import CONTENT_TYPE
from server.sources import FACTORIES

router = APIRouter(tags=["server"])
_METRICS: dict[str, Any] = {
    "content": {
        "text/plain": {"schema": {"type": "string"}, "example": "lorax_request_count 12.0\n"},
        "application/json": {"schema": {"type": "object"}},
    }
}
_PROBE: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"description": "Well; the body is empty."},
        503: {"description": "Not well; `error` says why.", "content": error_content(ErrorResponse)},
    },
}
_ENGINE_FACTS = ("num_blocks", "block_size", "adapter_bytes", "start_s", "versions")


@router.get("/health", summary="200 while the engine answers, else 503 with the reason", **_PROBE)
@router.get("/ping", summary="SageMaker's name of /health", **_PROBE)
@router.get("/", summary="LoRAX's other name of /health", **_PROBE)
async def health(api: ApiState) -> Response:
    """The engine's heartbeat, not the web server's: the step loop must have moved on within its deadline. Of several one will do."""
    reason = SHUTTING_DOWN if api.admission.draining or api.admission.leaving else api.engine.unhealthy_reason()
    if reason is None:
        return Response(status_code=200)
    return json_response({"error": f"unhealthy: {reason}", "error_type": "healthcheck"}, status=503, headers={"retry-after": "1"})


@router.get(
    "/startup",
    response_class=Response,
    responses={
        200: {"description": "Ready; the body is empty."},
        500: {"description": "No token came; `error` says why.", "content": error_content(ErrorResponse)},
    },
)
async def startup(request: Request, api: ApiState) -> Response:
    """200 once a token has been generated through the whole queue: a probe for a start, not for each second.

    Whoever asks meanwhile waits for the same token: it needs no credential, and must not fill the queue."""
    try:
        await unless_gone(request, api.startup_probe.run())
    except ServerError as error:
        return json_response(native_error(error)[1], status=500)  # LoRAX's status, whatever it is
    return Response(status_code=200)


@router.get("/info", response_model=dict[str, Any])
async def info(api: ApiState) -> Response:
    """LoRAX's keys, and what the engine decided; `engine` is one that serves, `engines` are all."""
    settings, ready, limits = api.settings, api.engine.last_ready, api.limits()
    answer: dict[str, Any] = {
        "model_id": api.model.name,
        "model_sha": api.model.revision or None,
        "model_dtype": f"torch.{ready.layout.dtype}" if ready is not None else None,
        "model_device_type": ready.device.split(":")[0] if ready is not None else None,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": settings.max_concurrent_requests,
        "max_best_of": settings.max_best_of,
        "max_stop_sequences": settings.max_stop_sequences,
        "max_input_length": limits.max_input_length,
        "max_total_tokens": limits.max_total_tokens,
        "waiting_served_ratio": None,  # no prompt waits for a batch to end
        "max_batch_total_tokens": ready.num_blocks * ready.block_size if ready is not None else None,
        "max_waiting_tokens": None,
        "validation_workers": None,  # checks run in the event loop, long texts in threads
        "eager_prefill": True,  # prompts join the next step
        "max_batch_prefill_tokens": settings.max_batch_prefill_tokens,
        "version": __version__,
        "sha": None,
        "docker_label": None,
        "request_logger_url": None,
        "architecture": api.model.architecture,
        "adapter_source": api.source(None),
        "adapter_sources": sorted(FACTORIES),
        "engine": {"device": ready.device} | {name: getattr(ready, name) for name in _ENGINE_FACTS} if ready is not None else None,
        "engines": [_engine(client) for client in (api.engine.clients if isinstance(api.engine, Engines) else [api.engine])],
    }
    return json_response(answer)


def _engine(client: EngineClient) -> dict[str, Any]:
    """One engine: on which device, why it does not serve (null: it does), and what it decided when it last started."""
    facts = {name: getattr(client.last_ready, name, None) for name in _ENGINE_FACTS}
    return {"device": client.device, "unhealthy": client.unhealthy_reason()} | facts


@router.get("/metrics", response_class=Response, responses={200: _METRICS, 422: {"model": ErrorResponse}})
async def metrics(request: Request, api: ApiState, format: Literal["text", "json"] | None = None) -> Response:
    """Prometheus' text format; LoRAX's JSON where `Accept` says application/json, or with `?format=json`."""
    wants_json = format == "json" or (format is None and "application/json" in request.headers.get("accept", ""))
    if wants_json:
        return json_response(as_json(api.metrics.render()))
    return Response(api.metrics.render(), headers={"content-type": CONTENT_TYPE})


@router.get("/v1/models")
async def models(request: Request, api: ApiState) -> Response:
    """The base, and the adapters of the default source by the ids that `model` takes; with tenants, the caller's and shared ones."""
    access, ids = api.access(request), await api.source_ids()
    return await api.listed(partial(_models, api, access, ids))  # ten thousand take tenths of a second


def _models(api: Api, access: Access, ids: list[str]) -> Response:
    base, of_operator = _model(api, api.model.name, None), access.tenant is None
    source = api.source(None)
    seen = access.seen(source, api.publisher.registry.listed(source, ids))  # as they are kept
    rows = [_model(api, adapter_id, api.model.name, of_operator=of_operator) for adapter_id in seen]
    return json_response({"object": "list", "data": [base, *rows]})


@router.get("/v1/models/{name:path}", responses={404: {"model": OpenAIError, "description": "There is no such model."}})
async def model(name: str, request: Request, api: ApiState) -> Response:
    """One of /v1/models, by any spelling of its id; the base by any of its names."""
    if name in api.model.names:
        return json_response(_model(api, api.model.name, None))
    access, kept = api.access(request), ""
    with suppress(AdapterNotFound):  # not the caller's
        kept = access.to_show(name)
    entry = api.publisher.registry.entry(kept)
    if entry.version is None and (entry.deleted or kept not in await api.source_ids()):
        raise AdapterNotFound(f"Adapter '{name[:256]}' was not found in source '{api.source(None)}'")
    return json_response(_model(api, kept, api.model.name, of_operator=access.tenant is None))


def _model(api: Api, name: str, parent: str | None, *, of_operator: bool = True) -> dict[str, Any]:
    version = api.publisher.registry.entry(name).version if parent is not None else None
    return {
        "id": name if of_operator else shown(name),
        "object": "model",
        "created": version.published_at if version is not None else api.started_at,
        "owned_by": "manylora",
        "root": api.model.name,
        "parent": parent,
        "max_model_len": api.limits().max_total_tokens,
    }


@router.post("/tokenize", response_model=list[TokenizeResponse], responses=ERRORS, openapi_extra=body_docs(TokenizeRequest))
async def tokenize(request: Request, api: ApiState) -> Response:
    """The base tokenizer's tokens of a text that could be a prompt."""
    api.admission.check()
    settings, tokenizer = api.settings, api.model.tokenizer
    body = await read_body(request, TokenizeRequest, max_bytes=settings.max_body_bytes, ignore_unknown=settings.lorax_strict)
    api.check_chars(tokenizer, body.inputs, "inputs")
    with api.admitted(api.access(request), None, 1):
        tokens = await asyncio.to_thread(
            tokenizer.encode_with_offsets, body.inputs, add_special_tokens=body.add_special_tokens is not False
        )
    if len(tokens) > (max_len := api.limits().max_input_length):
        raise refuse(f"`inputs` must have less than {max_len} tokens. Given: {len(tokens)}", "inputs")
    return json_response([{"id": id, "text": text, "start": start, "stop": stop} for id, text, start, stop in tokens])

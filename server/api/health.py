"""Routes about the server itself: is it well, what does it serve, how much did it do.

Owns no state; the engine client, the settings and the metrics do.
"""

import asyncio
import logging
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server import __version__
from server.api.body import body_docs, read_body
from server.api.sampling import refuse
from server.api.schemas_native import TokenizeRequest, TokenizeResponse
from server.api.state import Api, ApiState
from server.api.stream import json_response
from server.errors import ServerError
from server.metrics import CONTENT_TYPE
from server.sources import FACTORIES

log = logging.getLogger(__name__)
router = APIRouter(tags=["server"])
_ENGINE_FACTS = ("device", "num_blocks", "block_size", "adapter_bytes", "start_s", "versions")


@router.get("/health", summary="200 while the engine answers, else 503 with the reason")
@router.get("/ping", summary="SageMaker's name of /health")
@router.get("/", summary="LoRAX's other name of /health")
async def health(api: ApiState) -> Response:
    """The engine's heartbeat, not the web server's: the step loop must have moved on within its deadline."""
    reason = "the server is shutting down" if api.admission.draining else api.engine.unhealthy_reason()
    if reason is None:
        return Response(status_code=200)
    return json_response({"error": f"unhealthy: {reason}", "error_type": "healthcheck"}, status=503, headers={"retry-after": "1"})


@router.get("/info")
async def info(api: ApiState) -> Response:
    """LoRAX's keys, and what the engine decided."""
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
        "max_batch_total_tokens": ready.num_blocks * ready.block_size if ready is not None else None,
        "max_batch_prefill_tokens": settings.max_batch_prefill_tokens,
        "version": __version__,
        "sha": None,
        "docker_label": None,
        "architecture": api.model.architecture,
        "adapter_source": api.source(None),
        "adapter_sources": sorted(FACTORIES),
        "engine": {name: getattr(ready, name) for name in _ENGINE_FACTS} if ready is not None else None,
    }
    return json_response(answer)


@router.get("/metrics")
async def metrics(api: ApiState) -> Response:
    """Prometheus' text format."""
    return Response(api.metrics.render(), headers={"content-type": CONTENT_TYPE})


@router.get("/v1/models")
async def models(api: ApiState) -> Response:
    """The base, and the adapters of the default source by the ids that `model` takes."""
    try:
        listed = await api.adapters.list_ids(api.source(None))
    except ServerError as error:  # the base can be called all the same
        log.warning("the adapters cannot be listed: %s", error.message)
        listed = []
    base = _model(api, api.model.name, None)
    return json_response({"object": "list", "data": [base, *(_model(api, adapter_id, api.model.name) for adapter_id in listed)]})


def _model(api: Api, name: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": api.started_at,
        "owned_by": "manylora",
        "root": api.model.name,
        "parent": parent,
        "max_model_len": api.limits().max_total_tokens,
    }


@router.post("/tokenize", response_model=list[TokenizeResponse], openapi_extra=body_docs(TokenizeRequest))
async def tokenize(request: Request, api: ApiState) -> Response:
    """The base tokenizer's tokens of a text that could be a prompt."""
    api.admission.check()
    settings, tokenizer = api.settings, api.model.tokenizer
    body = await read_body(request, TokenizeRequest, max_bytes=settings.max_body_bytes, ignore_unknown=settings.lorax_strict)
    api.check_chars(tokenizer, body.inputs, "inputs")
    with api.admission.admitted(1):
        tokens = await asyncio.to_thread(tokenizer.encode_with_offsets, body.inputs, add_special_tokens=body.add_special_tokens)
    if len(tokens) > (max_len := api.limits().max_input_length):
        raise refuse(f"`inputs` must have less than {max_len} tokens. Given: {len(tokens)}", "inputs")
    return json_response([{"id": id, "text": text, "start": start, "stop": stop} for id, text, start, stop in tokens])

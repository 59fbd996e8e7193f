"""LoRAX's routes for embedding and classification models, answered as LoRAX answers them on a model that generates text.

Owns no state: a body is checked like any other, so that a client sees its own mistake first, and the answer is then the refusal.
"""

from typing import Any

from fastapi import APIRouter, Request

from server.api.body import body_docs, read_body
from server.api.schemas_common import RequestModel
from server.api.schemas_native import ERRORS, ClassifyBatchRequest, ClassifyRequest, EmbeddingsRequest, EmbedRequest
from server.api.schemas_openai import OpenAIError
from server.api.state import Api, ApiState
from server.errors import GenerationFailed

router = APIRouter(tags=["other models"])
_OPENAI_ERRORS: dict[int | str, Any] = {status: {"model": OpenAIError} for status in (400, 413, 415, 424, 429, 500, 503)}
_OPTIONS: dict[str, Any] = {"response_model": None, "status_code": 424, "responses": ERRORS}


async def _refuse(request: Request, api: Api, schema: type[RequestModel], what: str) -> None:
    record, settings = api.record(request), api.settings
    with record.failures():
        await read_body(request, schema, max_bytes=settings.max_body_bytes, ignore_unknown=settings.lorax_strict)
        raise GenerationFailed(f"Model does not support {what}")


@router.post("/embed", openapi_extra=body_docs(EmbedRequest), **_OPTIONS)
async def embed(request: Request, api: ApiState) -> None:
    """Always 424: the model that is served generates text."""
    await _refuse(request, api, EmbedRequest, "embeddings")


@router.post("/v1/embeddings", openapi_extra=body_docs(EmbeddingsRequest), response_model=None, status_code=424, responses=_OPENAI_ERRORS)
async def embeddings(request: Request, api: ApiState) -> None:
    """Always 424: the model that is served generates text."""
    await _refuse(request, api, EmbeddingsRequest, "embeddings")


@router.post("/classify", openapi_extra=body_docs(ClassifyRequest), **_OPTIONS)
async def classify(request: Request, api: ApiState) -> None:
    """Always 424: the model that is served generates text."""
    await _refuse(request, api, ClassifyRequest, "classification")


@router.post("/classify_batch", openapi_extra=body_docs(ClassifyBatchRequest), **_OPTIONS)
async def classify_batch(request: Request, api: ApiState) -> None:
    """Always 424: the model that is served generates text."""
    await _refuse(request, api, ClassifyBatchRequest, "classification")

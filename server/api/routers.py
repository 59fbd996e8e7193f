"""Which routers the application has, and which bodies they name in the OpenAPI document. Owns the lists; api.app mounts them."""

from fastapi import FastAPI

from server.api import adapter_routes, health, intake, native, openai_chat, openai_completions, other_models, page, stats
from server.api.schemas_adapters import LoadLoraRequest, PublishRequest, UnloadLoraRequest
from server.api.schemas_native import (
    ClassifyBatchRequest,
    ClassifyRequest,
    EmbeddingsRequest,
    EmbedRequest,
    GenerateRequest,
    StreamEvent,
    TokenizeRequest,
)
from server.api.schemas_openai import ChatChunk, ChatRequest, CompletionChunk, CompletionRequest

_ALWAYS = (native, openai_completions, openai_chat, other_models, adapter_routes, intake, stats, health)
SCHEMAS = (  # named by the routes with body_docs and stream_docs
    GenerateRequest, StreamEvent, TokenizeRequest, EmbedRequest, EmbeddingsRequest, ClassifyRequest, ClassifyBatchRequest,
    CompletionRequest, CompletionChunk, ChatRequest, ChatChunk, PublishRequest, LoadLoraRequest, UnloadLoraRequest,
)  # fmt: skip


def mount(app: FastAPI, *, ui: bool) -> None:
    """Give the application its routes; with the page if `ui`."""
    for module in (*_ALWAYS, page) if ui else _ALWAYS:
        app.include_router(module.router)

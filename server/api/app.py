"""The FastAPI application: parts made, routes mounted, errors worded, the engine started and stopped with it.

Owns the wiring alone. `server.__main__` and the tests call `make_app`.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server import __version__
from server.api import health, native, openai_chat, openai_completions
from server.api.adapters import AdapterResolver
from server.api.admission import Admission
from server.api.base_model import ServedModel
from server.api.body import ClientGone
from server.api.engine import ENGINE_COMMAND, EngineClient
from server.api.preload import preload
from server.api.schemas_native import GenerateRequest, TokenizeRequest
from server.api.schemas_openai import ChatRequest, CompletionRequest
from server.api.state import Api
from server.api.stream import Dialect, error_response, internal_error, native_error, openai_error
from server.api.text.template_worker import TemplateWorkers
from server.errors import ServerError
from server.metrics import Metrics
from server.settings import Settings
from server.sources import SourceOptions, Sources, Store, canonical_name
from server.types import EngineOptions

_BODIES = (GenerateRequest, TokenizeRequest, CompletionRequest, ChatRequest)


def make_api(
    settings: Settings,
    model: ServedModel,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
    on_fatal: Callable[[str], None] = lambda reason: None,
) -> Api:
    """The parts, not yet started. `settings` must be resolved (Settings.resolved). ValueError, naming the setting, if they cannot be."""
    _check_sources(settings)
    metrics = Metrics()
    assert settings.store_dir is not None
    engine = EngineClient(
        engine_options(settings, model),
        metrics,
        max_open=settings.max_concurrent_requests,
        start_timeout_s=settings.start_timeout_s,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
        hang_timeout_s=settings.hang_timeout_s,
        command=engine_command,
        on_fatal=on_fatal,
    )
    adapters = AdapterResolver(
        Sources(source_options(settings)),
        Store(settings.store_dir, settings.store_max_bytes),
        model.tokenizer,
        metrics,
        recheck_s=settings.adapter_recheck_s,
        max_merged_rank=settings.max_merged_rank,
    )
    return Api(
        settings=settings,
        model=model,
        engine=engine,
        adapters=adapters,
        templates=TemplateWorkers(timeout_s=settings.template_timeout_s),
        admission=Admission(settings.max_concurrent_requests, metrics),
        metrics=metrics,
        started_at=int(time.time()),
    )


def _check_sources(settings: Settings) -> None:
    """ValueError, naming the setting, for what no request could ever use."""
    for flag, name in (("--adapter-source", settings.adapter_source), ("--default-adapter-source", settings.default_adapter_source)):
        try:
            canonical_name(name or settings.adapter_source)
        except ServerError as error:
            raise ValueError(f"{flag}: {error.message}") from None
    if settings.adapters_dir is not None and not settings.adapters_dir.is_dir():
        raise ValueError(f"--adapters-dir {settings.adapters_dir}: there is no such folder")


def engine_options(settings: Settings, model: ServedModel) -> EngineOptions:
    """What of the settings is the engine's."""
    assert settings.max_total_tokens is not None
    return EngineOptions(
        model_dir=str(model.folder),
        revision=model.revision,
        device=settings.device,
        dtype=settings.dtype,
        block_size=settings.block_size,
        num_blocks=settings.num_blocks,
        kv_cache_bytes=_int(settings.kv_cache_bytes),
        max_batch_tokens=settings.max_batch_prefill_tokens,
        max_batch_size=settings.max_batch_size,
        max_sequence_len=settings.max_total_tokens,
        prefix_caching=settings.prefix_caching,
        adapter_device_bytes=_int(settings.adapter_device_bytes),
        adapter_host_bytes=_int(settings.adapter_host_bytes),
        num_threads=settings.num_threads,
        allow_unverified_architecture=settings.allow_unverified_architecture,
    )


def source_options(settings: Settings) -> SourceOptions:
    """What of the settings is the sources'."""
    options: dict[str, Any] = {
        "adapters_dir": settings.adapters_dir,
        "allowed_buckets": tuple(settings.allowed_buckets),
        "model_bucket": settings.model_bucket,
        "model_folder": settings.model_folder,
        "s3_endpoint_url": settings.s3_endpoint_url,
        "s3_region": settings.s3_region,
        "hub_enabled": settings.hub_enabled,
        "hub_endpoint": settings.hub_endpoint,
        "allowed_hub_owners": tuple(settings.allowed_hub_owners),
        "max_adapter_bytes": int(settings.max_adapter_bytes),
        "connect_timeout_s": settings.source_connect_timeout_s,
        "read_timeout_s": settings.source_read_timeout_s,
        "num_retries": settings.source_retries,
    }
    return SourceOptions(**{name: value for name, value in options.items() if value is not None})


def _int(value: int | None) -> int | None:
    return None if value is None else int(value)  # a plain int, not pydantic's ByteSize


def make_app(api: Api) -> FastAPI:
    """The application; its lifespan starts and stops the engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        api.engine.start()
        preloading = preload(api)
        try:
            yield
        finally:
            preloading.cancel()
            await api.engine.stop()
            await api.templates.close()
            api.adapters.close()

    app = FastAPI(
        title="manylora",
        version=__version__,
        summary="One base model and any number of LoRA adapters.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.api = api
    for router in (native.router, openai_completions.router, openai_chat.router, health.router):
        app.include_router(router)
    app.add_exception_handler(ServerError, _on_server_error)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _dialect(request: Request) -> Dialect:
    return openai_error if request.url.path.startswith("/v1/") else native_error


async def _on_server_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError)
    return error_response(error, _dialect(request))


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in the family's own words."""
    assert isinstance(error, HTTPException)
    failure = ServerError(f"{request.method} {request.url.path}: {error.detail}"[:500])
    failure.status, failure.error_type = error.status_code, "not_found" if error.status_code == 404 else "bad_request"
    response = error_response(failure, _dialect(request))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _on_bug(request: Request, error: Exception) -> Response:
    return error_response(internal_error(error), _dialect(request))


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with the bodies that the routes read themselves."""
    if not app.openapi_schema:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for body in _BODIES:
            schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas[body.__name__] = schema
        app.openapi_schema = document
    return app.openapi_schema

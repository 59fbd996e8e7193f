"""The FastAPI application: parts made, routes mounted, errors worded, the engine started and stopped with it.

Owns the wiring alone. `server.__main__` and the tests call `make_app`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import psutil
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from server import __version__
from server.api.adapter_status import AdapterStatus
from server.api.adapters import AdapterResolver
from server.api.admission import Admission
from server.api.base_model import ServedModel
from server.api.body import ClientGone
from server.api.devices import engine_devices
from server.api.engine import ENGINE_COMMAND, EngineClient
from server.api.engines import Engines
from server.api.front import put_before
from server.api.lora_info import LoraRequestsInfo
from server.api.openapi import describe
from server.api.preload import preload
from server.api.published import NamedSources, PublishedWeights
from server.api.publishing import Publisher
from server.api.registry import Registry
from server.api.residency import Residency
from server.api.routers import SCHEMAS, mount
from server.api.source_settings import check_sources, source_options
from server.api.state import Api
from server.api.stream import Dialect, error_response, internal_error, native_error, openai_error
from server.api.tenants.access import Places
from server.api.tenants.merges import MergeBook
from server.api.tenants.tenancy import Tenancy
from server.api.text.template_worker import TemplateWorkers
from server.api.tracing import Traces
from server.errors import BodyMismatch, BodyUnreadable, ServerError, ValidationFailed
from server.metrics import Metrics, TenantSeries
from server.settings import Settings
from server.sources import Sources, Store, canonical_name
from server.types import EngineOptions

log = logging.getLogger(__name__)


def make_api(
    settings: Settings,
    model: ServedModel,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
    num_gpus: int = 0,
    on_fatal: Callable[[str], None] = lambda reason: None,
) -> Api:
    """The parts, not yet started; an engine for each of `num_gpus` if the settings leave it open.

    `settings` must be resolved (Settings.resolved). ValueError, naming the setting, if they cannot be."""
    check_sources(settings)
    metrics = Metrics(max_adapters=settings.metrics_max_adapters)
    assert settings.store_dir is not None
    each = options_of_each(engine_options(settings, model), settings.num_engines, num_gpus)
    client_options: dict[str, Any] = {
        "max_open": settings.max_concurrent_requests,
        "start_timeout_s": settings.start_timeout_s,
        "heartbeat_timeout_s": settings.heartbeat_timeout_s,
        "hang_timeout_s": settings.hang_timeout_s,
        "command": engine_command,
        "on_fatal": on_fatal,
    }
    engine = EngineClient(each[0], metrics, **client_options) if len(each) == 1 else Engines(each, metrics, **client_options)
    traces = Traces(settings.otlp_endpoint) if settings.otlp_endpoint is not None else None
    metrics.on_end = traces or metrics.on_end
    publisher, adapters, store = _adapters(settings, model, engine, metrics)
    places = Places(publisher.raw)
    tenancy = Tenancy(settings, publisher.registry, places, TenantSeries(metrics.registry)) if settings.tenants_file else None
    if tenancy is not None:
        publisher.raw.bound_links(tenancy.link_bounds)
    metrics.registry.register(LoraRequestsInfo(metrics, adapters.residency, settings.max_batch_size))
    return Api(
        settings=settings,
        model=model,
        engine=engine,
        adapters=adapters,
        publisher=publisher,
        tenancy=tenancy,
        merges=MergeBook(tenancy.limits, store, adapters.residency) if tenancy is not None else None,
        places=places,
        status=AdapterStatus(publisher.registry, adapters),
        templates=TemplateWorkers(timeout_s=settings.template_timeout_s),
        admission=Admission(settings.max_concurrent_requests, metrics),
        metrics=metrics,
        traces=traces,
        started_at=int(time.time()),
    )


def _adapters(
    settings: Settings, model: ServedModel, engine: EngineClient | Engines, metrics: Metrics
) -> tuple[Publisher, AdapterResolver, Store]:
    """Names, sources and store of one server, and what is told to its engine about adapters. ValueError if the registry cannot be read."""
    assert settings.store_dir is not None and settings.registry_dir is not None
    registry = Registry(settings.registry_dir, model.name, canonical_name(settings.default_adapter_source or settings.adapter_source))
    raw, weights = Sources(source_options(settings)), PublishedWeights(registry.folder)
    store = Store(settings.store_dir, settings.store_max_bytes)
    residency = Residency(engine.tell)
    adapters = AdapterResolver(
        NamedSources(raw, registry, weights),
        store,
        model.tokenizer,
        metrics,
        recheck_s=settings.adapter_recheck_s,
        timeout_s=settings.adapter_timeout_s,
        max_merged_rank=settings.max_merged_rank,
        residency=residency,
        stamps=registry.stamps,
        name_by_hash=settings.tenants_file is not None,  # tenants may have the same weights, under names that are theirs alone
    )
    publisher = Publisher(registry, weights, raw, store, adapters, engine, model.names, settings.tenants_file is not None)
    engine.on_ready, engine.on_adapter = publisher.engine_ready, residency.take
    if isinstance(engine, Engines):
        engine.on_joined = publisher.engine_joined
    return publisher, adapters, store


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
        kv_cache_dtype=settings.kv_cache_dtype,
        max_batch_tokens=settings.max_batch_prefill_tokens,
        max_batch_size=settings.max_batch_size,
        max_batch_adapters=settings.max_batch_adapters,
        max_queue_s=settings.max_queue_s,
        max_sequence_len=settings.max_total_tokens,
        prefix_caching=settings.prefix_caching,
        adapter_device_bytes=_int(settings.adapter_device_bytes),
        adapter_host_bytes=_int(settings.adapter_host_bytes),
        adapter_read_timeout_s=settings.adapter_timeout_s,
        kernels=settings.kernels,
        attention=settings.attention,
        compile_layers=settings.compile_layers,
        cuda_graphs=settings.cuda_graphs,
        overlap=settings.overlap,
        kernel_trials_s=settings.kernel_trials_s,
        num_threads=settings.num_threads,
        allow_unverified_architecture=settings.allow_unverified_architecture,
        quantize=settings.quantize,
        quantize_head=settings.quantize_head,
    )


def options_of_each(options: EngineOptions, num_engines: int | None, num_gpus: int) -> list[EngineOptions]:
    """One engine's options for each device; the host's memory and cores are divided among them. ValueError names the setting that cannot
    be met."""
    devices = engine_devices(options.device, num_engines, num_gpus)
    if len(devices) == 1:
        return [msgspec.structs.replace(options, device=devices[0])]
    log.info("an engine on each of %s", ", ".join(devices))
    shared = {
        "adapter_host_bytes": (options.adapter_host_bytes or psutil.virtual_memory().available // 4) // len(devices),
        "num_threads": options.num_threads or max(1, (psutil.cpu_count(logical=False) or 1) // len(devices)),
    }
    return [msgspec.structs.replace(options, device=device, **shared) for device in devices]


def _int(value: int | None) -> int | None:
    return None if value is None else int(value)  # a plain int, not pydantic's ByteSize


def make_app(api: Api) -> FastAPI:
    """The application; its lifespan starts and stops the engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        api.engine.start()
        api.publisher.start(api.settings.registry_poll_s)
        preloading = preload(api)
        following = asyncio.create_task(api.tenancy.follow(api.settings.registry_poll_s), name="follow tenants") if api.tenancy else None
        try:
            yield
        finally:
            preloading.cancel()
            if following is not None and api.tenancy is not None:
                following.cancel()
                await api.tenancy.close()
            await api.publisher.close()
            if api.merges is not None:
                api.merges.close()
            await api.engine.stop()
            await api.templates.close()
            api.adapters.close()
            api.list_thread.shutdown(wait=False, cancel_futures=True)
            if api.traces is not None:
                await api.traces.close()

    app = FastAPI(
        title="manylora",
        version=__version__,
        summary="One base model and any number of LoRA adapters.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.api = api
    mount(app, ui=api.settings.ui)
    app.add_exception_handler(ServerError, _on_server_error)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_bad_query)
    app.add_exception_handler(Exception, _on_bug)
    app.openapi = lambda: describe(app, SCHEMAS)  # type: ignore[method-assign]
    app.add_api_route("/api-doc/openapi.json", lambda: app.openapi(), include_in_schema=False)  # LoRAX's path
    put_before(app, api.settings, api.tenancy)
    return app


def _dialect(request: Request) -> Dialect:
    return openai_error if request.url.path.startswith("/v1/") else native_error


async def _on_server_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError)
    dialect = _dialect(request)
    if isinstance(error, BodyUnreadable) and dialect is native_error and request.app.state.api.settings.lorax_strict:
        # LoRAX's framework answers these before LoRAX does.
        start = "Failed to deserialize the JSON body into the target type: " if isinstance(error, BodyMismatch) else ""
        return PlainTextResponse(start + error.message, status_code=error.status)
    return error_response(error, dialect)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_bad_query(request: Request, error: Exception) -> Response:
    """A parameter of the path, the query or a header that FastAPI itself checked."""
    assert isinstance(error, RequestValidationError)
    words = [f"`{detail['loc'][-1]}`: {detail['msg']}" for detail in error.errors()[:5]]
    return error_response(ValidationFailed("; ".join(words), param=str(error.errors()[0]["loc"][-1])), _dialect(request))


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

"""/v1/adapters: what there is, and orders about it; vLLM's two routes of the same kind. All of it for whoever shows the admin key.

Owns the requests' meaning in HTTP; api.publishing carries orders out, api.adapter_status says what is.
"""

from pathlib import PurePosixPath
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import PlainTextResponse, Response

from server.api.adapters import AdapterSelection
from server.api.admin import AdminApi, admin_responses
from server.api.body import body_docs, read_body
from server.api.publishing import Order, Publisher
from server.api.sampling import refuse
from server.api.schemas_adapters import AdapterList, AdapterRow, DeletedAdapter, LoadLoraRequest, PublishRequest, UnloadLoraRequest
from server.api.schemas_openai import OpenAIError
from server.api.state import Api
from server.api.stream import json_response
from server.errors import Unavailable, ValidationFailed

router = APIRouter(tags=["adapters"])
_ERRORS: dict[int | str, Any] = {
    **admin_responses(OpenAIError),
    **{status: {"model": OpenAIError} for status in (400, 404, 409, 413, 415, 424, 503)},
}
_MAX_PAGE = 1000


@router.get("/v1/adapters", response_model=AdapterList, responses=_ERRORS)
async def list_adapters(
    api: AdminApi,
    after: Annotated[str | None, Query(max_length=1024, description="Only ids after this one.")] = None,
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = _MAX_PAGE,
) -> Response:
    """Every adapter that requests may name: published names, ids of the default source, and what was used of other sources."""
    named = api.status.names(await api.source_ids())
    named = [one for one in named if after is None or one.adapter_id > after]
    named.sort(key=lambda one: (one.adapter_id, one.source))
    page = named[:limit]
    while len(page) < len(named) and named[len(page)].adapter_id == page[-1].adapter_id:
        page.append(named[len(page)])  # the same id in another source: `after` would pass it over
    return json_response(
        {
            "object": "list",
            "generation": api.publisher.registry.view.generation,
            "data": [api.status.row(one) for one in page],
            "has_more": len(page) < len(named),
            "draining": api.status.draining(),
        }
    )


@router.post("/v1/adapters", response_model=AdapterRow, responses=_ERRORS, openapi_extra=body_docs(PublishRequest))
async def publish(request: Request, api: AdminApi) -> Response:
    """Publish: from this answer on the name means these weights, on this server; on the others within about a second.

    Requests that run end with the weights that they began with. The weights are copied: what becomes of the source changes nothing."""
    body = await read_body(request, PublishRequest, max_bytes=api.settings.max_body_bytes)
    try:
        source = api.source(body.source)
    except ValidationFailed as error:
        raise ValidationFailed(error.message.replace("`adapter_source`", "`source`"), param="source") from None
    order = Order(body.name, source, body.id or body.name, body.api_token, body.replace, body.pin)
    await _publisher(api).publish(order)
    return _row(api, body.name)


@router.get("/v1/adapters/{name:path}", response_model=AdapterRow, responses=_ERRORS)
async def show(name: str, api: AdminApi) -> Response:
    """One adapter of the default source. 404 if requests may not name it."""
    await api.publisher.check_known(name)
    return _row(api, name)


@router.post("/v1/adapters/{name:path}/load", response_model=AdapterRow, responses=_ERRORS)
async def load(name: str, api: AdminApi) -> Response:
    """Bring it into memory, on every server. Answers when it is there on this one, or after some seconds."""
    await _publisher(api).load(name)
    return _row(api, name)


@router.post("/v1/adapters/{name:path}/pin", response_model=AdapterRow, responses=_ERRORS)
async def pin(name: str, api: AdminApi) -> Response:
    """Bring it into memory on every server and keep it there, whatever else is asked for."""
    await _publisher(api).pin(name, True)
    return _row(api, name)


@router.post("/v1/adapters/{name:path}/unpin", response_model=AdapterRow, responses=_ERRORS)
async def unpin(name: str, api: AdminApi) -> Response:
    """No longer keep it: it leaves memory when others need the room."""
    await _publisher(api).pin(name, False)
    return _row(api, name)


@router.post("/v1/adapters/{name:path}/unload", response_model=AdapterRow, responses=_ERRORS)
async def unload(name: str, api: AdminApi) -> Response:
    """Free its memory on every server when its last request there has ended. The name stays: a request for it loads it again."""
    await _publisher(api).unload(name)
    return _row(api, name)


@router.delete("/v1/adapters/{name:path}", response_model=DeletedAdapter, responses=_ERRORS)
async def delete(
    name: str,
    api: AdminApi,
    release: Annotated[bool, Query(description="Let go of the name: an id of that name in the default source answers then.")] = False,
) -> Response:
    """The name answers no more until it is published again; its memory is freed when its last request has ended.

    The source is left alone."""
    await _publisher(api).delete(name, release)
    return json_response({"id": name, "object": "adapter", "deleted": True})


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse, responses=_ERRORS, openapi_extra=body_docs(LoadLoraRequest))
async def load_lora_adapter(request: Request, api: AdminApi) -> Response:
    """vLLM's name of publishing. `lora_path` is a folder below --adapters-dir, `s3://bucket/key`, or an id of the default source."""
    body = await read_body(request, LoadLoraRequest, max_bytes=api.settings.max_body_bytes)
    source, adapter_id = _where(api, body.lora_path)
    await _publisher(api).publish(Order(body.lora_name, source, adapter_id, replace=body.load_inplace))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse, responses=_ERRORS, openapi_extra=body_docs(UnloadLoraRequest))
async def unload_lora_adapter(request: Request, api: AdminApi) -> Response:
    """vLLM's name of deleting; here memory is freed as well."""
    body = await read_body(request, UnloadLoraRequest, max_bytes=api.settings.max_body_bytes)
    await _publisher(api).delete(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _publisher(api: Api) -> Publisher:
    """Orders are taken until the server drains."""
    if api.admission.draining:
        raise Unavailable("the server is shutting down", retry_after_s=5.0)
    return api.publisher


def _row(api: Api, name: str) -> Response:
    return json_response(api.status.row(AdapterSelection(api.source(None), name)))


def _where(api: Api, path: str) -> tuple[str, str]:
    """Source and id of vLLM's path. ValidationFailed for an absolute path outside of --adapters-dir."""
    if path.startswith("s3://"):
        return "s3", path
    if not path.startswith("/"):
        return api.source(None), path
    root = api.settings.adapters_dir
    for folder in (root, root.resolve()) if root is not None else ():
        if PurePosixPath(path).is_relative_to(folder.as_posix()):
            return "local", PurePosixPath(path).relative_to(folder.as_posix()).as_posix()
    raise refuse("`lora_path` must be below the adapters' folder of this server, or an id of a source", "lora_path")

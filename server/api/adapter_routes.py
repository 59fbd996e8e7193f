"""/v1/adapters: what there is, and orders about it; vLLM's two routes of the same kind. For whoever shows the admin key, and for tenants
about what is their own.

Owns the requests' meaning in HTTP; api.publishing carries orders out, api.adapter_status says what is, tenants.access whose it is.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import PurePosixPath
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import PlainTextResponse, Response

from server.api.adapters import AdapterSelection
from server.api.admin import OrdersApi, admin_responses
from server.api.body import body_docs, read_body
from server.api.names import shown
from server.api.publishing import Order, Publisher
from server.api.sampling import refuse
from server.api.schemas_adapters import AdapterList, AdapterRow, DeletedAdapter, LoadLoraRequest, PublishRequest, UnloadLoraRequest
from server.api.schemas_openai import OpenAIError
from server.api.state import Api
from server.api.stream import json_response
from server.api.tenants.access import Access, Names, nowhere
from server.errors import SHUTTING_DOWN, AdapterNotFound, Unavailable, ValidationFailed

router = APIRouter(tags=["adapters"])
_ERRORS: dict[int | str, Any] = {
    **admin_responses(OpenAIError),
    **{status: {"model": OpenAIError} for status in (400, 404, 409, 413, 415, 424, 429, 503)},
}
_MAX_PAGE = 1000


@router.get("/v1/adapters", response_model=AdapterList, responses=_ERRORS)
async def list_adapters(
    request: Request,
    api: OrdersApi,
    after: Annotated[str | None, Query(max_length=1024, description="Only ids after this one.")] = None,
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = _MAX_PAGE,
) -> Response:
    """Every adapter that requests may name: published names, ids of the default source, and what was used of other sources."""
    access = api.access(request)
    of_tenant = access.tenant is not None
    ids, used = await api.source_ids(), api.status.used()
    page, has_more = await api.listed(partial(_page, api, access, ids, used, after, limit))  # of ten thousand
    return json_response(
        {
            "object": "list",
            "generation": None if of_tenant else api.publisher.registry.view.generation,
            "data": [api.status.row(one, access) for one in page],
            "has_more": has_more,
            "draining": [] if of_tenant else api.status.draining(),
        }
    )


def _page(
    api: Api, access: Access, ids: list[str], used: list[AdapterSelection], after: str | None, limit: int
) -> tuple[list[AdapterSelection], bool]:
    """Those of a page, and whether there are more. Any thread."""
    named = [one for one in api.status.names(ids, used) if after is None or _id(one, access) > after]
    sources = {one.source for one in named}
    seen = {source: set(access.seen(source, (one.adapter_id for one in named if one.source == source))) for source in sources}
    named = [one for one in named if one.adapter_id in seen[one.source]]
    named.sort(key=lambda one: (_id(one, access), one.source))
    page = named[:limit]
    while len(page) < len(named) and _id(named[len(page)], access) == _id(page[-1], access):
        page.append(named[len(page)])  # the same id in another source: `after` would pass it over
    return page, len(page) < len(named)


@router.post("/v1/adapters", response_model=AdapterRow, responses=_ERRORS, openapi_extra=body_docs(PublishRequest))
async def publish(request: Request, api: OrdersApi) -> Response:
    """Publish: from this answer on the name means these weights, on this server; on the others within about a second.

    Requests that run end with the weights that they began with. The weights are copied: what becomes of the source changes nothing."""
    body = await read_body(request, PublishRequest, max_bytes=api.settings.max_body_bytes)
    try:
        source = api.source(body.source)
    except ValidationFailed as error:
        raise ValidationFailed(error.message.replace("`adapter_source`", "`source`"), param="source") from None
    access = api.access(request)
    name, source_id = access.to_publish(body.name, body.owner), body.id or shown(body.name)
    access.to_read(source, source_id)

    def check(names: Names) -> None:
        access.check_names(name, names)
        if body.pin:
            access.check_pins(name, names)

    check(api.publisher.registry.view.names)
    with api.ordering(access), _worded(access, source, source_id):
        await _publisher(api).publish(Order(name, source, source_id, body.api_token, body.replace, body.pin, check))
    return _row(api, name, access)


@router.get("/v1/adapters/{name:path}", response_model=AdapterRow, responses=_ERRORS)
async def show(name: str, request: Request, api: OrdersApi) -> Response:
    """One adapter of the default source. 404 if requests may not name it."""
    return await _ordered(api, api.access(request), name, Access.to_show, lambda kept: api.publisher.check_known(kept))


@router.post("/v1/adapters/{name:path}/load", response_model=AdapterRow, responses=_ERRORS)
async def load(name: str, request: Request, api: OrdersApi) -> Response:
    """Bring it into memory, on every server. Answers when it is there on this one, or after some seconds."""
    return await _ordered(api, api.access(request), name, Access.to_show, lambda kept: _publisher(api).load(kept))


@router.post("/v1/adapters/{name:path}/pin", response_model=AdapterRow, responses=_ERRORS)
async def pin(name: str, request: Request, api: OrdersApi) -> Response:
    """Bring it into memory on every server and keep it there, whatever else is asked for."""
    access = api.access(request)
    return await _ordered(api, access, name, Access.to_pin, lambda kept: _publisher(api).pin(kept, True, partial(access.check_pins, kept)))


@router.post("/v1/adapters/{name:path}/unpin", response_model=AdapterRow, responses=_ERRORS)
async def unpin(name: str, request: Request, api: OrdersApi) -> Response:
    """No longer keep it: it leaves memory when others need the room."""
    return await _ordered(api, api.access(request), name, Access.to_order, lambda kept: _publisher(api).pin(kept, False))


@router.post("/v1/adapters/{name:path}/rollback", response_model=AdapterRow, responses=_ERRORS)
async def roll_back(name: str, request: Request, api: OrdersApi) -> Response:
    """Let the version before answer again, under its own number, on every server. 409 if none is kept."""
    return await _ordered(api, api.access(request), name, Access.to_order, lambda kept: _publisher(api).roll_back(kept))


@router.post("/v1/adapters/{name:path}/unload", response_model=AdapterRow, responses=_ERRORS)
async def unload(name: str, request: Request, api: OrdersApi) -> Response:
    """Free its memory on every server when its last request there has ended. The name stays: a request for it loads it again."""
    return await _ordered(api, api.access(request), name, Access.to_order, lambda kept: _publisher(api).unload(kept))


@router.delete("/v1/adapters/{name:path}", response_model=DeletedAdapter, responses=_ERRORS)
async def delete(
    name: str,
    request: Request,
    api: OrdersApi,
    release: Annotated[bool, Query(description="Let go of the name: an id of that name in the default source answers then.")] = False,
) -> Response:
    """The name answers no more until it is published again; its memory is freed when its last request has ended.

    The source is left alone."""
    access = api.access(request)
    with api.ordering(access), _worded(access, api.source(None), name):
        await _delete(api, access, name, release)
    return json_response({"id": name, "object": "adapter", "deleted": True})


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse, responses=_ERRORS, openapi_extra=body_docs(LoadLoraRequest))
async def load_lora_adapter(request: Request, api: OrdersApi) -> Response:
    """vLLM's name of publishing. `lora_path` is a folder below --adapters-dir, `s3://bucket/key`, or an id of the default source."""
    body = await read_body(request, LoadLoraRequest, max_bytes=api.settings.max_body_bytes)
    source, adapter_id = _where(api, body.lora_path)
    access = api.access(request)
    name = access.to_publish(body.lora_name)
    access.to_read(source, adapter_id)
    with api.ordering(access), _worded(access, source, adapter_id):
        await _publisher(api).publish(Order(name, source, adapter_id, replace=body.load_inplace, check=partial(access.check_names, name)))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse, responses=_ERRORS, openapi_extra=body_docs(UnloadLoraRequest))
async def unload_lora_adapter(request: Request, api: OrdersApi) -> Response:
    """vLLM's name of deleting; here memory is freed as well."""
    body = await read_body(request, UnloadLoraRequest, max_bytes=api.settings.max_body_bytes)
    access = api.access(request)
    with api.ordering(access), _worded(access, api.source(None), body.lora_name):
        await _delete(api, access, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _publisher(api: Api) -> Publisher:
    """Orders are taken until the server drains."""
    if api.admission.draining:
        raise Unavailable(SHUTTING_DOWN, retry_after_s=5.0)
    return api.publisher


async def _delete(api: Api, access: Access, name: str, release: bool = False) -> None:
    kept = access.to_delete(name, release)
    check = partial(access.check_deleted, kept) if not release else lambda names: None
    await _publisher(api).delete(kept, release, check)


async def _ordered(
    api: Api, access: Access, name: str, of: Callable[[Access, str], str], give: Callable[[str], Awaitable[object]]
) -> Response:
    """Give an order about the name, as it is kept, and answer with its row."""
    kept = of(access, name)
    with api.ordering(access), _worded(access, api.source(None), name):
        await give(kept)
    return _row(api, kept, access)


@contextmanager
def _worded(access: Access, source: str, name: str) -> Iterator[None]:
    """What a tenant hears of an adapter that there is not: the words of one that is not its own."""
    try:
        yield
    except AdapterNotFound:
        if access.tenant is None:
            raise
        raise nowhere(AdapterSelection(source, name)) from None


def _id(selection: AdapterSelection, access: Access) -> str:
    """As the caller knows it."""
    return selection.adapter_id if access.tenant is None else shown(selection.adapter_id)


def _row(api: Api, kept: str, access: Access) -> Response:
    return json_response(api.status.row(AdapterSelection(api.source(None), kept), access))


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

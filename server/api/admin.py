"""Who may give orders to the server: whoever shows the admin key. Without such a key in the settings nobody may.

The key comes as a bearer token, or in GATEWAY_HEADER from a gateway that needs Authorization for its own callers. With tenants a tenant may
give orders too, about what is its own (OrdersApi): tenants.callers has seen who calls, tenants.access says what that one may."""

import hmac
from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from server.api.state import Api, ApiState
from server.api.tenants.callers import ADMIN_HEADER, caller_of
from server.errors import Forbidden, Unauthorized

_bearer = HTTPBearer(auto_error=False, scheme_name="admin_key", description="The server's --admin-key.")
GATEWAY_HEADER = ADMIN_HEADER
_gateway = APIKeyHeader(name=GATEWAY_HEADER, auto_error=False, scheme_name="admin_key_of_gateway", description="The same, from a gateway.")
Bearer = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]


async def admitted_admin(
    api: ApiState, request: Request, shown: Bearer, of_gateway: Annotated[str | None, Security(_gateway)] = None
) -> Api:
    """The Api, for the operator. Forbidden if there is no admin key or for a tenant, Unauthorized if the key was not shown."""
    if caller_of(request).tenant is not None:
        raise Forbidden("this is the operator's alone")
    key = api.settings.admin_key
    if key is None:
        raise Forbidden("orders about adapters are off on this server: set `admin_key` (MANYLORA_ADMIN_KEY) to allow them to its bearer")
    given = of_gateway or (shown.credentials if shown is not None else "")
    if not hmac.compare_digest(given.encode(), key.get_secret_value().encode()):
        raise Unauthorized("this needs `Authorization: Bearer KEY` with the server's admin key")
    return api


async def admitted_orders(
    api: ApiState, request: Request, shown: Bearer, of_gateway: Annotated[str | None, Security(_gateway)] = None
) -> Api:
    """The Api, for the operator or a tenant: the route must ask tenants.access what is the caller's. Errors as `admitted_admin`."""
    if caller_of(request).tenant is not None:
        return api
    return await admitted_admin(api, request, shown, of_gateway)


AdminApi = Annotated[Api, Depends(admitted_admin)]  # the operator's alone
OrdersApi = Annotated[Api, Depends(admitted_orders)]
ADMIN_ERRORS: dict[int, str] = {401: "The admin key is missing or wrong.", 403: "There is no admin key: these routes are off."}


def admin_responses(model: Any) -> dict[int | str, dict[str, Any]]:
    """The errors of this check for a route's `responses`."""
    return {status: {"model": model, "description": words} for status, words in ADMIN_ERRORS.items()}

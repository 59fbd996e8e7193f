"""From a request's headers to who calls, and the layer before the routes that lets nobody else through.

Owns the order in which credentials are looked at, which paths need none, and the answer to who has none. A route that is new is closed
until it stands in OPEN. Credentials are compared in constant time and stand in no answer and no log line. api.front puts `LetIn` around the
routes if there are tenants; a route asks `caller_of`.

    1. the admin key                                        the operator
    2. Authorization: Bearer mlk_...                        the key's tenant
    3. X-Manylora-Gateway-Key with X-Manylora-Tenant        whom the gateway names: believed only together with the gateway's key
    4. Authorization: Bearer <JSON web token>               the tenant of the token's claim
"""

import hmac
import ipaddress
import logging
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import parse_qsl

from fastapi import Request
from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.stream import error_response, native_error, openai_error
from server.api.tenants.keys import looks_like_key
from server.api.tenants.rules import Tenant
from server.api.tenants.tokens import refused
from server.errors import Forbidden, ServerError

log = logging.getLogger(__name__)

TENANT_HEADER, GATEWAY_KEY_HEADER, ADMIN_HEADER = "X-Manylora-Tenant", "X-Manylora-Gateway-Key", "X-Manylora-Admin-Key"
# What a health check, a browser without a key, and a reader of the documentation ask for; none of it names an adapter or a tenant.
OPEN = frozenset({"/", "/health", "/ping", "/startup", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json",
                  "/api-doc/openapi.json", "/ui"})  # fmt: skip
OPEN_BELOW = "/ui/"  # files of the page
NUMBERS = "/metrics"  # of all tenants: the operator's, and whoever is on this machine
_OPEN_METHODS = ("GET", "HEAD")
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")  # who is on this machine only passes it on
_IN_QUERY = re.compile(r"(?i)^(x[-_])?(api[-_]?)?(key|token|authorization|access[-_]token|bearer)$")
_A_TOKEN = re.compile(r"^ey[\w-]+\.[\w-]+\.[\w-]*$")
_STATE = "manylora.caller"


@dataclass(frozen=True)
class Caller:
    """Who sent a request. Without a tenant it is the operator; or anybody, where there are no tenants."""

    tenant: Tenant | None = None

    @property
    def name(self) -> str:
        """The tenant's name; "" without one."""
        return self.tenant.name if self.tenant is not None else ""


OPERATOR = Caller()


class Identities(Protocol):
    """What `tenancy` knows of credentials."""

    admin_key: SecretStr | None
    gateway_key: SecretStr | None

    def of_key(self, shown: str) -> Tenant | None:
        """Whose key it is; None for one that opens nothing."""
        ...

    def of_gateway(self, value: str) -> Tenant | None:
        """Whom the gateway means."""
        ...

    async def of_token(self, token: str) -> Tenant | None:
        """Whom a JSON web token means. Unauthorized, Unavailable; None if its tenant is not one of ours or no tokens are taken."""
        ...

    def refuses(self, reason: str) -> None:
        """Somebody was refused; counts."""
        ...


def caller_of(request: Request) -> Caller:
    """Who sent it."""
    return request.scope.get(_STATE, OPERATOR)


class LetIn:
    """Answers whoever has no right to a path, and tells the routes who the others are."""

    def __init__(self, app: ASGIApp, identities: Identities) -> None:
        self._app, self._identities = app, identities

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope):
            await self._app(scope, receive, send)
            return
        try:
            caller = await self._identify(scope)
        except ServerError as error:
            reason = error.code or error.error_type
            self._identities.refuses(reason)
            log.info("refused: %s %s (%s)", scope["method"], "/v1" if scope["path"].startswith("/v1/") else "/", reason)
            dialect = openai_error if scope["path"].startswith("/v1/") else native_error
            await error_response(error, dialect)(scope, receive, send)
            return
        await self._app(dict(scope) | {_STATE: caller}, receive, send)

    async def _identify(self, scope: Scope) -> Caller:
        headers: defaultdict[str, list[str]] = defaultdict(list)
        for name, value in scope["headers"]:
            headers[name.decode("latin-1").lower()].append(value.decode("latin-1").strip())
        _check_query(scope.get("query_string", b""))
        if scope["path"] != NUMBERS:
            return await identify(self._identities, headers)
        if _is_near(scope, headers):
            return OPERATOR
        if (caller := await identify(self._identities, headers)).tenant is not None:
            error = Forbidden("these are the numbers of all tenants: the operator's alone")
            error.code = "operator_only"
            raise error
        return caller


async def identify(known: Identities, headers: defaultdict[str, list[str]]) -> Caller:
    """Who shows these headers (names in lower case). Unauthorized, whose code and words name what is wrong."""
    if any(len(headers[name.lower()]) > 1 for name in ("authorization", TENANT_HEADER, GATEWAY_KEY_HEADER, ADMIN_HEADER)):
        raise refused("credential_twice", "a header that says who calls may stand in a request once")
    scheme, _, bearer = (headers["authorization"] or [""])[0].partition(" ")
    bearer = bearer.strip() if scheme.lower() == "bearer" else ""
    if _is_right((headers[ADMIN_HEADER.lower()] or [bearer])[0], known.admin_key):
        return OPERATOR
    if looks_like_key(bearer):
        return _tenant(known.of_key(bearer), "key_unknown", "the API key is not known here, has expired or was revoked")
    if _is_right((headers[GATEWAY_KEY_HEADER.lower()] or [""])[0], known.gateway_key):
        named = (headers[TENANT_HEADER.lower()] or [""])[0]
        return _tenant(known.of_gateway(named), "tenant_unknown", "the gateway's caller is not a tenant of this server")
    if not bearer:
        raise refused("credential_missing", "this needs `Authorization: Bearer KEY` with a key or token of a tenant")
    return _tenant(await known.of_token(bearer), "credential_unknown", "the bearer's credential is not that of a tenant of this server")


def _tenant(tenant: Tenant | None, code: str, why: str) -> Caller:
    if tenant is None:
        raise refused(code, why)
    return Caller(tenant)


def _is_right(shown: str, key: SecretStr | None) -> bool:
    if key is None:
        return False
    return hmac.compare_digest(shown.encode("utf-8", errors="surrogatepass"), key.get_secret_value().encode())


def _is_open(scope: Scope) -> bool:
    path = scope["path"]
    return scope["method"] in _OPEN_METHODS and (path in OPEN or path.startswith(OPEN_BELOW))


def _is_near(scope: Scope, headers: defaultdict[str, list[str]]) -> bool:
    """Whether it comes from this very machine, and not through a proxy on it that says so."""
    host = (scope.get("client") or ("",))[0]
    try:
        return ipaddress.ip_address(host).is_loopback and not any(headers[name] for name in _FORWARDED)
    except ValueError:
        return False


def _check_query(query: bytes) -> None:
    """A credential in an address would end in logs, of ours and of others."""
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if _IN_QUERY.match(name) or looks_like_key(value) or _A_TOKEN.match(value):
            raise refused("key_in_query", "a credential in the address is not taken (addresses are logged): send `Authorization: Bearer`")

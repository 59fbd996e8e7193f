"""Which of the server's routes the gateway maps, and for whom: data, without a construct in it.

Owns the list. `Endpoint` makes a method of each row; nothing is mapped by a wildcard but the files of the page. A test compares the list
with the routers of `server.api`: a route of the server is either here or in NOT_MAPPED, with the reason.
"""

from dataclasses import dataclass, replace
from enum import Enum


class Access(Enum):
    """Who may call a route."""

    CALLER = "whoever is authenticated"
    ADMIN = "callers whose authorization says so; not mapped where the auth mode cannot tell them apart"
    ANYONE = "no key: the page and its files, which hold no data"


@dataclass(frozen=True)
class Route:
    """One method of one path. `{name}` is a segment of a path, `{name+}` all that follows."""

    method: str
    path: str
    access: Access = Access.CALLER
    generates: bool = False  # answers as long as tokens come: streamed through, with the longest timeout


def _generating(*paths: str) -> tuple[Route, ...]:
    return tuple(Route("POST", path, generates=True) for path in paths)


# Streaming mode for plain JSON too: a buffered answer ends at 29 seconds.
ROUTES: tuple[Route, ...] = (
    *_generating("/", "/generate", "/generate_stream", "/invocations", "/v1/completions", "/v1/chat/completions"),
    Route("POST", "/tokenize"),
    Route("GET", "/"),
    Route("GET", "/health"),
    Route("GET", "/info"),
    Route("GET", "/v1/models"),
    Route("GET", "/v1/models/{name+}"),  # a name may hold slashes
    Route("GET", "/docs"),
    Route("GET", "/openapi.json"),
    *(Route(method, "/v1/adapters", Access.ADMIN) for method in ("GET", "POST")),
    *(Route(method, "/v1/adapters/{name+}", Access.ADMIN) for method in ("GET", "POST", "DELETE")),
    Route("GET", "/v1/intake", Access.ADMIN),
    Route("GET", "/v1/stats", Access.ADMIN),
    Route("GET", "/ui", Access.ANYONE),
    Route("GET", "/ui/{file+}", Access.ANYONE),
)

NOT_MAPPED: dict[str, str] = {
    "GET /metrics": "one instance's numbers, of all tenants; the agent on the instance reads them",
    "GET /ping": "SageMaker's name of /health; nobody of the gateway's callers asks for it",
    "GET /startup": "the fleet's own question, asked on the instance",
    "POST /v1/load_lora_adapter": "vLLM's name of an order that /v1/adapters takes",
    "POST /v1/unload_lora_adapter": "vLLM's name of an order that /v1/adapters takes",
    "POST /embed": "the server answers that its model generates text",
    "POST /v1/embeddings": "the server answers that its model generates text",
    "POST /classify": "the server answers that its model generates text",
    "POST /classify_batch": "the server answers that its model generates text",
    "GET /redoc": "the same document as /docs",
    "GET /docs/oauth2-redirect": "/docs has no login of its own",
}


def mapped(*, has_admin: bool, tenants: bool = False) -> tuple[Route, ...]:
    """The routes of an endpoint whose auth mode can (`has_admin`) or cannot tell an admin from a caller.

    `tenants`: where it cannot, the admin routes are every caller's: the servers give each tenant what is its own."""
    if tenants and not has_admin:
        return tuple(replace(route, access=Access.CALLER) if route.access is Access.ADMIN else route for route in ROUTES)
    return tuple(route for route in ROUTES if has_admin or route.access is not Access.ADMIN)

"""What stands before the routes: the prefix that a gateway leaves, the answers to browsers' questions about other origins (CORS), and, with
tenants, who may come in at all.

Owns the order of the layers, no state. api.app puts them around the application.
"""

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.tenants.callers import Identities, LetIn
from server.api.tracing import TraceParent
from server.settings import Settings


class RootPath:
    """Takes `prefix` off the paths that have it; the others are served as they are, so that a health check needs no prefix.

    `scope["root_path"]` tells the routes of the prefix (ASGI's meaning), for the links in /docs."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app, self._prefix = app, prefix.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and (path == self._prefix or path.startswith(self._prefix + "/")):
            raw = scope.get("raw_path") or b""
            scope = dict(scope) | {
                "path": path[len(self._prefix) :] or "/",
                "raw_path": raw.removeprefix(self._prefix.encode()) or b"/",
                "root_path": scope.get("root_path", "") + self._prefix,
            }
        await self._app(scope, receive, send)


def check_root_path(prefix: str, app: FastAPI) -> None:
    """ValueError if a route of ours begins with the prefix: its requests could not be told from those of the prefix."""
    paths = {getattr(route, "path", "") for route in app.routes}
    if prefix and any(path == prefix or path.startswith(prefix + "/") for path in paths):
        raise ValueError(f"--root-path {prefix}: the server has routes of that name")


def put_before(app: FastAPI, settings: Settings, identities: Identities | None = None) -> None:
    """Add the layers that the settings ask for. lorax-strict: LoRAX's CORS, open to every origin, unless origins are named.

    `identities`: who is known, if callers are told apart. Inside of CORS: a browser may read a refusal, and its preflight needs no key."""
    if identities is not None:
        app.add_middleware(LetIn, identities=identities)
    if settings.otlp_endpoint is not None:
        app.add_middleware(TraceParent)
    strict = settings.lorax_strict and not settings.cors_allow_origin
    if settings.cors_allow_origin or strict:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=["*"] if strict else settings.cors_allow_origin,
            allow_methods=settings.cors_allow_method,
            allow_headers=settings.cors_allow_header,
            expose_headers=settings.cors_expose_header,
            allow_credentials=settings.cors_allow_credentials and not strict,
        )
    if settings.root_path:
        check_root_path(settings.root_path, app)
        app.add_middleware(RootPath, prefix=settings.root_path)

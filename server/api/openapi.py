"""The OpenAPI document: FastAPI's own, with the schemas of the bodies and streams that the routes read and write themselves.

Owns the document alone. The routes name their schema by body_docs and stream_docs (api.body); api.app calls `describe`.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

_ABOUT = """\
LoRAX's REST API and OpenAI's in one server. Every adapter is chosen by the request: `adapter_id` in LoRAX's routes, `model` in OpenAI's.
A field that is unknown, or known and not served, is refused by name. A request body is at most 2 MiB unless the server is set otherwise.
"""


def describe(app: FastAPI, schemas: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    """The document, made once. `schemas`: all that the routes refer to by name."""
    if not app.openapi_schema:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, description=_ABOUT, routes=app.routes)
        known = document.setdefault("components", {}).setdefault("schemas", {})
        for body in schemas:
            schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
            known.update(schema.pop("$defs", {}))
            known[body.__name__] = schema
        _say_that_errors_are_json(document)
        app.openapi_schema = document
    return app.openapi_schema


def _say_that_errors_are_json(document: dict[str, Any]) -> None:
    """FastAPI gives an error's model the content type of the route's answer, text/plain for one; ours are JSON everywhere."""
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                content = response.get("content", {})
                if status >= "4" and "text/plain" in content:
                    content["application/json"] = content.pop("text/plain")

"""GET /v1/intake: where adapters are put for this server to find them, and what one must fit; for whoever shows the admin key.

Owns the document. With it `python -m server adapters push` knows the place, and refuses what this server would refuse before it uploads.
"""

from typing import Any

import msgspec
from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from server.api.admin import AdminApi, admin_responses
from server.api.schemas_common import ResponseModel
from server.api.schemas_openai import OpenAIError
from server.api.state import Api
from server.api.stream import json_response
from server.errors import Unavailable

router = APIRouter(tags=["adapters"])


class Place(ResponseModel):
    """Where a source looks for ids: NAME lies at `place`/NAME."""

    source: str
    place: str = Field(description="s3://bucket/folder, or a folder of the server's file system.", examples=["s3://models/adapters"])
    endpoint_url: str | None = Field(description="An S3-compatible service other than AWS.")
    region: str | None


class Intake(ResponseModel):
    """Where, and what."""

    object: str
    default_source: str = Field(description="Names are of this source.")
    places: list[Place] = Field(description="None for a source that is off, or that is not ours to write to (hub).")
    max_adapter_bytes: int
    layout: dict[str, Any] = Field(description="The base's sites and modules, as server.types.BaseLayout has them.")


@router.get("/v1/intake", response_model=Intake, responses={**admin_responses(OpenAIError), 503: {"model": OpenAIError}})
async def intake(api: AdminApi) -> Response:
    """Where to put an adapter, and the base that it must fit. 503 until the engine has said what the base looks like."""
    ready = api.engine.last_ready
    if ready is None:
        raise Unavailable(api.engine.unhealthy_reason() or "the engine is not ready", retry_after_s=5.0)
    return json_response(
        {
            "object": "intake",
            "default_source": api.source(None),
            "places": places(api),
            "max_adapter_bytes": int(api.settings.max_adapter_bytes),
            "layout": msgspec.to_builtins(ready.layout),
        }
    )


def places(api: Api) -> list[dict[str, Any]]:
    """A Place for each source that adapters can be put into."""
    settings, found = api.settings, []
    if settings.adapters_dir is not None:
        found.append({"source": "local", "place": str(settings.adapters_dir.resolve()), "endpoint_url": None, "region": None})
    if settings.model_bucket is not None:
        folder = "/".join(filter(None, (settings.model_bucket, (settings.model_folder or "").strip("/"))))
        found.append({"source": "s3", "place": f"s3://{folder}", "endpoint_url": settings.s3_endpoint_url, "region": settings.s3_region})
    return found

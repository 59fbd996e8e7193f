"""Bodies and answers of the routes about adapters."""

from typing import ClassVar

from pydantic import Field

from server.api.schemas_common import RequestModel, ResponseModel

_NAME = Field(
    min_length=1, max_length=1024, description="What requests will call it. A path without empty or hidden parts.", examples=["sql"]
)


class PublishRequest(RequestModel):
    """Give a name the weights that a source holds now."""

    name: str = _NAME
    source: str | None = Field(default=None, description="local, s3 or hub; the server's own if not given.", examples=["local"])
    id: str | None = Field(
        default=None, min_length=1, max_length=1024, description="Where it is in the source; `name` if not given.", examples=["team/sql-v3"]
    )
    api_token: str | None = Field(default=None, max_length=4096, description="For a source that knows its callers.")
    replace: bool = Field(default=True, description="false: refuse with 409 if the name is published already.")
    owner: str | None = Field(
        default=None, max_length=63, description="With tenants, in an order of the operator: whose it is to be; null: everybody's."
    )
    pin: bool | None = Field(default=None, description="Keep it in memory on every server, or no longer; unchanged if not given.")


class AdapterRow(ResponseModel):
    """One adapter as this server sees it."""

    id: str
    object: str
    source: str
    source_id: str = Field(description="Its id in the source.")
    version: int | None = Field(description="1, 2, ...; null unless it was published.")
    past_versions: list[int] = Field(description="Numbers of the versions that rollbacks go back to, the oldest first.")
    published_at: int | None = Field(description="Seconds since 1970.")
    hash: str | None = Field(description="Of config and weights; null until it was first asked for.")
    base: str | None = Field(description="The base model that its config names.")
    rank: int | None = Field(description="Its highest rank.")
    state: str = Field(description="idle, fetching, loading, ready or failed.", examples=["ready"])
    tier: str = Field(description="Where its weights are on this server: absent, disk, host or device.", examples=["device"])
    file_bytes: int | None
    memory_bytes: int
    load_s: float | None
    error: str | None = Field(description="Why the engine could not load it.")
    hits: int | None = Field(description="Requests that named it, on this server since its start; null for a tenant and a shared adapter.")
    requests: int | None = Field(description="Requests that run with it on this server now; null for a tenant and a shared adapter.")
    pinned: bool
    owner: str | None = Field(default=None, description="The tenant whose it is; null: shared. Only with tenants.")


class DrainingRow(ResponseModel):
    """Weights that no name means any more."""

    hash: str
    requests: int
    memory_bytes: int


class AdapterList(ResponseModel):
    """A page of adapters."""

    object: str
    generation: int | None = Field(
        description="Of the registry: grows with every order, on whichever server it was given; null for tenants."
    )
    data: list[AdapterRow]
    has_more: bool
    draining: list[DrainingRow] = Field(description="Replaced, unloaded or deleted weights that requests still end with.")


class DeletedAdapter(ResponseModel):
    """A name that answers no more."""

    id: str
    object: str
    deleted: bool


class LoadLoraRequest(RequestModel):
    """vLLM's request of that name."""

    lora_name: str = _NAME
    lora_path: str = Field(
        min_length=1, max_length=4096, description="A folder below --adapters-dir, or an id of a source.", examples=["team/sql-v3"]
    )
    load_inplace: bool = Field(default=False, description="Replace a name that is published.")


class UnloadLoraRequest(RequestModel):
    """vLLM's request of that name."""

    not_served: ClassVar = {"lora_int_id": (": adapters have names alone", (None,))}

    lora_name: str = _NAME

"""The deployment's configuration: read from config/<env>.toml and `-c section.key=value`, checked, frozen, passed on.

Owns the ways in, the rules between sections and the errors; the sections' own rules are in `sections` and `sections_service`. Knows nothing
of CDK and reads no environment variable. `app.py`, `push_model` and the tests call it.
"""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from infra.errors import ConfigError
from infra.regions import REGIONS
from infra.sections import Arn, ImageConfig, ModelConfig, NetworkConfig, Section, StorageConfig
from infra.sections_plan import PlanConfig
from infra.sections_service import EndpointConfig, FleetConfig, ObservabilityConfig, ScalingConfig
from infra.server_settings import check_server_settings

__all__ = ["ConfigError", "KitConfig"]


class KitConfig(Section):
    """Everything that a deployer may change. Made by `load`; see each field's description."""

    name: str = Field(
        "manylora", pattern=r"^[a-z][a-z0-9-]{1,22}[a-z0-9]$", description="Names the stacks; 3 to 24 of a-z, 0-9 and -, a letter first."
    )
    region: str | None = Field(None, description="Region; none: the command line's.")
    tags: dict[str, str] = Field({}, description="Tags on every resource.")
    permissions_boundary: Arn | None = Field(None, description="Policy that bounds every role made.")
    retain_data: bool = Field(False, description="Keep bucket and file system on destroy, and protect the stacks from being deleted.")
    kms_key_arn: Arn | None = Field(None, description="A key of yours for bucket, file system, volumes and logs; none: AWS's.")
    network: NetworkConfig = NetworkConfig()
    storage: StorageConfig = StorageConfig()
    image: ImageConfig = ImageConfig()
    fleet: FleetConfig = FleetConfig()
    scaling: ScalingConfig = ScalingConfig()
    model: ModelConfig = ModelConfig()
    plan: PlanConfig = PlanConfig()
    server: dict[str, Any] = Field({}, description="Settings of the server by name, as in docs/settings.md with underscores.")
    endpoint: EndpointConfig = EndpointConfig()
    observability: ObservabilityConfig = ObservabilityConfig()

    @classmethod
    def load(cls, env: str, root: Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """The configuration of environment `env`: `root`/config/`env`.toml, then `overrides`.

        An override's key is dotted (`fleet.max`); a string value is read as TOML where it is TOML (`4`, `true`, `["a"]`), else as text.
        ConfigError names every key that cannot be and what is allowed."""
        path = root / "config" / f"{env}.toml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in path.parent.glob("*.toml")))
            raise ConfigError(f"env {env}: {path} does not exist. Allowed: {known}")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: {error}") from None
        for key, value in (overrides or {}).items():
            _put(values, key, _parsed(value) if isinstance(value, str) else value)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError("\n".join([f"the configuration of env {env} ({path}) cannot be:", *_lines(error)])) from None

    @field_validator("region")
    @classmethod
    def _check_region(cls, region: str | None) -> str | None:
        if region is not None and region not in REGIONS:
            near = difflib.get_close_matches(region, REGIONS, n=3, cutoff=0.4) or sorted(REGIONS)
            raise ValueError(f"{region} is not a region. Near it: {', '.join(near)}")
        return region

    @field_validator("tags")
    @classmethod
    def _check_tags(cls, tags: dict[str, str]) -> dict[str, str]:
        for key, value in tags.items():
            if not 1 <= len(key) <= 128 or len(value) > 256 or key.lower().startswith("aws:"):
                raise ValueError(f"{key}: a tag's key has 1 to 128 characters and no aws: in front, its value up to 256")
        return tags

    @field_validator("server")
    @classmethod
    def _check_server(cls, settings: dict[str, Any]) -> dict[str, Any]:
        check_server_settings(settings)
        return settings

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if not self.network.has_way_out:
            if self.image.kind == "dlami" and self.image.wheelhouse_prefix is None:
                raise ValueError(
                    "network.nat none leaves no way to install the server at boot: set image.kind to baked or ami, or put wheels into the "
                    "bucket and name them in image.wheelhouse_prefix"
                )
            if self.model.hub:
                raise ValueError("model.hub cannot be had with network.nat none: the hub cannot be reached")
            if self.observability.tracing == "otlp":
                raise ValueError("observability.tracing otlp cannot be had with network.nat none unless its collector is inside: use xray")
        if "idle_minutes" in self.scaling.model_fields_set and not self.fleet.scale_to_zero:
            raise ValueError("scaling.idle_minutes needs fleet.scale_to_zero = true: without it no fleet ends for being idle")
        if self.endpoint.private and self.network.vpc_id and not self.endpoint.vpc_endpoint_ids:
            raise ValueError("endpoint.vpc_endpoint_ids must name execute-api endpoints where endpoint.private meets network.vpc_id")
        zones = self.network.availability_zones
        if self.region and any(not zone.startswith(self.region) for zone in zones):
            raise ValueError(f"network.availability_zones must lie in region {self.region}. Given: {', '.join(zones)}")
        return self


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key`."""
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {parent} is not a section")
    values[last] = value


def _parsed(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _lines(error: ValidationError) -> list[str]:
    """One line a fault: the dotted key, what is wrong, what is allowed."""
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            allowed = sorted(_section(fault["loc"][:-1]).model_fields)
            near = difflib.get_close_matches(str(fault["loc"][-1]), allowed, n=1)
            message = f"unknown key{f' (did you mean {near[0]}?)' if near else ''}. Allowed: {', '.join(allowed)}"
        elif fault["type"] != "value_error":
            message = f"{message}. Given: {fault['input']!r}"
        lines.append(f"  {key or 'configuration'}: {message}")
    return lines


def _section(loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The model that a fault's location lies in."""
    model: type[BaseModel] = KitConfig
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[str(part)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(found for found in candidates if isinstance(found, type) and issubclass(found, BaseModel))
    return model

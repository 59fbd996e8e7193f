"""What of the settings is the sources', and what of it no request could ever use. Pure functions; api.app calls both."""

from typing import Any

from server.errors import ServerError
from server.settings import Settings
from server.sources import SourceOptions, canonical_name


def check_sources(settings: Settings) -> None:
    """ValueError, naming the setting, for what no request could ever use."""
    for flag, name in (("--adapter-source", settings.adapter_source), ("--default-adapter-source", settings.default_adapter_source)):
        try:
            canonical_name(name or settings.adapter_source)
        except ServerError as error:
            raise ValueError(f"{flag}: {error.message}") from None
    if settings.adapters_dir is not None and not settings.adapters_dir.is_dir():
        raise ValueError(f"--adapters-dir {settings.adapters_dir}: there is no such folder")


def source_options(settings: Settings) -> SourceOptions:
    """What of the settings is the sources'."""
    options: dict[str, Any] = {
        "adapters_dir": settings.adapters_dir,
        "allowed_buckets": tuple(settings.allowed_buckets),
        "model_bucket": settings.model_bucket,
        "model_folder": settings.model_folder,
        "s3_endpoint_url": settings.s3_endpoint_url,
        "s3_region": settings.s3_region,
        "hub_enabled": settings.hub_enabled,
        "hub_endpoint": settings.hub_endpoint,
        "allowed_hub_owners": tuple(settings.allowed_hub_owners),
        "max_adapter_bytes": int(settings.max_adapter_bytes),
        "connect_timeout_s": settings.source_connect_timeout_s,
        "read_timeout_s": settings.source_read_timeout_s,
        "num_retries": settings.source_retries,
    }
    return SourceOptions(**{name: value for name, value in options.items() if value is not None})

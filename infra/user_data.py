"""ami/user-data.sh with a deployment's variables: the one place where the two halves of the product meet.

Owns the values: what mounts, where the model comes from, and the server's environment (MANYLORA_*). Does not know what the script does with
them. `fleet` calls it; tests hold the names to the script's and to the server's settings.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from infra.config import KitConfig
from infra.endpoint import edge_settings
from infra.server_settings import environment_value
from infra.storage import SharedFiles
from infra.storage.base import MOUNT_POINT

SCRIPT = Path(__file__).resolve().parent.parent / "ami" / "user-data.sh"
MAX_BYTES = 16 << 10  # EC2's
PREFIX = "MANYLORA_"
MODEL_LINK = "/var/lib/manylora/model"
SHARED_DIR = f"{MOUNT_POINT}/base"  # the base models of a file system that is not the bucket itself
CACHE_ROOT = "/opt/dlami/nvme"  # where the Deep Learning AMI mounts the instance store
AGENT_COLLECTOR = "http://127.0.0.1:4318"  # the CloudWatch agent takes OTLP there and hands it to X-Ray (ami/cloudwatch-agent.json)
_BLOCK = re.compile(r"(?<=# >>> variables\n).*?(?=# <<< variables\n)", re.DOTALL)
_DECLARED = re.compile(r"^([A-Z][A-Z0-9_]*)=", re.MULTILINE)


def render(variables: Mapping[str, str], script: Path = SCRIPT) -> str:
    """The script with `variables` in its block. ValueError for a name that the script does not declare, one that is missing, or a
    value that cannot stand between single quotes."""
    text = script.read_text(encoding="utf-8")
    block = _BLOCK.search(text)
    if block is None:
        raise ValueError(f"{script} has no block of variables")
    declared = {name for name in _DECLARED.findall(block[0]) if not name.startswith(PREFIX)}
    given = {name for name in variables if not name.startswith(PREFIX)}
    if declared != given:
        raise ValueError(f"user-data: undeclared {sorted(given - declared)}, missing {sorted(declared - given)}")
    for name, value in variables.items():
        if "'" in value or "\n" in value:
            raise ValueError(f"user-data: {name} must not hold a quote or a line break. Given: {value!r}")
    lines = "".join(f"{name}='{value}'\n" for name, value in variables.items())
    return text[: block.start()] + lines + text[block.end() :]


def server_environment(config: KitConfig, *, shared_files: SharedFiles, bucket_name: str, port: int, region: str) -> dict[str, str]:
    """The server's settings as its environment: the kit's own, then those of [server]."""
    model = config.model
    settings = {
        "model_id": MODEL_LINK,
        "served_model_name": model.id,
        "device": "cuda",
        "adapters_dir": f"{MOUNT_POINT}/{model.adapters_prefix}".rstrip("/"),
        # Where the bucket's objects are files, they are read as files; else from the bucket, once a fleet, into the shared store.
        "adapter_source": "local" if shared_files.shows_bucket else "s3",
        "registry_dir": f"{MOUNT_POINT}/registry",  # names, versions and keys: every instance reads the same
        "model_bucket": bucket_name,
        "model_folder": model.adapters_prefix.rstrip("/"),
        "s3_region": region,
        "hub_enabled": model.hub,
        "allowed_hub_owners": list(model.hub_owners),
        "hostname": "0.0.0.0",  # the load balancer's security group alone may reach it
        "port": port,
        "drain_timeout_s": config.fleet.drain_s,
        "json_output": True,
    }
    collector = {"off": None, "xray": AGENT_COLLECTOR, "otlp": config.observability.otlp_endpoint}[config.observability.tracing]
    if collector:
        settings["otlp_endpoint"] = collector
    if model.revision:
        settings["revision"] = model.revision
    if config.observability.otlp_endpoint:
        settings["otlp_endpoint"] = config.observability.otlp_endpoint
    if not shared_files.shows_bucket:
        settings["store_dir"] = f"{MOUNT_POINT}/store"  # user-data puts it on the instance store otherwise
    if config.endpoint.tenants:
        settings["tenants_file"] = f"{settings['registry_dir']}/tenants.toml"  # user-data puts a first one there
    settings |= edge_settings(config) | config.server
    return {f"{PREFIX}{name.upper()}": environment_value(value) for name, value in settings.items()}

"""One world for each registered source: a place that really holds adapters, and the options that lead there.

conftest.py has a fixture of the source's name for each; the contract test runs through all and fails for a source without one.
"""

import json
import os
import time
import urllib.request
from pathlib import Path
from typing import Any, Protocol

from server.sources import SourceOptions, content
from tests.server.sources.hub_stand_in import HubStandIn

BUCKET = "models-bucket"


def adapter_files(seed: int = 0, size_bytes: int = 3000, extra: dict[str, bytes] | None = None) -> dict[str, bytes]:
    """Files that look like an adapter to a source (which never looks inside); as long for every seed."""
    config = json.dumps({"peft_type": "LORA", "r": 8, "seed": f"{seed:06}"}).encode()
    weights = bytes((seed + i) % 251 for i in range(size_bytes))
    return {"adapter_config.json": config, "adapter_model.safetensors": weights, **(extra or {})}


class World(Protocol):
    """What the contract test needs of a place that holds adapters."""

    def options(self, **changes: Any) -> SourceOptions:
        """Options under which `put` ids can be read."""
        ...

    def adapter_id(self, name: str) -> str:
        """The id under which a request asks for it; `name` is one segment."""
        ...

    def put(self, name: str, files: dict[str, bytes]) -> None:
        """Make or wholly replace an adapter."""
        ...


class LocalWorld:
    """A folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)

    def options(self, **changes: Any) -> SourceOptions:
        return SourceOptions(**{"adapters_dir": self.root, **changes})

    def adapter_id(self, name: str) -> str:
        return f"team/{name}"

    def put(self, name: str, files: dict[str, bytes]) -> None:
        folder = self.root / "team" / name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if old.name not in files:
                old.unlink()
        for file, data in files.items():
            (folder / file).write_bytes(data)


class S3World:
    """A bucket in moto's server, which is emptied first."""

    def __init__(self, endpoint: str) -> None:
        import boto3

        urllib.request.urlopen(f"{endpoint}/moto-api/reset", data=b"").close()
        self.endpoint = endpoint
        self.client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        self.client.create_bucket(Bucket=BUCKET)

    def options(self, **changes: Any) -> SourceOptions:
        mine = {"s3_endpoint_url": self.endpoint, "s3_region": "us-east-1", "model_bucket": BUCKET, "model_folder": "adapters"}
        return SourceOptions(**{**mine, "num_retries": 1, "connect_timeout_s": 2.0, "read_timeout_s": 2.0, **changes})

    def adapter_id(self, name: str) -> str:
        return f"team/{name}"

    def put(self, name: str, files: dict[str, bytes]) -> None:
        prefix = f"adapters/team/{name}/"
        for item in self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", ()):
            self.client.delete_object(Bucket=BUCKET, Key=item["Key"])
        for file, data in files.items():
            self.client.put_object(Bucket=BUCKET, Key=prefix + file, Body=data)


class HubWorld:
    """A repository in the stand-in."""

    def __init__(self, hub: HubStandIn) -> None:
        self.hub = hub

    def options(self, **changes: Any) -> SourceOptions:
        mine = {"hub_enabled": True, "hub_endpoint": self.hub.endpoint, "allowed_hub_owners": ("team",), "read_timeout_s": 5.0}
        return SourceOptions(**{**mine, **changes})

    def adapter_id(self, name: str) -> str:
        return f"team/{name}"

    def put(self, name: str, files: dict[str, bytes]) -> None:
        self.hub.commit(f"team/{name}", files)


def settle(folder: Path) -> None:
    """Wait until the files in a folder are old enough for their stat signature to be trusted."""
    youngest = max(os.stat(path).st_ctime for path in folder.iterdir())
    time.sleep(max(0.0, youngest + content.SETTLE_S + 0.05 - time.time()))

"""Small folders that look like models, and where they can come from."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

from server.host.manifest import MANIFEST_NAME, Manifest, ModelFile

CONTENT = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": bytes(range(256)) * 200,
    "model-00002-of-00002.safetensors": b"w" * 30_000,
}


def manifest_of(content: dict[str, bytes]) -> Manifest:
    return Manifest.of(ModelFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items())


def write_model(folder: Path, content: dict[str, bytes] = CONTENT) -> Manifest:
    """A folder as push_model would leave it."""
    folder.mkdir(parents=True)
    manifest = manifest_of(content)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
    return manifest


def put_model(client: Any, bucket: str, prefix: str, content: dict[str, bytes] = CONTENT) -> Manifest:
    """The same in a bucket."""
    manifest = manifest_of(content)
    for name, data in {**content, MANIFEST_NAME: manifest.to_json()}.items():
        client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=data)
    return manifest


def zip_model(path: Path, content: dict[str, bytes] = CONTENT) -> Manifest:
    manifest = manifest_of(content)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**content, MANIFEST_NAME: manifest.to_json()}.items():
            archive.writestr(name, data)
    return manifest


def unwhole(folder: Path, content: dict[str, bytes] = CONTENT) -> list[str]:
    """Names of the files of a delivered folder that are not what they should be."""
    return [name for name, data in content.items() if not (folder / name).is_file() or (folder / name).read_bytes() != data]

"""ServerArtifact: the server's source as one asset, which instances and the image's recipe install.

Owns what is in it: server/, sizing/, ami/, the GPU's constraints, and the list of packages that the server needs. Names the archive by its
content, so that an edit elsewhere in the repository changes no instance.
"""

import hashlib
import io
import os
import tomllib
import zipfile
from pathlib import Path

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from aws_cdk import aws_s3_assets as assets
from constructs import Construct

ROOT = Path(__file__).resolve().parent.parent
_TREES, _FILES = ("server", "sizing", "ami"), ("constraints-gpu.txt", "LICENSE")
_SUFFIXES = {".py", ".sh", ".txt", ".toml", ".json", ".yml", ".service", ".conf", ".jinja", ".html", ".css", ".js", ".svg"}
REQUIREMENTS = "requirements.txt"
EXTRAS = ("server", "tracing")  # of pyproject.toml
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the zip format's first day: the same content makes the same bytes


class ServerArtifact(Construct):
    """asset (s3_assets.Asset); digest: of the content; lock: of what is installed beside it."""

    def __init__(self, scope: Construct, id: str, *, root: Path = ROOT) -> None:
        super().__init__(scope, id)
        content = read_content(root)
        self.digest, self.lock = digest_of(content), lock_of(content)
        path = root / ".cache" / "artifact" / f"manylora-server-{self.digest[:16]}.zip"
        write_archive(content, path)
        self.asset = assets.Asset(
            self, "Asset", path=str(path), asset_hash=self.digest, asset_hash_type=cdk.AssetHashType.CUSTOM, display_name="the server"
        )

    @property
    def uri(self) -> str:
        """s3://bucket/key of the archive."""
        return self.asset.s3_object_url

    def grant_read(self, role: iam.IGrantable) -> None:
        """Let `role` fetch this archive and nothing beside it."""
        arn = self.asset.bucket.arn_for_objects(self.asset.s3_object_key)
        role.grant_principal.add_to_principal_policy(iam.PolicyStatement(actions=["s3:GetObject"], resources=[arn]))


def read_content(root: Path = ROOT) -> dict[str, bytes]:
    """The archive's files by their path in it, sorted."""
    paths = [path for tree in _TREES for path in (root / tree).rglob("*") if path.suffix in _SUFFIXES and path.is_file()]
    content = {path.relative_to(root).as_posix(): path.read_bytes() for path in [*paths, *(root / name for name in _FILES)]}
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    content[REQUIREMENTS] = "".join(f"{line}\n" for extra in EXTRAS for line in extras[extra]).encode()
    return dict(sorted(content.items()))


def digest_of(content: dict[str, bytes]) -> str:
    """SHA-256 over names and bytes."""
    digest = hashlib.sha256()
    for name, data in content.items():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def lock_of(content: dict[str, bytes]) -> str:
    """Names the environment that the server runs in; the same arithmetic as in ami/install.sh."""
    digest = hashlib.sha256()
    for name in ("constraints-gpu.txt", REQUIREMENTS, "ami/kernels.txt"):
        digest.update(content[name])
    return digest.hexdigest()[:16]


def write_archive(content: dict[str, bytes], path: Path) -> None:
    """The zip file, whole or not at all; nothing if it is there."""
    if path.exists():
        return
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = (0o755 if name.endswith(".sh") else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.part")  # two may synthesize at once
    fresh.write_bytes(buffer.getvalue())
    fresh.replace(path)

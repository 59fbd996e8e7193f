"""Storage: the bucket, and the shared file systems behind one seam.

`SHARED_FILES` is the registry: a further kind is one file with one class, one line here and one value of `storage.kind`; the contract test
runs through all of them.
"""

from constructs import Construct

from infra.config import KitConfig
from infra.network import Network
from infra.storage.base import SharedFiles
from infra.storage.bucket import Bucket
from infra.storage.efs import Efs
from infra.storage.fsx import Fsx
from infra.storage.s3files import S3Files

__all__ = ["SHARED_FILES", "Bucket", "SharedFiles", "make_shared_files"]

SHARED_FILES = {"efs": Efs, "fsx": Fsx, "s3files": S3Files}


def make_shared_files(scope: Construct, *, config: KitConfig, network: Network, bucket: Bucket) -> SharedFiles:
    """The file system that the configuration asks for."""
    kind = SHARED_FILES[config.storage.kind]
    return kind(scope, kind.__name__, config=config, network=network, bucket=bucket)

"""BaseModel: where instances get the base model from, and a deploy that stops by name when it is not there.

Owns the origin's URI (as `python -m server.host.deliver` reads it) and the right to read it. `stacks` makes it in the service stack, after
the data stack; the fleet takes `origin` and `grant_read`.
"""

from pathlib import Path

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from aws_cdk import aws_lambda as lambda_
from aws_cdk import aws_s3_assets as assets
from constructs import Construct

from infra.config import ConfigError, KitConfig
from infra.log_group import make_log_group
from infra.storage import Bucket, SharedFiles
from infra.storage.base import MOUNT_POINT

EMBEDDED_DIR = Path(__file__).resolve().parent.parent / ".cache" / "models" / "smollm2-135m-instruct"
_CHECK = Path(__file__).parent / "functions" / "check_model.py"


class BaseModel(Construct):
    """origin: what instances are given; asset: the embedded model's, or None; check: the custom resource, or None."""

    def __init__(
        self,
        scope: Construct,
        id: str,
        *,
        config: KitConfig,
        bucket: Bucket,
        shared_files: SharedFiles,
        embedded_dir: Path = EMBEDDED_DIR,
    ) -> None:
        super().__init__(scope, id)
        model = config.model
        self._bucket = bucket
        self.asset: assets.Asset | None = None
        self.check: cdk.CustomResource | None = None
        if model.source == "embedded":
            self.asset = self._make_asset(embedded_dir)
            self.origin = self.asset.s3_object_url
        elif model.source == "hub":
            self.origin = f"hub://{model.id}@{model.revision}"
        else:
            self.check = self._make_check(config)
            in_place = f"{MOUNT_POINT}/{model.prefix}{model.id}"
            self.origin = in_place if shared_files.shows_bucket else f"s3://{bucket.bucket.bucket_name}/{model.prefix}{model.id}"

    def grant_read(self, role: iam.IGrantable) -> None:
        """What `role` needs beyond the bucket's prefixes."""
        if self.asset:
            statement = iam.PolicyStatement(
                actions=["s3:GetObject"], resources=[self.asset.bucket.arn_for_objects(self.asset.s3_object_key)]
            )
            role.grant_principal.add_to_principal_policy(statement)

    def _make_asset(self, folder: Path) -> assets.Asset:
        """The embedded model as an archive among the deployment's assets. Its manifest names it, so no synth hashes it."""
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise ConfigError(
                f'model.source: the embedded model is not at {folder}. Run `make model`, or set model.source = "bucket" and model.id'
            )
        digest = cdk.FileSystem.fingerprint(str(manifest))
        return assets.Asset(self, "Asset", path=str(folder), asset_hash=digest, asset_hash_type=cdk.AssetHashType.CUSTOM)

    def _make_check(self, config: KitConfig) -> cdk.CustomResource:
        """Fails the deploy, with what is missing and the command that puts it there, before any instance is launched."""
        prefix, bucket = f"{config.model.prefix}{config.model.id}/", self._bucket.bucket
        log_group = make_log_group(self, "CheckLogGroup", config=config)
        role = iam.Role(self, "CheckRole", assumed_by=iam.ServicePrincipal("lambda.amazonaws.com"))
        listing = iam.PolicyStatement(
            actions=["s3:ListBucket"], resources=[bucket.bucket_arn], conditions={"StringLike": {"s3:prefix": [prefix, f"{prefix}*"]}}
        )
        role.add_to_policy(listing)
        role.add_to_policy(iam.PolicyStatement(actions=["s3:GetObject"], resources=[bucket.arn_for_objects(f"{prefix}manifest.json")]))
        if bucket.encryption_key:
            bucket.encryption_key.grant_decrypt(role)
        log_group.grant_write(role)
        function = lambda_.Function(
            self,
            "CheckFunction",
            description=f"{config.name}: is the base model in the bucket?",
            runtime=lambda_.Runtime.PYTHON_3_14,
            handler="index.handler",
            code=lambda_.Code.from_inline(_CHECK.read_text(encoding="utf-8")),
            timeout=cdk.Duration.minutes(1),
            role=role,
            log_group=log_group,
        )
        command = f"python -m infra.push_model --folder FOLDER --bucket {bucket.bucket_name} --to {prefix}"
        hint = f"Put it there and deploy again: {command}"
        check = cdk.CustomResource(
            self,
            "Check",
            service_token=function.function_arn,
            resource_type="Custom::BaseModelCheck",
            service_timeout=cdk.Duration.minutes(2),
            properties={"Bucket": bucket.bucket_name, "Prefix": prefix, "Hint": hint},
        )
        check.node.add_dependency(role)
        return check

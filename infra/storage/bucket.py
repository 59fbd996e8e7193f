"""Bucket: base models and adapters, versioned, encrypted, TLS only; and the bucket of its access logs.

Owns names of prefixes and who may read them. Does not know what the objects mean. `stacks` makes it, the fleet is granted reading.
"""

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from aws_cdk import aws_s3 as s3
from constructs import Construct

from infra.acknowledge import acknowledge
from infra.config import KitConfig
from infra.removal import data_key, data_policy


class Bucket(Construct):
    """bucket (s3.Bucket); log_bucket; prefixes: those that instances read."""

    def __init__(self, scope: Construct, id: str, *, config: KitConfig) -> None:
        super().__init__(scope, id)
        policy, key = data_policy(config), data_key(self, config)
        wheels = config.image.wheelhouse_prefix
        self.prefixes = [config.model.prefix, config.model.adapters_prefix, *([wheels] if wheels else [])]
        secure = {
            "block_public_access": s3.BlockPublicAccess.BLOCK_ALL,
            "enforce_ssl": True,
            "minimum_tls_version": 1.2,
            "object_ownership": s3.ObjectOwnership.BUCKET_OWNER_ENFORCED,
            "removal_policy": policy,
            "auto_delete_objects": not config.retain_data,
        }
        self.log_bucket = s3.Bucket(
            self,
            "LogBucket",
            encryption=s3.BucketEncryption.S3_MANAGED,  # log delivery writes under no other key
            lifecycle_rules=[s3.LifecycleRule(expiration=cdk.Duration.days(max(config.observability.log_days, 1)))],
            **secure,
        )
        acknowledge(self.log_bucket, {"S1": "this is the bucket that access logs go to; logging it would log itself"})
        self.bucket = s3.Bucket(
            self,
            "Bucket",
            versioned=True,
            encryption=s3.BucketEncryption.KMS if key else s3.BucketEncryption.S3_MANAGED,
            encryption_key=key,
            bucket_key_enabled=True if key else None,
            server_access_logs_bucket=self.log_bucket,
            server_access_logs_prefix="bucket/",
            lifecycle_rules=[
                s3.LifecycleRule(
                    noncurrent_version_expiration=cdk.Duration.days(config.storage.noncurrent_days),
                    abort_incomplete_multipart_upload_after=cdk.Duration.days(7),
                    expired_object_delete_marker=True,
                )
            ],
            **secure,
        )

    def grant_read(self, role: iam.IGrantable, prefixes: list[str] | None = None) -> None:
        """Let `role` list and read the prefixes (all of them by default), and nothing else. No action has a wildcard."""
        prefixes = self.prefixes if prefixes is None else prefixes
        listing = iam.PolicyStatement(
            actions=["s3:ListBucket"],
            resources=[self.bucket.bucket_arn],
            conditions={"StringLike": {"s3:prefix": [pattern for prefix in prefixes for pattern in (prefix, f"{prefix}*")]}},
        )
        reading = iam.PolicyStatement(
            actions=["s3:GetObject", "s3:GetObjectVersion"],
            resources=[self.bucket.arn_for_objects(f"{prefix}*") for prefix in prefixes],
        )
        for statement in (listing, reading):
            role.grant_principal.add_to_principal_policy(statement)
        if self.bucket.encryption_key:
            self.bucket.encryption_key.grant_decrypt(role)

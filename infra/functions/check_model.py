"""Lambda behind the custom resource of `infra.model`: a deploy stops, with the reason, when the bucket does not hold the base model.

Inlined into the template, so it must stay under 4096 characters; `cfnresponse` is there for inlined code alone.
"""

import json

import boto3
import cfnresponse


def missing(bucket, prefix):
    """What the bucket lacks under `prefix`, as a sentence; None if the model is whole."""
    s3 = boto3.client("s3")
    where = f"s3://{bucket}/{prefix}manifest.json"
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    sizes = {item["Key"].removeprefix(prefix): item["Size"] for page in pages for item in page.get("Contents", [])}
    # Asked for a missing key, S3 answers 403 where the right to list is bound to a prefix: the list alone can tell.
    if "manifest.json" not in sizes:
        return f"{where} does not exist"
    try:
        manifest = json.load(s3.get_object(Bucket=bucket, Key=f"{prefix}manifest.json")["Body"])
        files = manifest["files"].items()
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{where} is not a manifest"
    for name, entry in files:
        if sizes.get(name) != entry["bytes"]:
            return f"s3://{bucket}/{prefix}{name} has {sizes.get(name, 'no')} bytes, the manifest says {entry['bytes']}"
    return None


def handler(event, context):
    """CloudFormation's request; answered in every case, else the stack would wait an hour."""
    properties, reason = event["ResourceProperties"], None
    try:
        if event["RequestType"] != "Delete":
            reason = missing(properties["Bucket"], properties["Prefix"])
            reason = reason and f"The base model is not in the bucket: {reason}. {properties['Hint']}"
    except Exception as error:
        reason = f"The bucket could not be read: {error}"
    status = cfnresponse.FAILED if reason else cfnresponse.SUCCESS
    cfnresponse.send(event, context, status, {}, "BaseModelCheck", reason=reason)

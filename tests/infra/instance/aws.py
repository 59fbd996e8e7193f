"""Stands in for the AWS CLI where user-data is tried: `s3 cp` from the stand-in bucket; every other call is written down."""

import os
import shlex
import sys
from pathlib import Path
from urllib.parse import urlsplit

import boto3

match sys.argv[1:]:
    case ["s3", "cp", "--only-show-errors", source, target]:
        where = urlsplit(source)
        boto3.client("s3").download_file(where.netloc, where.path.lstrip("/"), target)
    case ["secretsmanager", "get-secret-value", "--region", region, "--secret-id", arn, "--query", "SecretString", "--output", "text"]:
        print(boto3.client("secretsmanager", region_name=region).get_secret_value(SecretId=arn)["SecretString"])
    case ["cloudformation", "signal-resource", *_] | ["autoscaling", "complete-lifecycle-action", *_]:
        with (Path(os.environ["STAND_IN_STATE"]) / "aws").open("a") as calls:
            calls.write(shlex.join(sys.argv[1:]) + "\n")
    case ["autoscaling", "describe-auto-scaling-instances", "--instance-ids", id, "--query", _, "--output", "text"]:
        for item in boto3.client("autoscaling").describe_auto_scaling_instances(InstanceIds=[id])["AutoScalingInstances"]:
            print(item["AutoScalingGroupName"], item["LifecycleState"], sep="\t")
    case _:
        sys.exit(f"aws: the stand-in does not know {sys.argv[1:]}")

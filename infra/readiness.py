"""`python -m infra.readiness --env dev`: is this account ready for it? Asks, changes nothing, and says what to do if it is not.

Owns the questions: each is a function of CHECKS that reads the configuration and a few of AWS's answers. docs/first-real-deploy.md begins
with it; `rehearse` asks the emulator those that it can answer.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from infra.config import ConfigError, KitConfig
from infra.image import baked_parameter, parent_parameter
from infra.model import EMBEDDED_DIR
from infra.push_model import PushRefused, find_bucket
from sizing.instances import INSTANCES
from sizing.printing import run_tool

ROOT = Path(__file__).resolve().parent.parent
# Quotas of EC2, in vCPUs of all running instances of the families G and VT (docs.aws.amazon.com/ec2, "On-Demand Instance quotas").
ON_DEMAND = ("L-DB2E81BA", "Running On-Demand G and VT instances")
SPOT = ("L-3819A6DF", "All G and VT Spot Instance Requests")
_COUNTED = re.compile(r"(g|gr|vt)[0-9]")  # families of both
BOOTSTRAP_PARAMETER = "/cdk-bootstrap/hnb659fds/version"
BOOTSTRAP_VERSION = 6  # the least that aws-cdk-lib 2's default synthesizer deploys with


class State(StrEnum):
    """Of one finding. LATER: deploys, and meets a limit afterwards."""

    READY = "ready"
    LATER = "later"
    MISSING = "missing"


@dataclass(frozen=True)
class Finding:
    """`text`: what was found, and what to do unless it is ready."""

    name: str
    state: State
    text: str


class Account:
    """Clients of one session, made when they are first asked for; `region` is where the environment is deployed to."""

    def __init__(self, session: Any, region: str) -> None:
        self._session, self.region = session, region
        self._clients: dict[str, Any] = {}

    def __getitem__(self, service: str) -> Any:
        """The client of a service."""
        if service not in self._clients:
            self._clients[service] = self._session.client(service, region_name=self.region)
        return self._clients[service]


def check_identity(account: Account, config: KitConfig) -> Iterator[Finding]:
    """Whose credentials these are."""
    identity = account["sts"].get_caller_identity()
    yield Finding("credentials", State.READY, f"{identity['Arn']} in account {identity['Account']}, {account.region}")


def check_quota(account: Account, config: KitConfig) -> Iterator[Finding]:
    """vCPUs of the fleet, at its least and its most, beside those that run already."""
    fleet = config.fleet
    vcpus = max(INSTANCES[name].vcpus for name in (fleet.instance_type, *fleet.fallback_types))
    least, most = max(fleet.min, 1), fleet.max
    num_spot = (most - fleet.min) * fleet.spot_percent // 100
    for (code, name), num_first, num_all in ((ON_DEMAND, least, most - num_spot), (SPOT, 0, num_spot)):
        if num_all == 0:
            continue
        quota = int(account["service-quotas"].get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"])
        running = _running_vcpus(account, spot=code == SPOT[0])
        wanted, free = f"{num_all} x {vcpus} vCPUs", quota - running
        request = f"aws service-quotas request-service-quota-increase --service-code ec2 --quota-code {code}"
        ask = f"{request} --desired-value {running + num_all * vcpus}"
        found = f'"{name}" is {quota}, {running} of it in use'
        if free < num_first * vcpus:
            yield Finding("quota", State.MISSING, f"{found}; {wanted} are wanted: {ask}")
        elif free < num_all * vcpus:
            yield Finding("quota", State.LATER, f"{found}: enough for {free // vcpus} instances, fleet.max is {most}: {ask}")
        else:
            yield Finding("quota", State.READY, f"{found}; {wanted} fit")


def check_zones(account: Account, config: KitConfig) -> Iterator[Finding]:
    """Whether the zones that the stacks take offer the instance type. It says nothing of the capacity at a given hour."""
    network, name = config.network, config.fleet.instance_type
    zones = account["ec2"].describe_availability_zones(Filters=[{"Name": "zone-type", "Values": ["availability-zone"]}])
    known = sorted(zone["ZoneName"] for zone in zones["AvailabilityZones"] if zone["State"] == "available")
    taken = list(network.availability_zones) or known[: network.max_azs]
    offers = account["ec2"].describe_instance_type_offerings(
        LocationType="availability-zone", Filters=[{"Name": "instance-type", "Values": [name]}]
    )
    offered = sorted(item["Location"] for item in offers["InstanceTypeOfferings"])
    lacking = [zone for zone in taken if zone not in offered]
    if not offered:
        yield Finding("zones", State.MISSING, f"{account.region} has no {name}; take another region or fleet.instance_type")
    elif lacking:
        do = f"set network.availability_zones = {offered[: max(network.max_azs, 1)]}".replace("'", '"')
        yield Finding("zones", State.MISSING, f"{name} is not in {', '.join(lacking)}, only in {', '.join(offered)}: {do}")
    else:
        yield Finding("zones", State.READY, f"{name} is offered in {', '.join(taken)}")


def check_bootstrap(account: Account, config: KitConfig) -> Iterator[Finding]:
    """Whether `cdk bootstrap` ran in this account and region, and is new enough."""
    value = _parameter(account, BOOTSTRAP_PARAMETER)
    if value is None or int(value) < BOOTSTRAP_VERSION:
        found = "no bootstrap stack" if value is None else f"a bootstrap stack of version {value}, {BOOTSTRAP_VERSION} is needed"
        yield Finding("bootstrap", State.MISSING, f"{found} in {account.region}: npx cdk bootstrap aws://ACCOUNT/{account.region}")
    else:
        yield Finding("bootstrap", State.READY, f"version {value}")


def check_image(account: Account, config: KitConfig) -> Iterator[Finding]:
    """Whether the AMI that the fleet starts from is known here."""
    image = config.image
    fixed = image.ami_id if image.kind == "ami" else None if image.kind == "baked" or image.version == "latest" else image.version
    if fixed is None:
        name = baked_parameter(config) if image.kind == "baked" else parent_parameter(config)
        fixed = _parameter(account, name)
        if fixed is None:
            do = "deploy the image stack and run its StartImagePipeline" if image.kind == "baked" else "take another image.ami_line"
            yield Finding("image", State.MISSING, f"the parameter {name} does not exist in {account.region}: {do}")
            return
    images = account["ec2"].describe_images(Filters=[{"Name": "image-id", "Values": [fixed]}])["Images"]
    if not images:
        yield Finding("image", State.MISSING, f"{fixed} cannot be seen from this account in {account.region}")
    else:
        yield Finding("image", State.READY, f"{fixed} ({images[0].get('Name', 'no name')})")


def check_model(account: Account, config: KitConfig) -> Iterator[Finding]:
    """Whether instances will find the base model, and may read it."""
    yield _MODELS[config.model.source](account, config)


def check_gateway_role(account: Account, config: KitConfig) -> Iterator[Finding]:
    """The account has one role for API Gateway's logs; a second stack that makes it would take it from the first."""
    role = account["apigateway"].get_account().get("cloudwatchRoleArn")
    if role and config.endpoint.account_logging_role == "create":
        do = 'set endpoint.account_logging_role = "existing", unless a former deploy of this environment made it'
        yield Finding("gateway role", State.LATER, f"the account has {role}: {do}")
    elif not role and config.endpoint.account_logging_role != "create":
        yield Finding("gateway role", State.MISSING, 'the account has none for logs: set endpoint.account_logging_role = "create"')
    else:
        yield Finding("gateway role", State.READY, role or "made by the deploy")


CHECKS: dict[str, Callable[[Account, KitConfig], Iterator[Finding]]] = {
    "credentials": check_identity,
    "quota": check_quota,
    "zones": check_zones,
    "bootstrap": check_bootstrap,
    "image": check_image,
    "model": check_model,
    "gateway role": check_gateway_role,
}


def inspect(account: Account, config: KitConfig, names: Sequence[str] = tuple(CHECKS)) -> list[Finding]:
    """The findings of these checks. A call that is refused, or cannot be made, is a finding with AWS's own words."""
    from botocore.exceptions import BotoCoreError, ClientError

    found: list[Finding] = []
    for name in names:
        try:
            found += CHECKS[name](account, config)
        except (BotoCoreError, ClientError) as error:
            found.append(Finding(name, State.MISSING, f"could not be asked: {error}"))
    return found


def _running_vcpus(account: Account, *, spot: bool) -> int:
    """vCPUs of the running G and VT instances that count against the quota, the kit's or not."""
    states = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
    running: Counter[str] = Counter()
    for page in account["ec2"].get_paginator("describe_instances").paginate(Filters=states):
        for instance in (item for reservation in page["Reservations"] for item in reservation["Instances"]):
            if _COUNTED.match(instance["InstanceType"]) and (instance.get("InstanceLifecycle") == "spot") == spot:
                running[instance["InstanceType"]] += 1
    if not running:
        return 0
    types = account["ec2"].describe_instance_types(InstanceTypes=sorted(running))["InstanceTypes"]
    # A type's own number, whatever of it an instance has switched off: so EC2 counts.
    return sum(running[item["InstanceType"]] * item["VCpuInfo"]["DefaultVCpus"] for item in types)


def _parameter(account: Account, name: str) -> str | None:
    """The value of an SSM parameter; None where there is none of this name."""
    client = account["ssm"]
    try:
        return client.get_parameter(Name=name)["Parameter"]["Value"]
    except client.exceptions.ParameterNotFound:
        return None


def _embedded_model(account: Account, config: KitConfig) -> Finding:
    if (EMBEDDED_DIR / "manifest.json").is_file():
        return Finding("model", State.READY, "the embedded model is made; the deploy uploads it")
    return Finding("model", State.MISSING, "the embedded model is not made yet: make model")


def _bucket_model(account: Account, config: KitConfig) -> Finding:
    prefix, push = f"{config.model.prefix}{config.model.id}/", "python -m infra.push_model --folder FOLDER"
    try:
        bucket = find_bucket(account["cloudformation"], config.name)
    except PushRefused as error:
        return Finding("model", State.LATER, f"{error}; then {push}, then deploy all")
    found = account["s3"].list_objects_v2(Bucket=bucket, Prefix=f"{prefix}manifest.json", MaxKeys=1)
    if not found.get("KeyCount"):
        return Finding("model", State.MISSING, f"s3://{bucket}/{prefix}manifest.json does not exist: {push}")
    return Finding("model", State.READY, f"s3://{bucket}/{prefix}")


def _hub_model(account: Account, config: KitConfig) -> Finding:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    model, token = config.model, None
    if model.hub_secret_arn:
        token = account["secretsmanager"].get_secret_value(SecretId=model.hub_secret_arn)["SecretString"]
    try:
        HfApi(token=token or False).model_info(model.id, revision=model.revision)
    except (HfHubHTTPError, OSError) as error:
        do = "accept the model's terms with the token's owner, or set model.hub_secret_arn"
        return Finding("model", State.MISSING, f"the hub does not give {model.id}@{model.revision}: {type(error).__name__}: {do}")
    return Finding("model", State.READY, f"the hub gives {model.id}@{model.revision}{' to the secret' if token else ''}")


_MODELS: dict[str, Callable[[Account, KitConfig], Finding]] = {
    "embedded": _embedded_model,
    "bucket": _bucket_model,
    "hub": _hub_model,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if something is missing."""
    import boto3

    parser = argparse.ArgumentParser(prog="python -m infra.readiness", description="Is this account ready for the environment?")
    parser.add_argument("--env", default="dev", help="environment, a file of config/ (default: dev)")
    parser.add_argument("--region", help="default: the environment's, then the AWS configuration's")
    options = parser.parse_args(arguments)
    try:
        config = KitConfig.load(options.env, ROOT)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    session = boto3.session.Session()
    region = options.region or config.region or session.region_name
    if region is None:
        print("error: no region: set `region` in the configuration, AWS_REGION, or say --region", file=sys.stderr)
        return 1
    found = inspect(Account(session, region), config)
    for item in found:
        print(f"{item.state:8} {item.name:13} {item.text}")
    return 1 if any(item.state is State.MISSING for item in found) else 0


if __name__ == "__main__":
    sys.exit(run_tool(main))

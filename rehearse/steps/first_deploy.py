"""Step 1: bootstrap and deploy of dev, as README has it."""

from types import SimpleNamespace

from infra.config import KitConfig
from infra.image import parent_parameter
from infra.readiness import Account, State, inspect
from rehearse.emulator.names import REGION
from rehearse.emulator_process import ROOT
from rehearse.endpoint import Endpoint
from rehearse.errors import check
from rehearse.rehearsal import Rehearsal

AMI = "ami-0123456789abcdef0"
ANSWERED = ("credentials", "bootstrap", "image", "model", "gateway role")
COMPLETE = {"CREATE_COMPLETE", "UPDATE_COMPLETE"}


def deploy(rehearsal: Rehearsal) -> None:
    """`cdk bootstrap` and `cdk deploy --all`; the endpoint is what the deploy printed."""
    report, emulator, cdk = rehearsal.report, rehearsal.emulator, rehearsal.cdk
    report.begin(1, "bootstrap and deploy of config/dev.toml with the CDK command line of package.json")
    config = KitConfig.load("dev", ROOT)
    emulator.client("ssm").put_parameter(Name=parent_parameter(config), Value=AMI, Type="String")
    with report.line("`python -m infra.readiness` says that the bootstrap is missing, and nothing else") as line:
        found = ask_readiness(rehearsal, config)
        missing = [name for name, state in found.items() if state is not State.READY]
        check(missing == ["bootstrap"], f"{found}")
        line.detail = f"ready: {', '.join(name for name in found if name not in missing)}; quota and zones: an account alone"
    with report.line("`cdk bootstrap` makes the toolkit's stack") as line:
        cdk.bootstrap()
        check_stacks(rehearsal, {"CDKToolkit"})
        check(ask_readiness(rehearsal, config)["bootstrap"] is State.READY, "infra.readiness does not see the bootstrap")
        rehearsal.held["bootstrap"] = emulator.inventory("bootstrap")
        line.detail = cdk.version()
    with report.line("`cdk deploy --all` makes every stack") as line:
        cdk.deploy(into="dev")
        names = {f"{config.name}-data", f"{config.name}-service"}
        check_stacks(rehearsal, {"CDKToolkit", *names})
        kinds = check_every_resource(rehearsal, names)
        line.detail = f"{sum(kinds.values())} resources of {len(kinds)} types"
    with report.line("its outputs name bucket, endpoint and key; the key is enabled") as line:
        data, service = (cdk.outputs[f"{config.name}-{part}"] for part in ("data", "service"))
        buckets = [item["Name"] for item in emulator.client("s3").list_buckets()["Buckets"]]
        check(data["BucketName"] in buckets, f"no bucket {data['BucketName']}: {buckets}")
        key = emulator.client("apigateway").get_api_key(apiKey=service["ApiKeyId"], includeValue=True)
        check(key["enabled"] and key["value"], f"the key {service['ApiKeyId']} is not enabled")
        line.detail = service["EndpointUrl"]
    endpoint = Endpoint(service["EndpointUrl"], key["value"], port=emulator.https_port, certificate=emulator.certificate)
    rehearsal.enter_endpoint(endpoint)


def ask_readiness(rehearsal: Rehearsal, config: KitConfig) -> dict[str, State]:
    """Of those questions that the emulator answers."""
    session = SimpleNamespace(client=lambda service, region_name: rehearsal.emulator.client(service))
    return {finding.name: finding.state for finding in inspect(Account(session, REGION), config, ANSWERED)}


def check_stacks(rehearsal: Rehearsal, names: set[str]) -> None:
    """These stacks are there, complete, and no others are."""
    stacks = rehearsal.emulator.client("cloudformation").describe_stacks()["Stacks"]
    found = {item["StackName"]: item["StackStatus"] for item in stacks if item["StackStatus"] != "DELETE_COMPLETE"}
    check(set(found) == names and set(found.values()) <= COMPLETE, f"stacks {found}, not {sorted(names)} complete")


def check_every_resource(rehearsal: Rehearsal, stacks: set[str]) -> dict[str, int]:
    """Whether each resource of the templates was made, by the emulator's own word; how many of each type."""
    client = rehearsal.emulator.client("cloudformation")
    kinds: dict[str, int] = {}
    for stack in stacks:
        wanted = rehearsal.cdk.template("dev", stack)["Resources"]
        pages = client.get_paginator("list_stack_resources").paginate(StackName=stack)
        made = {item["LogicalResourceId"]: item for page in pages for item in page["StackResourceSummaries"]}
        missing = {f"{id} ({item['Type']})" for id, item in wanted.items() if id not in made and "Condition" not in item}
        check(not missing, f"{stack}: not made: {sorted(missing)}")
        for item in made.values():
            check(item["ResourceStatus"] in COMPLETE, f"{stack}: {item['LogicalResourceId']} is {item['ResourceStatus']}")
            kinds[item["ResourceType"]] = kinds.get(item["ResourceType"], 0) + 1
    return kinds

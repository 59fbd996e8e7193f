"""Step 5: destroy, and what the emulator holds afterwards: nothing of dev; of prod what `retain_data` promises."""

import subprocess
import sys

from examples.embedded_model import DEFAULT_DIR
from infra.config import KitConfig
from infra.image import baked_parameter
from rehearse.cdk import CdkFailed
from rehearse.emulator_process import ROOT
from rehearse.errors import Differs, check
from rehearse.rehearsal import Rehearsal
from rehearse.steps.first_deploy import AMI, check_stacks

# {store: beginning of ours} of what AWS, too, keeps, free of charge: records of deleted stacks for 90 days, metrics for 15 months.
HISTORY = {
    "cloudformation.stacks": "",
    "cloudformation.stack_events": "",
    "cloudformation.change_sets": "",
    "cloudwatch.metrics": "('Manylora'",
}


def destroy(rehearsal: Rehearsal) -> None:
    """dev, then prod."""
    report, cdk = rehearsal.report, rehearsal.cdk
    report.begin(5, "destroy")
    with report.line("`cdk destroy --all --force` of dev leaves nothing but the bootstrap stack") as line:
        rehearsal.end_group()
        cdk.destroy("changed")
        check_alone(rehearsal, "CDKToolkit")
        left = left_since(rehearsal, "bootstrap", "destroyed")
        check(not left, f"left behind: {left}")
        num_stores = len(rehearsal.held["destroyed"])
        line.detail = f"all of the emulator's stores ({num_stores} not empty) are as after the bootstrap; history: {', '.join(HISTORY)}"
    keep(rehearsal)


def keep(rehearsal: Rehearsal) -> None:
    """prod, as docs/deploy.md has it: data and image, the model, all; what its destroy leaves."""
    report, cdk, emulator = rehearsal.report, rehearsal.cdk, rehearsal.emulator
    config = KitConfig.load("prod", ROOT)
    stacks = [f"{config.name}-{part}" for part in ("data", "image", "service")]
    emulator.client("ssm").put_parameter(Name=baked_parameter(config), Value=AMI, Type="String")  # as the image's pipeline would
    rehearsal.held["before prod"] = emulator.inventory("before-prod")
    with report.line("prod: data and image, `python -m infra.push_model`, then all; the check of the model runs") as line:
        cdk.deploy(*stacks[:2], into="prod", env="prod")
        push = [sys.executable, "-m", "infra.push_model", "--env", "prod", "--folder", str(DEFAULT_DIR)]
        pushed = subprocess.run(push, cwd=ROOT, env=cdk.environment, capture_output=True, text=True)
        check(pushed.returncode == 0, f"push_model: {pushed.stdout} {pushed.stderr}")
        cdk.deploy(again="prod")
        check_stacks(rehearsal, {"CDKToolkit", *stacks})
        line.detail = ", ".join(stacks)
    kept = retained(rehearsal, stacks)
    with report.line("prod: a destroy is refused while termination protection is on") as line:
        line.detail = check_protected(rehearsal, stacks)
    with report.line("prod: a destroy leaves what `retain_data` promises, and nothing else") as line:
        for name in stacks:
            emulator.client("cloudformation").update_termination_protection(StackName=name, EnableTerminationProtection=False)
        cdk.destroy("prod")
        check_alone(rehearsal, "CDKToolkit")
        left = left_since(rehearsal, "before prod", "after-prod")
        strays = {store: [id for id in ids if not any(name in id for name in kept)] for store, ids in left.items()}
        check(not any(strays.values()), f"left behind: {strays}")
        missing = [id for id in kept if not any(id in ids for ids in left.values())]
        check(not missing, f"not kept: {missing}")
        line.detail = ", ".join(f"{kind.split('::')[1]} {id}" for id, kind in kept.items())


def retained(rehearsal: Rehearsal, stacks: list[str]) -> dict[str, str]:
    """{physical id: type} of what prod's templates keep; buckets and a file system, as the output KeptOnDestroy says, and nothing else."""
    kept = {}
    for stack in stacks:
        template = rehearsal.cdk.template("prod", stack)["Resources"]
        summaries = rehearsal.emulator.client("cloudformation").get_paginator("list_stack_resources").paginate(StackName=stack)
        for item in (item for page in summaries for item in page["StackResourceSummaries"]):
            if template[item["LogicalResourceId"]].get("DeletionPolicy", "Delete").startswith("Retain"):
                kept[item["PhysicalResourceId"]] = item["ResourceType"]
    check(set(kept.values()) == {"AWS::S3::Bucket", "AWS::EFS::FileSystem"}, f"the templates keep {kept}")
    return kept


def check_protected(rehearsal: Rehearsal, stacks: list[str]) -> str:
    """All of them, and the command line says so."""
    client = rehearsal.emulator.client("cloudformation")
    open_ones = [name for name in stacks if not client.describe_stacks(StackName=name)["Stacks"][0]["EnableTerminationProtection"]]
    check(not open_ones, f"not protected: {open_ones}")
    try:
        rehearsal.cdk.destroy("prod")
    except CdkFailed as error:
        check("TerminationProtection" in error.output, f"another reason: {error.output[-800:]}")
        check_stacks(rehearsal, {"CDKToolkit", *stacks})
        return f"exit {error.status}"
    raise Differs("the destroy went through")


def left_since(rehearsal: Rehearsal, before: str, now: str) -> dict[str, list[str]]:
    """What the emulator holds now and did not hold then, by store."""
    held = rehearsal.held
    held[now] = rehearsal.emulator.inventory(now)
    added = {store: sorted(set(ids) - set(held[before].get(store, []))) for store, ids in held[now].items()}
    counted = {store: [id for id in ids if not id.startswith(HISTORY.get(store, "\0"))] for store, ids in added.items()}
    return {store: ids for store, ids in counted.items() if ids}


def check_alone(rehearsal: Rehearsal, *names: str) -> None:
    """No stack but these is left."""
    stacks = rehearsal.emulator.client("cloudformation").describe_stacks()["Stacks"]
    found = {item["StackName"] for item in stacks if item["StackStatus"] != "DELETE_COMPLETE"}
    check(found == set(names), f"stacks {sorted(found)}")

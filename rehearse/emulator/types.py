"""Resource types that MiniStack 1.5 does not know, as records: they are made, read by Ref and GetAtt, and deleted; nothing acts on them.

A type that is neither MiniStack's nor here fails the deploy with its name ("Unrecognized resource types"). `__main__` calls `register`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

# Type -> (prefix of its ids, what GetAtt may ask for)
RECORDED: dict[str, tuple[str, tuple[str, ...]]] = {
    "AWS::ApiGatewayV2::VpcLink": ("", ("VpcLinkId",)),
    "AWS::Budgets::Budget": ("budget-", ()),
    "AWS::EC2::EIP": ("eipalloc-", ("AllocationId", "PublicIp")),
    "AWS::EC2::FlowLog": ("fl-", ("Id",)),
    "AWS::EC2::NatGateway": ("nat-", ("NatGatewayId",)),
    "AWS::EC2::SecurityGroupEgress": ("sgr-", ("Id",)),
    "AWS::EC2::SecurityGroupIngress": ("sgr-", ("Id",)),
    "AWS::ImageBuilder::Component": ("arn:aws:imagebuilder:::component/", ("Arn",)),
    "AWS::ImageBuilder::DistributionConfiguration": ("arn:aws:imagebuilder:::distribution-configuration/", ("Arn",)),
    "AWS::ImageBuilder::ImagePipeline": ("arn:aws:imagebuilder:::image-pipeline/", ("Arn",)),
    "AWS::ImageBuilder::ImageRecipe": ("arn:aws:imagebuilder:::image-recipe/", ("Arn",)),
    "AWS::ImageBuilder::InfrastructureConfiguration": ("arn:aws:imagebuilder:::infrastructure-configuration/", ("Arn",)),
    "AWS::ImageBuilder::LifecyclePolicy": ("arn:aws:imagebuilder:::lifecycle-policy/", ("Arn",)),
    "AWS::SSM::Document": ("doc-", ()),
    "AWS::SSM::MaintenanceWindow": ("mw-", ()),
    "AWS::SSM::MaintenanceWindowTarget": ("mwt-", ()),
    "AWS::SSM::MaintenanceWindowTask": ("mwk-", ()),
    "AWS::SSM::PatchBaseline": ("pb-", ()),
    "AWS::WAFv2::WebACLAssociation": ("waf-", ()),
}


# Types that MiniStack has, but not in the form that we use: property -> kept as a record where it is set
METRIC_MATH = {"AWS::CloudWatch::Alarm": ("Metrics", ("Arn",))}


class Records:
    """What was made of `RECORDED` and is not deleted: {id: type}, in a file that the leftover list reads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._items: dict[str, str] = {}
        self._write()

    def handler(self, kind: str) -> dict[str, Any]:
        """MiniStack's provisioner of `kind`: create, update, delete."""
        prefix, attributes = RECORDED.get(kind, ("rehearse-", METRIC_MATH.get(kind, ("", ()))[1]))

        def create(logical_id: str, properties: dict[str, Any], stack_name: str) -> tuple[str, dict[str, str]]:
            id = prefix + hashlib.sha256(f"{stack_name}/{logical_id}".encode()).hexdigest()[:17]
            self._items[id] = kind
            self._write()
            return id, dict.fromkeys(attributes, id)

        def update(id: str, old: object, new: object, stack_name: str, logical_id: str | None = None) -> tuple[str, dict[str, str]]:
            return id, dict.fromkeys(attributes, id)

        def delete(id: str, properties: object) -> None:
            self._items.pop(id, None)
            self._write()

        return {"create": create, "update": update, "delete": delete}

    def _write(self) -> None:
        fresh = self._path.with_suffix(".part")
        fresh.write_text(json.dumps(self._items))
        fresh.replace(self._path)


def register(handlers: dict[str, Any], s3: Any, state: Path) -> None:
    """Add our types to MiniStack's `handlers`; those that it has by now stay its own. `s3` is MiniStack's module."""
    (state / "own-types.json").write_text(json.dumps(sorted(handlers)))
    records = Records(state / "records.json")
    for kind in RECORDED:
        handlers.setdefault(kind, records.handler(kind))
    for kind, (name, _) in METRIC_MATH.items():
        handlers[kind] = _unless(name, handlers[kind], records.handler(kind))
    handlers["Custom::S3AutoDeleteObjects"] = _emptying(s3)


def refuse_on_demand(handlers: dict[str, Any], state: Path) -> None:
    """A type that `state`/refuse names fails to be updated, as a quota or a right that is missing would have it."""
    kind = "AWS::AutoScaling::AutoScalingGroup"
    update = handlers[kind]["update"]

    def refusing(*given: Any) -> Any:
        path = state / "refuse"
        if path.exists() and path.read_text() == kind:
            path.unlink()
            raise ValueError("refused by the rehearsal")
        return update(*given)

    handlers[kind] = {**handlers[kind], "update": refusing}


def _unless(name: str, own: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """MiniStack's provisioner, or the record's where the property `name` is set."""

    def choose(verb: str, position: int) -> Any:
        return lambda *given: (recorded if name in given[position] else own)[verb](*given)

    return {**own, "create": choose("create", 1), "update": choose("update", 2), "delete": choose("delete", 1)}


def _emptying(s3: Any) -> dict[str, Any]:
    """CDK's function that empties a bucket on destroy. It needs the SDK that Lambda brings along, so that its work is done here."""

    def create(logical_id: str, properties: dict[str, Any], stack_name: str) -> tuple[str, dict[str, str]]:
        return properties["BucketName"], {}

    def delete(id: str, properties: dict[str, Any]) -> None:
        bucket = s3._buckets.get(id)
        if bucket is None:
            return
        bucket["objects"].clear()
        for name in ("_object_versions", "_versions"):
            for key in [key for key in getattr(s3, name, {}) if (key[0] if isinstance(key, tuple) else key) == id]:
                getattr(s3, name).pop(key)

    return {"create": create, "update": lambda id, old, new, stack_name: (id, {}), "delete": delete}

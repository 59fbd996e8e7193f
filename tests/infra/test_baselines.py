"""The committed templates of dev and prod: a change shows, and what it would do to data is said first."""

import difflib
import itertools
import json

import pytest

from tests.infra.baselines import ENVIRONMENTS, FOLDER, baseline_text

STATEFUL = {
    "AWS::S3::Bucket",
    "AWS::EFS::FileSystem",
    "AWS::EFS::AccessPoint",
    "AWS::FSx::FileSystem",
    "AWS::S3Files::FileSystem",
    "AWS::SecretsManager::Secret",
    "AWS::EC2::VPC",
}


def lost(before, after):
    """Resources with data that an update would delete: gone, or of another type, under the logical id that they had."""
    kinds = {name: item["Type"] for name, item in after.get("Resources", {}).items()}
    items = before.get("Resources", {}).items()
    return sorted(name for name, item in items if item["Type"] in STATEFUL and kinds.get(name) != item["Type"])


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_templates_are_those_that_were_committed(synth, env):
    folder, templates = FOLDER / env, synth(env=env)
    assert {path.stem for path in folder.glob("*.json")} == set(templates), "run `make baselines`"
    for part, template in templates.items():
        before, after = (folder / f"{part}.json").read_text(), baseline_text(template)
        if before == after:
            continue
        changes = list(difflib.unified_diff(before.splitlines(), after.splitlines(), "committed", "now", lineterm="", n=2))
        warning = f"an update would DELETE {gone}; " if (gone := lost(json.loads(before), json.loads(after))) else ""
        pytest.fail(f"{env}/{part}: {warning}`make baselines` after a look at this:\n" + "\n".join(changes[:120]))


def test_a_lost_resource_with_data_is_seen():
    before = {"Resources": {"Kept": {"Type": "AWS::S3::Bucket"}, "Gone": {"Type": "AWS::EFS::FileSystem"}, "Log": {"Type": "X"}}}
    assert lost(before, {"Resources": {"Kept": {"Type": "AWS::S3::Bucket"}}}) == ["Gone"]


def test_content_of_assets_is_no_change():
    one, other = ({"Resources": {"F": {"Type": "L", "Code": f"{letter * 64}.zip"}}} for letter in "ab")
    assert baseline_text(one) == baseline_text(other)


def test_the_script_of_user_data_is_no_change_and_its_variables_are():
    texts = {}
    for port, body in itertools.product(("1", "2"), ("a", 'say "b"')):
        script = f"#!/bin/bash\nPORT='{port}'\n# <<< variables\n{body}\n"
        texts[port, body] = baseline_text({"Resources": {"T": {"Type": "X", "Data": {"Fn::Base64": script}}}})
    assert texts["1", "a"] == texts["1", 'say "b"'] != texts["2", "a"]

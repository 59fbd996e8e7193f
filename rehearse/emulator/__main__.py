"""`python -m rehearse.emulator --port P --https-port Q --certificate FILE --key FILE --state FOLDER`: MiniStack on loopback.

AWS's API on http://localhost:P; the same, and with it API Gateway's endpoints under their own names, over TLS on Q. Ends at SIGTERM or at
the end of its input, whose lines ask what it holds (`inventory`). Started by `rehearse.emulator_process`, in an environment of its own.
"""

import argparse
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from rehearse.emulator.names import ACCOUNT, REGION


def main() -> None:
    """Patch, then hand over to MiniStack's own main."""
    parser = argparse.ArgumentParser(prog="python -m rehearse.emulator", description="MiniStack with what our stacks need beyond it.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--https-port", type=int, required=True)
    parser.add_argument("--certificate", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--state", type=Path, required=True, help="folder for what the rehearsal reads: records, calls of hooks")
    flags = parser.parse_args()
    sys.argv = sys.argv[:1]
    # MiniStack binds every interface unless told otherwise, and reads its settings when it is imported.
    os.environ.update(
        BIND_HOST="127.0.0.1", GATEWAY_PORT=str(flags.port), MINISTACK_ACCOUNT_ID=ACCOUNT, MINISTACK_REGION=REGION,
        IOT_MTLS_ENABLED="0", SFTP_ENABLED="0", LOG_LEVEL="WARNING",
    )  # fmt: skip
    os.environ.pop("AWS_ENDPOINT_URL", None)
    os.environ["PYTHONPATH"] = str(Path(__file__).parent / "modules")  # of Lambda functions, which run in processes of their own

    import hypercorn.config
    from ministack import app
    from ministack.services import alb, apigateway_v1, autoscaling, s3, ssm
    from ministack.services.cloudformation import provisioners

    from rehearse.emulator.gateway import route_to_targets
    from rehearse.emulator.hooks import watch_hooks
    from rehearse.emulator.inventory import answer_until_closed
    from rehearse.emulator.types import refuse_on_demand, register

    register(provisioners._RESOURCE_HANDLERS, s3, flags.state)
    refuse_on_demand(provisioners._RESOURCE_HANDLERS, flags.state)
    route_to_targets(apigateway_v1, alb)
    watch_hooks(autoscaling, flags.state)
    app._EXECUTE_API_RE = re.compile(rf"^([a-z0-9]+)\.execute-api\.{REGION}\.amazonaws\.com(?::\d+)?$")  # as the deploy prints it
    refuse = ssm._reserved_name_error
    ssm._reserved_name_error = lambda name: None if name.startswith("/aws/service/") else refuse(name)  # AWS's public parameters

    class BothWays(hypercorn.config.Config):
        """MiniStack's own address stays plain HTTP; TLS is added beside it."""

        certfile, keyfile = flags.certificate, flags.key

        @property
        def bind(self) -> list[str]:
            return [f"127.0.0.1:{flags.https_port}"]

        @bind.setter
        def bind(self, value: list[str]) -> None:
            self.insecure_bind = value

    hypercorn.config.Config = BothWays
    threading.Thread(target=_answer_parent, args=(answer_until_closed, flags.state), daemon=True).start()
    app.main()


def _answer_parent(answer_until_closed: Callable[[Path], None], state: Path) -> None:
    """Standard input is a pipe that the rehearsal holds: it closes, whatever ends the rehearsal."""
    answer_until_closed(state)
    os._exit(0)


if __name__ == "__main__":
    main()

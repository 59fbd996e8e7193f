"""`python -m server`: settings read, logged once, served; `python -m server NAME ...` runs a command of server.commands.

The only place that reads the command line and the environment."""

import gc
import json
import logging
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from server import commands
from server.settings import Settings, SettingsError, read_settings
from sizing.printing import run_tool

log = logging.getLogger("server")


class _JsonLines(logging.Formatter):
    """A log line as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up_logging(settings: Settings) -> None:
    """Everything to stderr, one line an event."""
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(_JsonLines() if settings.json_output else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[lines], force=True)
    for noisy in ("httpx", "httpcore", "botocore", "urllib3", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))


def main(argv: Sequence[str]) -> int:
    """Serve until a signal; 0 after a clean end, 1 if the engine could not start, 2 for settings that cannot be. Or run a command."""
    if argv and not argv[0].startswith("-"):
        return run_tool(lambda: commands.run(argv, os.environ))
    try:
        settings = read_settings(argv, os.environ)
        from server.api.base_model import ServedModel  # after the settings: a wrong flag is answered at once

        model = ServedModel.from_settings(settings)
        settings = settings.resolved(max_positions=model.max_positions, store_dir=Path("~/.cache/manylora/store").expanduser())
    except (SettingsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    set_up_logging(settings)
    log.info("settings: %s", settings.model_dump_json())

    from server.api.app import make_api
    from server.api.devices import count_gpus
    from server.api.serving import DrainingServer

    servers: list[DrainingServer] = []
    try:
        api = make_api(settings, model, num_gpus=count_gpus(os.environ), on_fatal=lambda reason: servers[0].on_fatal(reason))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    servers.append(DrainingServer(api))
    gc.collect()
    gc.freeze()  # what is here stays: a collection while streams run need not look at a hundred thousand objects of libraries
    log.info("serving %s on http://%s:%d", model.name, settings.hostname, settings.port)
    servers[0].run()
    return servers[0].exit_code


def end(code: int) -> NoReturn:
    """End the process now. The interpreter's own end would first wait for threads that hang in a file system or a bucket.

    Requests and engine have ended by now; what such a thread leaves in the store's staging is swept at a later start."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main(sys.argv[1:]))

"""A whole API process in a thread of the test, with a fake engine as its subprocess, on a free port of 127.0.0.1."""

import asyncio
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from server.api.app import make_api
from server.api.base_model import ServedModel
from server.api.engines import Engines
from server.api.serving import DrainingServer
from server.api.state import Api
from server.settings import Settings

ROOT = Path(__file__).parents[3]


class LiveServer:
    """`client` speaks to it; `control` steers the fake engine; `seen` is what the engine was told."""

    def __init__(self, folder: Path, api: Api, server: DrainingServer, base_url: str) -> None:
        self.folder, self.api, self.server, self.base_url = folder, api, server, base_url
        self.client = httpx.Client(base_url=base_url, timeout=30)

    def control(self, **values: Any) -> None:
        path = self.folder / "control.json"
        staged = path.with_suffix(".new")
        staged.write_text(json.dumps(values))
        staged.rename(path)
        time.sleep(0.05)

    def answer(self, text: str, **values: Any) -> None:
        """Let the engine answer with `text`, special tokens in it included, and its end token."""
        tokenizer = self.api.model.tokenizer
        self.control(answer=[*tokenizer.encode(text, add_special_tokens=False), *tokenizer.eos_ids[:1]], **values)

    def seen(self, kind: str) -> list[dict[str, Any]]:
        path = self.folder / "engine.log"
        text = path.read_text() if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # a last line may be half written
        return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def events(self, path: str, body: Any) -> list[Any]:
        """The payloads of a stream; a last [DONE] as it is."""
        text = self.post(path, body).text
        assert text.endswith("\n\n")
        frames = [frame for frame in text.split("\n\n") if frame and not frame.startswith(":")]
        assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
        return [json.loads(frame[6:]) if frame != "data: [DONE]" else "[DONE]" for frame in frames]


def wait_for(condition: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """What `condition` returned once it is true."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


@contextmanager
def live_server(
    folder: Path, model_dir: Path, *, wait: bool = True, control: dict[str, Any] | None = None, num_gpus: int = 0, **settings: Any
) -> Iterator[LiveServer]:
    """Serve from a thread until the block ends; with an engine for each of `num_gpus`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "control.json").write_text(json.dumps(control or {}))
    adapters = folder / "adapters"
    adapters.mkdir(exist_ok=True)
    values = {
        "model_id": str(model_dir), "adapters_dir": adapters, "store_dir": folder / "store", "max_total_tokens": 128,
        "served_model_name": "base", "drain_timeout_s": 5,
    } | settings  # fmt: skip
    model = ServedModel.from_settings(Settings(**values))
    resolved = Settings(**values).resolved(max_positions=model.max_positions, store_dir=folder / "store")
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.server.api.fake_engine import main; sys.exit(main())"
    command = [
        sys.executable, "-c", program, "--control", str(folder / "control.json"), "--log", str(folder / "engine.log"),
        "--vocab-size", str(model.tokenizer.num_ids),
    ]  # fmt: skip
    servers: list[DrainingServer] = []
    api = make_api(resolved, model, engine_command=command, num_gpus=num_gpus, on_fatal=lambda reason: servers[0].on_fatal(reason))
    clients = api.engine.clients if isinstance(api.engine, Engines) else [api.engine]
    for client in clients:
        client._backoff_s = 0.05
    servers.append(DrainingServer(api))
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=lambda: asyncio.run(servers[0].serve([listener])), name="live server")
    thread.start()
    live = LiveServer(folder, api, servers[0], f"http://127.0.0.1:{port}")
    try:
        if wait:
            wait_for(lambda: all(client.ready is not None for client in clients))
        yield live
    finally:
        live.client.close()
        servers[0].should_exit = True
        thread.join(20)
        assert not thread.is_alive()

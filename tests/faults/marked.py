"""A server to be injured: its processes, its adapters, and requests whose answers tell whose they are."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

from benchmarks.gpu.models import as_text, write_model
from benchmarks.gpu.serve import RandomServer
from benchmarks.soak.marks import MODEL, tokens_of, write_marked

ADMIN_KEY = "the-admin-key-of-the-faults"
NUM_ADAPTERS = 6
PROMPT = [3 + n % 100 for n in range(40)]
_OPTIONS = {
    "device": "cpu", "num_threads": 1, "max_total_tokens": 2000, "num_blocks": 600, "max_batch_size": 16, "max_batch_prefill_tokens": 64,
}  # fmt: skip


def wait_for(condition: Callable[[], Any], timeout_s: float = 90.0) -> Any:
    """What `condition` returned once it is true."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


@dataclass
class Stream:
    """A streamed answer as it comes. `terminal`: events that end a stream; there must be one, and nothing after it."""

    adapter: int | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    terminal: list[dict] = field(default_factory=list)
    status: int = 0
    broken: str | None = None
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def is_right(self) -> bool:
        """Nobody else's tokens, and one end."""
        return self.broken is None and len(self.terminal) == 1 and _is_of(self.adapter, self.tokens, self.logprobs)

    @property
    def error_type(self) -> str | None:
        """Of the error that it ended with."""
        return self.terminal[0].get("error_type") if self.terminal else None


class MarkedServer:
    """From its start to the end of the block; adapter n is "a-n" and says the tokens of mark n."""

    def __init__(self, work: Path, **settings: Any) -> None:
        self.adapters_dir, self.store_dir = work / "adapters", work / "store"
        self.store_dir.mkdir(parents=True)
        for mark in range(NUM_ADAPTERS):
            write_marked(self.adapters_dir / f"a-{mark}", mark)
        model, environment = write_model(work, MODEL), {"MANYLORA_ADMIN_KEY": ADMIN_KEY}
        self.log = work / "server.log"
        self.server = RandomServer(model, self.adapters_dir, self.store_dir, self.log, _OPTIONS | settings, **environment)
        self.client = httpx.Client(
            base_url=self.server.url, timeout=90, headers={"authorization": f"Bearer {ADMIN_KEY}"}, limits=httpx.Limits(max_connections=64)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.stop()

    def wait_well(self) -> None:
        """Until it serves and nothing of earlier tests runs."""
        self.server.wait_healthy(time.monotonic() + 120)
        wait_for(lambda: self.metric("manylora_sequences_in_flight") == 0)

    def metric(self, name: str) -> float:
        """An unlabelled series."""
        lines = self.client.get("/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.split(" ")[0] == name))

    def engine(self) -> psutil.Process | None:
        """The engine's process; None while there is none."""
        for child in psutil.Process(self.server.pid).children():
            with suppress(psutil.NoSuchProcess):  # it has ended, and was not yet waited for
                if "--options" in child.cmdline():
                    return child
        return None

    def is_well(self) -> bool:
        """By /health."""
        return self.client.get("/health").status_code == 200

    def body(self, adapter: int | None, num_new: int, prompt: list[int] = PROMPT) -> dict[str, Any]:
        """Of a greedy request."""
        name = f"a-{adapter}" if adapter is not None else None
        parameters = {"max_new_tokens": num_new, "details": True, "ignore_eos_token": True, "adapter_id": name}
        return {"inputs": as_text(prompt), "parameters": parameters}

    def ask(self, adapter: int | None, num_new: int = 4, prompt: list[int] = PROMPT) -> list[int]:
        """The tokens of an answer, which must be the adapter's."""
        answer = self.client.post("/generate", json=self.body(adapter, num_new, prompt))
        assert answer.status_code == 200, answer.text
        said = answer.json()["details"]["tokens"]
        tokens = [token["id"] for token in said]
        assert len(tokens) == num_new and _is_of(adapter, tokens, [token["logprob"] for token in said])
        return tokens

    def order(self, path: str, **body: Any) -> None:
        """An admin's order, which must be carried out."""
        answer = self.client.post(f"/v1/adapters{path}", json=body or None)
        assert answer.status_code == 200, answer.text

    def stream(self, adapter: int | None, num_new: int, prompt: list[int] = PROMPT) -> Stream:
        """Start a stream; it is read in a thread."""
        stream = Stream(adapter)
        threading.Thread(target=self._read, args=(stream, self.body(adapter, num_new, prompt)), daemon=True).start()
        return stream

    def _read(self, stream: Stream, body: dict[str, Any]) -> None:
        try:
            with self.client.stream("POST", "/generate_stream", json=body) as answer:
                stream.status = answer.status_code
                if answer.status_code != 200:
                    stream.terminal.append(json.loads(answer.read()))
                for line in answer.iter_lines() if answer.status_code == 200 else ():
                    if line.startswith("data:"):
                        self._take(stream, json.loads(line[5:]))
        except httpx.HTTPError as error:
            stream.broken = repr(error)
        finally:
            stream.done.set()

    def _take(self, stream: Stream, event: dict[str, Any]) -> None:
        if "token" in event:
            stream.tokens.append(event["token"]["id"])
            stream.logprobs.append(event["token"]["logprob"])
        if "error" in event or event["generated_text"] is not None:
            stream.terminal.append(event)

    def pack_of(self, adapter: int) -> Path:
        """The file in the store that the engine reads for the adapter, which must have been used."""
        row = self.client.get(f"/v1/adapters/a-{adapter}").json()
        return next((self.store_dir / "packs").glob(f"{row['hash']}-*.pack"))


def _is_of(adapter: int | None, tokens: list[int], logprobs: list[float]) -> bool:
    """Whether the adapter can have said it; where neither of its two tokens stood out, any token can win (as in benchmarks.soak)."""
    if adapter is None:
        return True
    return all(token in tokens_of(adapter) or logprob < -0.01 for token, logprob in zip(tokens, logprobs, strict=True))

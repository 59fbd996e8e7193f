"""One name never answers with another's weights, whatever the order of calls, on two servers of one folder: random interleavings of
writing folders, publish, load, pin, unload, delete and release against a model of the truth, with requests that run meanwhile."""

import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from server.sources.content import hash_adapter
from tests.server.api.fleet import ADMIN, answered, order, submitted
from tests.server.api.live import LiveServer, wait_for
from tests.server.api.test_adapters import PROMPT, write_adapter

NAMES = ["a", "b", "c"]
name_of, server_of = st.sampled_from(NAMES), st.sampled_from([0, 1])


class Truth:
    """What each name means, by generation of the registry, so that a server that lags can be asked what it may still say."""

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}  # folder -> hash
        self.history: dict[str, list[tuple[int, str]]] = {}  # name -> (generation, "follow", "deleted" or a hash)

    def meaning(self, name: str) -> str:
        return self.history.get(name, [(0, "follow")])[-1][1]

    def means(self, name: str, generation: int, what: str) -> None:
        self.history.setdefault(name, [(0, "follow")]).append((generation, what))

    def answer(self, name: str, meaning: str) -> str | None:
        """The hash that a request gets; None: no such adapter."""
        return None if meaning == "deleted" else self.folders.get(name) if meaning == "follow" else meaning

    def answers_since(self, name: str, generation: int) -> set[str | None]:
        """All that a server may say whose view is of `generation` or later."""
        history = self.history.get(name, [(0, "follow")])
        first = max(index for index, (at, _) in enumerate(history) if at <= generation)
        return {self.answer(name, meaning) for _, meaning in history[first:]}


class Fleet(RuleBasedStateMachine):
    """One example: names of its own on the two servers that all examples share."""

    servers: tuple[LiveServer, LiveServer]
    num_examples = 0

    @initialize()
    def begin(self) -> None:
        Fleet.num_examples += 1
        self.prefix, self.truth = f"x{Fleet.num_examples}", Truth()
        self.seed = Fleet.num_examples * 1000
        self.threads = ThreadPoolExecutor(4)
        self.running: list[tuple[Future[tuple[int, str]], str]] = []
        for name in NAMES:
            self.write(name)

    def full(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def folder(self, name: str) -> Path:
        return self.servers[0].folder.parent / "adapters" / self.prefix / name

    def generation(self, server: int) -> int:
        return self.servers[server].api.publisher.registry.view.generation

    def order(self, server: int, path: str, what: str | None, name: str, body: Any = None, method: str = "POST") -> None:
        """Give an order; it must do what the truth says: `what` the name means then (None: as before), or 404 if there is no such name."""
        live = self.servers[server]
        answer = live.client.request(method, f"/v1/{path}", json=body, headers=ADMIN)
        known = self.truth.meaning(name)
        if body is None and self.truth.answer(name, known) is None and (known == "deleted" and "release" not in path or known == "follow"):
            # An unload may still find what a server remembers of a folder that is gone; nothing else may.
            assert answer.status_code == 404 or (known == "follow" and answer.status_code == 200), (path, answer.text)
            if answer.status_code == 404:
                return
        assert answer.status_code == 200, (path, known, answer.text)
        if what is not None:
            self.truth.means(name, self.generation(server), what)
            assert self.ask(server, name) == self.truth.answer(name, what)  # from the answer on, where the order was given

    @rule(name=name_of)
    def write(self, name: str) -> None:
        self.seed += 1
        self.truth.folders[name] = hash_adapter(write_adapter(self.folder(name), seed=self.seed))

    @rule(name=name_of)
    def remove(self, name: str) -> None:
        shutil.rmtree(self.folder(name), ignore_errors=True)
        self.truth.folders.pop(name, None)

    @rule(name=name_of, origin=name_of, server=server_of, pin=st.sampled_from([None, True, False]))
    def publish(self, name: str, origin: str, server: int, pin: bool | None) -> None:
        body = {"name": self.full(name), "id": self.full(origin), "pin": pin}
        held = self.truth.folders.get(origin)
        if held is None:
            order(self.servers[server], "adapters", body, status=404)
        else:
            self.order(server, "adapters", held, name, body)

    @rule(name=name_of, origins=st.permutations(NAMES))
    def publish_on_both_at_once(self, name: str, origins: list[str]) -> None:
        """Either may be the later one; but then it is so everywhere."""
        held = [(origin, self.truth.folders[origin]) for origin in origins if origin in self.truth.folders][:2]
        if len(held) < 2:
            return
        bodies = [{"name": self.full(name), "id": self.full(origin)} for origin, _ in held]
        given = [self.threads.submit(order, live, "adapters", body) for live, body in zip(self.servers, bodies, strict=True)]
        for each in given:
            each.result(20)
        newest = max(self.servers, key=lambda live: live.api.publisher.registry.view.generation).api.publisher.registry
        version = newest.entry(self.full(name)).version
        assert version is not None and version.hash in {one for _, one in held}
        if self.truth.meaning(name) != version.hash:
            between = next((one for _, one in held if one != version.hash), version.hash)
            self.truth.means(name, newest.view.generation - 1, between)
            self.truth.means(name, newest.view.generation, version.hash)

    @rule(name=name_of, server=server_of, verb=st.sampled_from(["load", "pin", "unpin", "unload"]))
    def command(self, name: str, server: int, verb: str) -> None:
        self.catch_up(server)
        self.order(server, f"adapters/{self.full(name)}/{verb}", None, name)

    @rule(name=name_of, server=server_of)
    def delete(self, name: str, server: int) -> None:
        self.catch_up(server)
        self.order(server, f"adapters/{self.full(name)}", "deleted", name, method="DELETE")

    @precondition(lambda self: any(self.truth.meaning(name) == "deleted" for name in NAMES))
    @rule(server=server_of)
    def release(self, server: int) -> None:
        self.catch_up(server)
        name = next(name for name in NAMES if self.truth.meaning(name) == "deleted")
        self.order(server, f"adapters/{self.full(name)}?release=true", "follow", name, method="DELETE")

    @rule(name=name_of, server=server_of)
    def generate_at_once(self, name: str, server: int) -> None:
        """On a server that may lag: it says what holds, or what held since the view that it had when it was asked."""
        since = self.generation(server)
        assert self.ask(server, name) in self.truth.answers_since(name, since)

    @rule(name=name_of, server=server_of)
    def generate_when_told(self, name: str, server: int) -> None:
        self.catch_up(server)
        assert self.ask(server, name) == self.truth.answer(name, self.truth.meaning(name))

    @rule(name=name_of, server=server_of)
    def generate_meanwhile(self, name: str, server: int) -> None:
        """A stream that runs while the next orders are given: it must end, with what it began with."""
        self.catch_up(server)
        expected = self.truth.answer(name, self.truth.meaning(name))
        if self.ask(server, name) is None:
            return
        live = self.servers[server]
        body = {"inputs": PROMPT, "parameters": {"adapter_id": self.full(name), "max_new_tokens": 60}}
        stream = live.client.stream("POST", "/generate_stream", json=body)
        answer = stream.__enter__()
        lines = answer.iter_lines()
        first = next(lines)
        assert first.startswith("data:") and "error" not in first

        def finish() -> tuple[int, str]:
            text = "".join(lines)
            stream.__exit__(None, None, None)
            assert '"generated_text":"' in text, text
            return server, answer.headers["x-request-id"]

        self.running.append((self.threads.submit(finish), expected))

    def ask(self, server: int, name: str) -> str | None:
        """The hash of an answer. That there is no such folder is remembered for a second: then asked again."""
        found = answered(self.servers[server], self.full(name))
        if found is None and name in self.truth.folders and self.truth.meaning(name) == "follow":
            time.sleep(1.05)
            found = answered(self.servers[server], self.full(name))
        return found

    def catch_up(self, server: int) -> None:
        """Wait until the server has seen all orders: at most two polls."""
        newest = max(self.generation(0), self.generation(1))
        wait_for(lambda: self.generation(server) >= newest, 5)

    @invariant()
    def the_engines_live(self) -> None:
        assert all(live.api.engine.ready is not None for live in self.servers)

    def teardown(self) -> None:
        if not hasattr(self, "threads"):
            return
        for future, expected in self.running:
            server, request_id = future.result(20)
            assert submitted(self.servers[server], request_id) == expected
        self.threads.shutdown()
        for name in NAMES:
            for server in (0, 1):
                self.generate_when_told(name, server)


def test_one_name_never_answers_with_anothers_weights(pair: tuple[LiveServer, LiveServer]) -> None:
    Fleet.servers = pair
    for live in pair:
        live.control(step_s=0.002)
    run_state_machine_as_test(
        Fleet,
        settings=settings(
            max_examples=20, stateful_step_count=20, deadline=None, database=None, suppress_health_check=list(HealthCheck),
            derandomize=True, phases=[Phase.generate],  # a failure is told as it was found: to shrink it takes minutes of HTTP
        ),
    )  # fmt: skip
    # Memory is freed when requests end, never before: no Forget of a hash that ran then.
    for live in pair:
        assert live.seen("Forget") and all(seen["hash"] not in seen["running"] for seen in live.seen("Forget"))

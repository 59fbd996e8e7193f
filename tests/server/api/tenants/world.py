"""A fleet with two tenants, and what they send: the tenants file, keys, adapters of each and of nobody."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from server.api.tenants.keys import KeyRing
from server.api.tenants.rules import read_rules
from tests.server.api.live import LiveServer, live_server, wait_for
from tests.server.api.test_adapters import PROMPT, write_adapter

ADMIN_KEY, GATEWAY_KEY = "an-admin-key-of-a-test", "a-gateway-key-of-a-test"
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
RULES = """
[defaults]
sources = { local = ["{tenant}"] }
[shared]
sources = { local = ["common"] }
[tenants.acme]
weight = 3
gateway = ["gw-acme"]
max_pinned = 1
[tenants.beta]
"""


class World:
    """`folder` is what the servers share; `keys` are of the tenants, by name."""

    def __init__(self, folder: Path, rules: str = RULES) -> None:
        self.folder = folder
        for name in ("adapters", "registry"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.tenants_file = folder / "tenants.toml"
        self.write(rules)
        for number, name in enumerate(("acme/sql", "beta/sql", "beta/secret", "common/pirate", "nobodys/own")):
            write_adapter(folder / "adapters" / name, seed=number)
        self.ring = KeyRing(folder / "registry")
        self.keys = {name: self.ring.create(name)[0] for name in ("acme", "beta")}

    def write(self, rules: str) -> None:
        staged = self.tenants_file.with_suffix(".new")
        staged.write_text(rules)
        staged.rename(self.tenants_file)

    def settle(self, live: LiveServer) -> None:
        """Wait until the server goes by the file as it is now."""
        wanted = read_rules(self.tenants_file)
        wait_for(lambda: live.api.tenancy is not None and live.api.tenancy.rules == wanted)

    def headers(self, tenant: str) -> dict[str, str]:
        return ADMIN if tenant == "operator" else {"authorization": f"Bearer {self.keys[tenant]}"}

    @contextmanager
    def server(self, name: str, model_dir: Path, **settings: Any) -> Iterator[LiveServer]:
        values = {
            "adapters_dir": self.folder / "adapters", "registry_dir": self.folder / "registry", "tenants_file": self.tenants_file,
            "admin_key": ADMIN_KEY, "gateway_key": GATEWAY_KEY, "registry_poll_s": 0.1,
        } | settings  # fmt: skip
        with live_server(self.folder / name, model_dir, **values) as live:
            yield live

    def ask(self, live: LiveServer, tenant: str, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return live.client.request(method, path, json=body, headers=self.headers(tenant), **options)

    def generate(self, live: LiveServer, tenant: str, adapter: str | None, **parameters: Any) -> httpx.Response:
        body = {"inputs": PROMPT, "parameters": {"adapter_id": adapter, "max_new_tokens": 2, **parameters}}
        return self.ask(live, tenant, "POST", "/generate", body)

    def rows(self, live: LiveServer, tenant: str) -> dict[str, Any]:
        answer = self.ask(live, tenant, "GET", "/v1/adapters")
        assert answer.status_code == 200, answer.text
        return {row["id"]: row for row in answer.json()["data"]}

    def models(self, live: LiveServer, tenant: str) -> list[str]:
        return [one["id"] for one in self.ask(live, tenant, "GET", "/v1/models").json()["data"]]


def submitted(live: LiveServer, answer: httpx.Response) -> dict[str, Any]:
    """What the engine was given for an answered request."""
    request_id = answer.headers["x-request-id"]
    return next(one for one in reversed(live.seen("Submit")) if one["request_id"].startswith(request_id))


def without_ids(answer: httpx.Response, *names: str) -> tuple[int, Any]:
    """Status and body, with the names that were asked for replaced: equal answers say nothing of what is behind the names."""
    text = answer.text
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, "NAME")
    return answer.status_code, json.loads(text)

"""Orders to a fleet's servers (the fixture `fleet`), and what requests are then answered with."""

from typing import Any

from server.sources.content import hash_adapter
from tests.server.api.live import LiveServer
from tests.server.api.test_adapters import PROMPT, write_adapter

KEY = "an-admin-key-of-a-test"
ADMIN = {"authorization": f"Bearer {KEY}"}


def write(live: LiveServer, name: str, **options: Any) -> str:
    """An adapter in the folder that both servers read; its hash."""
    return hash_adapter(write_adapter(live.folder.parent / "adapters" / name, **options))


def order(live: LiveServer, path: str, body: Any = None, *, method: str = "POST", status: int = 200) -> Any:
    answer = live.client.request(method, f"/v1/{path}", json=body, headers=ADMIN)
    assert answer.status_code == status, answer.text
    return answer.json() if "json" in answer.headers["content-type"] else answer.text


def publish(live: LiveServer, name: str, **body: Any) -> Any:
    return order(live, "adapters", {"name": name, **body})


def answered(live: LiveServer, name: str, **parameters: Any) -> str | None:
    """The hash of the weights that a request for `name` ran with; None if there is no such adapter."""
    answer = live.post("/generate", {"inputs": PROMPT, "parameters": {"adapter_id": name, "max_new_tokens": 2, **parameters}})
    if answer.status_code == 424 and "was not found" in answer.text:
        return None
    assert answer.status_code == 200, answer.text
    return submitted(live, answer.headers["x-request-id"])


def submitted(live: LiveServer, request_id: str) -> str:
    return next(one for one in reversed(live.seen("Submit")) if one["request_id"].startswith(request_id))["adapter"]["hash"]


def rows(live: LiveServer) -> dict[str, Any]:
    return {row["id"]: row for row in order(live, "adapters", method="GET")["data"]}


def forgotten(live: LiveServer, adapter_hash: str) -> list[Any]:
    return [seen for seen in live.seen("Forget") if seen["hash"] == adapter_hash]

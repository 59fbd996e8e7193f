"""/v1/stats, /v1/intake and the tier that a request found its adapter in: what the page at /ui and the command line show."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.api.intake import Intake
from server.api.stats import Stats
from server.types import BaseLayout
from tests.server.api.live import LiveServer, live_server, wait_for
from tests.server.api.test_adapters import PROMPT, write_adapter

KEY = "an-admin-key-of-a-test"
ADMIN = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("stats"), model_dir, admin_key=KEY, metrics_max_adapters=2) as server:
        yield server


def stats(live: LiveServer) -> dict[str, Any]:
    answer = live.client.get("/v1/stats", headers=ADMIN)
    assert answer.status_code == 200, answer.text
    Stats.model_validate(answer.json(), strict=True)
    return answer.json()


def ask(live: LiveServer, adapter: str | None) -> str | None:
    """The tier that the answer names."""
    answer = live.post("/generate", {"inputs": PROMPT, "parameters": {"adapter_id": adapter, "max_new_tokens": 3}})
    assert answer.status_code == 200, answer.text
    return answer.headers.get("x-adapter-tier")


def stream_tier(live: LiveServer, path: str, model: str, **body: Any) -> tuple[str | None, Any]:
    """The tier that a stream's headers name, and the one in the chunk that brings the usage."""
    body |= {"model": model, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    events = live.events(path, body)
    usage = next(one for one in events if one != "[DONE]" and one["usage"])
    assert all("adapter_tier" not in one for one in events if one not in (usage, "[DONE]"))
    with live.client.stream("POST", path, json=body) as stream:
        stream.read()
        return stream.headers.get("x-adapter-tier"), usage["adapter_tier"]


@pytest.mark.parametrize("path", ["/v1/stats", "/v1/intake"])
def test_it_is_for_whoever_shows_the_key(live: LiveServer, path: str, tmp_path: Path, model_dir: Path) -> None:
    assert live.client.get(path).status_code == 401
    assert live.client.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
    with live_server(tmp_path, model_dir, wait=False) as keyless:
        assert keyless.client.get(path).status_code == 403


def test_requests_say_where_their_adapter_was(live: LiveServer) -> None:
    write_adapter(live.folder / "adapters" / "tiered")
    assert ask(live, "tiered") == "source"  # fetched and packed for this request
    wait_for(lambda: stats(live)["tiers"]["host"] == 1)
    assert ask(live, "tiered") == "host"
    unloaded = live.client.post("/v1/adapters/tiered/unload", headers=ADMIN)
    assert unloaded.json()["tier"] == "absent"
    assert ask(live, "tiered") == "disk"  # its pack is still in the store
    assert ask(live, None) is None


def test_streams_say_it_in_the_chunk_with_the_usage_too(live: LiveServer) -> None:
    """The headers of a slow fetch have gone out before it ends; the last chunk always knows."""
    write_adapter(live.folder / "adapters" / "streamed", seed=2)
    messages = [{"role": "user", "content": PROMPT}]
    assert stream_tier(live, "/v1/chat/completions", "streamed", messages=messages)[1] == "source"
    assert stream_tier(live, "/v1/completions", "streamed", prompt=PROMPT) == ("host", "host")
    assert stream_tier(live, "/v1/completions", "base", prompt=PROMPT) == (None, None)


def test_what_grows_and_what_is_held(live: LiveServer) -> None:
    before = stats(live)
    for name in ("one", "two", "three"):
        write_adapter(live.folder / "adapters" / name, seed=len(name))
        ask(live, name)
    ask(live, None)
    assert live.post("/generate", {"inputs": PROMPT, "parameters": {"adapter_id": "nobody"}}).status_code == 424
    after = stats(live)
    grown = {name: after["totals"][name] - before["totals"][name] for name in ("requests", "succeeded", "failed")}
    assert grown == {"requests": 5, "succeeded": 4, "failed": 1}
    assert after["totals"]["first_token_s"] > before["totals"]["first_token_s"]
    assert after["server"] == before["server"] and after["uptime_s"] > before["uptime_s"] and not after["draining"]
    assert after["engines"] == [{"device": live.api.engine.device, "unhealthy": None}]
    assert {row["adapter"] for row in after["adapters"]} >= {"_other"}  # two have series of their own, the rest share one
    assert sum(row["requests"] for row in after["adapters"]) >= 3


def test_what_is_under_way_is_counted(live: LiveServer) -> None:
    live.control(step_s=0.05)
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 60}}
    with live.client.stream("POST", "/generate_stream", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert stats(live)["queue"]["running"] == 1
    wait_for(lambda: stats(live)["queue"]["running"] == 0)


def test_the_intake_names_the_places_and_the_base(live: LiveServer) -> None:
    answer = live.client.get("/v1/intake", headers=ADMIN).json()
    Intake.model_validate(answer, strict=True)
    folder = (live.folder / "adapters").resolve()
    assert answer["places"] == [{"source": "local", "place": str(folder), "endpoint_url": None, "region": None}]
    assert answer["default_source"] == "local" and answer["max_adapter_bytes"] == 4 << 30
    assert msgspec.convert(answer["layout"], BaseLayout) == live.api.engine.last_ready.layout


def test_the_intake_names_the_bucket(tmp_path: Path, model_dir: Path) -> None:
    options = {"model_bucket": "models", "model_folder": "/team/", "s3_endpoint_url": "http://127.0.0.1:1", "adapter_source": "s3"}
    with live_server(tmp_path, model_dir, admin_key=KEY, adapters_dir=None, **options) as live:
        answer = live.client.get("/v1/intake", headers=ADMIN).json()
    assert answer["places"] == [{"source": "s3", "place": "s3://models/team", "endpoint_url": "http://127.0.0.1:1", "region": None}]

"""Limits over HTTP: 429 with Retry-After and the limit's name in both dialects, a file that changes under a running server."""

import threading

import pytest

from tests.server.api.live import LiveServer, wait_for
from tests.server.api.tenants.world import RULES, World

BODY = {"inputs": "one two three", "parameters": {"max_new_tokens": 100}}


def ruled(world: World, fleet, limits: str) -> None:
    world.write(RULES + limits)
    for live in fleet:
        world.settle(live)


def busy(world: World, live: LiveServer, tenant: str, body=BODY) -> threading.Thread:
    """A request that goes on until the engine is told to go on."""
    before = len(live.seen("Submit"))
    thread = threading.Thread(target=lambda: world.ask(live, tenant, "POST", "/generate", body))
    thread.start()
    wait_for(lambda: len(live.seen("Submit")) > before)
    return thread


@pytest.mark.parametrize("limit", ["requests_in_flight", "queue_length"])
def test_too_many_at_once(fleet, world: World, limit: str) -> None:
    live, other = fleet
    ruled(world, fleet, f"limits = {{ {limit} = 1 }}\n")
    live.control(hang=True)
    thread = busy(world, live, "beta")
    native = world.ask(live, "beta", "POST", "/generate", BODY)
    assert native.status_code == 429 and native.json()["error_type"] == "overloaded" and f"`{limit}`" in native.json()["error"]
    assert native.headers["retry-after"] == "1" and native.headers["x-manylora-limit"] == limit
    chat = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    openai = world.ask(live, "beta", "POST", "/v1/chat/completions", chat)
    assert openai.status_code == 429 and openai.json()["error"]["code"] == "rate_limit_exceeded"
    assert openai.json()["error"]["type"] == "rate_limit_error" and openai.headers["x-manylora-limit"] == limit
    stream = world.ask(live, "beta", "POST", "/v1/chat/completions", chat | {"stream": True})
    assert stream.status_code == 429
    thread_of_another = busy(world, live, "acme")  # is not held up
    assert world.ask(other, "beta", "POST", "/generate", BODY | {"parameters": {"max_new_tokens": 2}}).status_code == 200  # of each server
    live.control()
    for one in (thread, thread_of_another):
        one.join(20)
    assert world.ask(live, "beta", "POST", "/generate", BODY).status_code == 200
    assert f'manylora_limit_refusals_total{{limit="{limit}"}} 3.0' in live.client.get("/metrics").text


def test_tokens_of_the_fleet(fleet, world: World) -> None:
    """What one server let through is missing on the other; another tenant has its own."""
    a, b = fleet
    ruled(world, fleet, "limits = { tokens_a_minute = 160 }\n")
    first = world.ask(a, "beta", "POST", "/generate", BODY)
    assert first.status_code == 200 and first.headers["x-ratelimit-limit-tokens"] == "160"
    used = int(first.headers["x-total-tokens"])
    assert used > 90 and int(first.headers["x-ratelimit-remaining-tokens"]) == 160 - used
    refused = world.ask(a, "beta", "POST", "/generate", BODY)
    assert refused.status_code == 429 and "`tokens_a_minute` of the tenant" in refused.json()["error"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60 and refused.headers["x-ratelimit-remaining-tokens"] == str(160 - used)
    wait_for(lambda: world.ask(b, "beta", "POST", "/generate", BODY).status_code == 429)
    assert world.ask(b, "acme", "POST", "/generate", BODY).status_code == 200
    assert "x-ratelimit-limit-tokens" not in world.ask(b, "acme", "POST", "/generate", BODY).headers
    assert world.ask(b, "operator", "POST", "/generate", BODY).status_code == 200


def test_a_stream_that_its_client_leaves_pays_for_what_it_had(fleet, world: World) -> None:
    live, _ = fleet
    ruled(world, fleet, "limits = { tokens_a_minute = 1000000 }\n")
    live.control(step_s=0.02)
    book = live.api.tenancy.limits
    before = book.used().get("tenant/beta", 0)
    with live.client.stream("POST", "/generate_stream", json=BODY, headers=world.headers("beta")) as stream:
        lines = stream.iter_lines()
        while not next(lines).startswith("data:"):
            pass
        assert book.used()["tenant/beta"] - before > 100  # all that may come
    wait_for(lambda: 0 < book.used()["tenant/beta"] - before < 100)
    wait_for(lambda: not book._open)


def test_the_length_of_an_answer(fleet, world: World) -> None:
    live, _ = fleet
    ruled(world, fleet, 'limits = { output_tokens = 20 }\nadapters = { "common/pirate" = { output_tokens = 3 } }\n')
    refused = world.ask(live, "beta", "POST", "/generate", BODY)
    assert refused.status_code == 422 and "`max_new_tokens` must be <= 20, the limit `output_tokens` of the tenant" in refused.text
    open_end = world.ask(live, "beta", "POST", "/generate", {"inputs": "one two"})
    assert open_end.headers["x-generated-tokens"] == "20"
    assert world.ask(live, "acme", "POST", "/generate", BODY).headers["x-generated-tokens"] == "100"
    chat = {"model": "common/pirate", "messages": [{"role": "user", "content": "hello"}]}
    assert world.ask(live, "beta", "POST", "/v1/chat/completions", chat).json()["usage"]["completion_tokens"] == 3
    for name in ("max_tokens", "max_completion_tokens"):
        refused = world.ask(live, "beta", "POST", "/v1/chat/completions", chat | {name: 4})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == name and "adapter 'common/pirate'" in refused.text
    done = world.ask(live, "beta", "POST", "/v1/completions", {"prompt": "x", "model": "common/pirate"})
    assert done.json()["usage"]["completion_tokens"] == 3  # the route's own default is cut, not refused


def test_limits_of_a_shared_adapter_are_of_all_tenants_together(fleet, world: World) -> None:
    live, _ = fleet
    world.write(RULES.replace("[tenants.acme]", 'adapters = { "common/pirate" = { requests_in_flight = 1 } }\n[tenants.acme]'))
    world.settle(live)
    live.control(hang=True)
    pirate = BODY | {"parameters": {"adapter_id": "common/pirate", "max_new_tokens": 2}}
    thread = busy(world, live, "acme", pirate)
    refused = world.ask(live, "beta", "POST", "/generate", pirate)
    assert refused.status_code == 429 and "adapter 'common/pirate' for all tenants" in refused.json()["error"]
    live.control()
    thread.join(20)
    assert world.ask(live, "beta", "POST", "/generate", pirate).status_code == 200


def test_a_file_with_a_typo_leaves_what_holds_in_force(fleet, world: World, caplog: pytest.LogCaptureFixture) -> None:
    live, _ = fleet
    ruled(world, fleet, "limits = { output_tokens = 5 }\n")
    assert "manylora_tenants_file_valid 1.0" in live.client.get("/metrics").text
    world.write(RULES + "limits = { output_token = 50 }\n")
    wait_for(lambda: "manylora_tenants_file_valid 0.0" in live.client.get("/metrics").text)
    assert "tenants.beta.limits.output_token; did you mean output_tokens?" in caplog.text
    assert world.ask(live, "beta", "POST", "/generate", {"inputs": "x"}).headers["x-generated-tokens"] == "5"
    world.tenants_file.unlink()
    wait_for(lambda: "No such file" in caplog.text)
    assert world.ask(live, "beta", "POST", "/generate", {"inputs": "x"}).headers["x-generated-tokens"] == "5"
    ruled(world, fleet, "limits = { output_tokens = 7 }\n")
    wait_for(lambda: "manylora_tenants_file_valid 1.0" in live.client.get("/metrics").text)
    assert world.ask(live, "beta", "POST", "/generate", {"inputs": "x"}).headers["x-generated-tokens"] == "7"

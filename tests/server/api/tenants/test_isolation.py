"""Two tenants over HTTP on two live servers of one fleet: what one has, the other can neither call, see nor change, on any route."""

import importlib
import pkgutil
import re
import threading

import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.responses import PlainTextResponse

import server.api
from server.api.admin import AdminApi
from server.api.app import make_app
from server.api.tenants.access import Access
from server.api.tenants.callers import NUMBERS, OPEN, OPEN_BELOW, LetIn
from server.errors import ServerError
from tests.server.api.live import wait_for
from tests.server.api.tenants.world import ADMIN, World, submitted, without_ids

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def test_what_is_open_is_health_documentation_and_the_page() -> None:
    pages = {"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/api-doc/openapi.json", "/ui"}
    assert {"/", "/health", "/ping", "/startup"} | pages == set(OPEN)
    assert OPEN_BELOW == "/ui/"


def test_every_route_wants_a_credential_but_those_that_say_nothing(live) -> None:
    """Whatever route is added is closed, until it stands in OPEN."""
    found = [route for route in make_app(live.api).routes if getattr(route, "methods", None)]
    for module in pkgutil.walk_packages(server.api.__path__, "server.api."):
        found += getattr(getattr(importlib.import_module(module.name), "router", None), "routes", [])
    assert len(found) > 25
    closed = 0
    for route in found:
        path = re.sub(r"\{[^}]*\}", "x", route.path)
        for method in route.methods:
            is_open = method in ("GET", "HEAD") and (path in OPEN or path.startswith(OPEN_BELOW) or path == NUMBERS)
            answer = live.client.request(method, path, json={})
            assert (answer.status_code == 401) != is_open, (method, path, answer.status_code)
            closed += not is_open
    assert closed > 15
    assert live.client.get("/v1/nothing").status_code == 401


def test_a_tenant_calls_its_own_and_shared_adapters(live, world: World) -> None:
    for tenant, adapter in (("acme", "acme/sql"), ("acme", "common/pirate"), ("beta", "beta/secret"), ("beta", "common/pirate")):
        answer = world.generate(live, tenant, adapter)
        assert answer.status_code == 200 and answer.headers["x-adapter-id"] == adapter, answer.text
        given = submitted(live, answer)
        assert given["tenant"] == tenant and given["weight"] == {"acme": 3, "beta": 1}[tenant] and given["adapter"] is not None
    base = world.generate(live, "acme", None)
    assert base.status_code == 200 and submitted(live, base)["tenant"] == "acme"


@pytest.mark.parametrize("absent", ["beta/nothing", "nobodys/nothing", "nothing"])
def test_not_yours_and_not_there_are_one_answer(live, world: World, absent: str) -> None:
    """On each route that names an adapter; the words differ in the name alone, and no source is asked for what is another's."""
    theirs = ("beta/secret", "nobodys/own")
    assert world.generate(live, "beta", "beta/secret").status_code == 200
    asks = {
        "/generate": lambda name: {"inputs": "x", "parameters": {"adapter_id": name}},
        "/generate_stream": lambda name: {"inputs": "x", "parameters": {"adapter_id": name}},
        "/": lambda name: {"inputs": "x", "parameters": {"adapter_id": name}},
        "/invocations": lambda name: {"inputs": "x", "parameters": {"adapter_id": name}, "stream": True},
        "/v1/completions": lambda name: {"prompt": "x", "model": name},
        "/v1/chat/completions": lambda name: CHAT | {"model": name},
        "/v1/adapters": lambda name: {"name": "mine", "id": name},
        "/v1/load_lora_adapter": lambda name: {"lora_name": "mine", "lora_path": name},
        "/v1/unload_lora_adapter": lambda name: {"lora_name": name},
    }
    for path, body in asks.items():
        expected = without_ids(world.ask(live, "acme", "POST", path, body(absent)), absent)
        assert expected[0] in (404, 424), (path, expected)
        for name in theirs:
            assert without_ids(world.ask(live, "acme", "POST", path, body(name)), name) == expected, (path, name)
    for method, path in (("GET", "/v1/models/{}"), ("GET", "/v1/adapters/{}"), ("DELETE", "/v1/adapters/{}")):
        expected = without_ids(world.ask(live, "acme", method, path.format(absent)), absent)
        assert expected[0] == 404
        for name in theirs:
            assert without_ids(world.ask(live, "acme", method, path.format(name)), name) == expected, (path, name)
    for order in ("load", "pin", "unpin", "unload"):
        expected = without_ids(world.ask(live, "acme", "POST", f"/v1/adapters/{absent}/{order}"), absent)
        assert expected[0] == 404
        for name in theirs:
            assert without_ids(world.ask(live, "acme", "POST", f"/v1/adapters/{name}/{order}"), name) == expected, (order, name)
    merged = {"ids": ["acme/sql", absent], "weights": [1, 1]}
    expected = without_ids(world.generate(live, "acme", None, merged_adapters=merged), absent)
    for name in theirs:
        mixed = merged | {"ids": ["acme/sql", name]}
        assert without_ids(world.generate(live, "acme", None, merged_adapters=mixed), name) == expected


def test_names_of_tenants_do_not_meet(fleet, world: World) -> None:
    """Both publish `sql`, on different servers; each gets its own on either, and the operator's stands behind for whoever has none."""
    a, b = fleet
    for tenant, live in (("acme", a), ("beta", b)):
        answer = world.ask(live, tenant, "POST", "/v1/adapters", {"name": "sql", "id": f"{tenant}/sql"})
        assert answer.status_code == 200, answer.text
        row = answer.json()
        assert (row["id"], row["owner"], row["version"], row["source_id"]) == ("sql", tenant, 1, f"{tenant}/sql")
    assert world.ask(a, "operator", "POST", "/v1/adapters", {"name": "shared", "id": "nobodys/own"}).json()["owner"] is None
    hashes = {row["id"]: row["hash"] for row in world.rows(a, "operator").values()}
    wait_for(lambda: {"acme\\sql", "beta\\sql", "shared"} <= set(world.rows(b, "operator")))
    wait_for(lambda: {"acme\\sql", "beta\\sql", "shared"} <= set(world.rows(a, "operator")))
    hashes = {name: world.rows(a, "operator")[name]["hash"] for name in ("acme\\sql", "beta\\sql", "shared")}
    assert len(set(hashes.values())) == 3
    for live in fleet:
        for tenant in ("acme", "beta"):
            answer = world.generate(live, tenant, "sql")
            assert answer.headers["x-adapter-id"] == "sql"
            assert submitted(live, answer)["adapter"]["hash"] == hashes[f"{tenant}\\sql"]
            assert submitted(live, world.generate(live, tenant, "shared"))["adapter"]["hash"] == hashes["shared"]
    assert submitted(a, world.generate(a, "operator", "beta\\sql"))["adapter"]["hash"] == hashes["beta\\sql"]
    deleted = world.ask(a, "acme", "DELETE", "/v1/adapters/sql")
    assert deleted.json()["deleted"] is True
    assert world.generate(a, "acme", "sql").status_code == 424 and world.generate(a, "beta", "sql").status_code == 200


def test_nobody_spells_anothers_name(live, world: World) -> None:
    """The form in which names are kept is no id of a request."""
    world.ask(live, "beta", "POST", "/v1/adapters", {"name": "spelled", "id": "beta/sql"})
    for name in ("beta\\spelled", "acme\\..\\beta\\spelled", "\\spelled", "beta/../beta\\spelled"):
        answer = world.generate(live, "acme", name)
        assert answer.status_code == 422 and "backslash" in answer.text
        assert world.ask(live, "acme", "POST", "/v1/adapters", {"name": name, "id": "acme/sql"}).status_code == 400
        assert world.ask(live, "acme", "DELETE", "/v1/adapters/" + name.replace("\\", "%5C")).status_code == 404
    assert world.generate(live, "beta", "spelled").status_code == 200


def test_lists_show_what_one_may_call(live, world: World) -> None:
    world.ask(live, "beta", "POST", "/v1/adapters", {"name": "listed", "id": "beta/sql"})
    assert {"acme/sql", "common/pirate"} <= set(world.models(live, "acme"))
    seen = str(world.models(live, "acme")) + str(world.ask(live, "acme", "GET", "/v1/adapters").json())
    assert "beta" not in seen and "secret" not in seen and "nobodys" not in seen and "listed" not in seen
    assert {"listed", "beta/secret"} <= set(world.models(live, "beta")) and "beta/secret" in world.rows(live, "beta")
    assert {"beta\\listed", "beta/secret", "acme/sql"} <= set(world.models(live, "operator"))
    one = world.ask(live, "acme", "GET", "/v1/models/acme/sql").json()
    assert one["id"] == "acme/sql" and world.ask(live, "operator", "GET", "/v1/models/beta%5Clisted").json()["id"] == "beta\\listed"


def test_a_shared_adapter_is_the_operators_to_change(live, world: World) -> None:
    world.generate(live, "beta", "common/pirate")
    row = world.rows(live, "acme")["common/pirate"]
    assert row["owner"] is None and row["hits"] is None and row["requests"] is None  # how much others use it is not told
    assert world.rows(live, "operator")["common/pirate"]["hits"] >= 1
    for method, path in (("POST", "/pin"), ("POST", "/unpin"), ("POST", "/unload"), ("DELETE", "")):
        assert world.ask(live, "acme", method, f"/v1/adapters/common/pirate{path}").status_code == 403, path
    assert world.ask(live, "acme", "POST", "/v1/adapters/common/pirate/load").status_code == 200
    assert world.ask(live, "acme", "POST", "/v1/adapters", {"name": "x", "id": "acme/sql", "owner": "beta"}).status_code == 403


def test_orders_about_ones_own(live, world: World) -> None:
    for name in ("acme/sql", "mine-a"):
        if name == "mine-a":
            world.ask(live, "acme", "POST", "/v1/adapters", {"name": name, "id": "acme/sql"})
        assert world.ask(live, "acme", "POST", f"/v1/adapters/{name}/load").json()["id"] == name
        assert world.ask(live, "acme", "POST", f"/v1/adapters/{name}/pin").json()["pinned"] is True
        second = world.ask(live, "acme", "POST", "/v1/adapters", {"name": "mine-b", "id": "acme/sql", "pin": True})
        assert second.status_code == 409 and "max_pinned" in second.text
        assert world.ask(live, "acme", "POST", f"/v1/adapters/{name}/unpin").json()["pinned"] is False
        assert world.ask(live, "acme", "POST", f"/v1/adapters/{name}/unload").status_code == 200
    again = {"name": "mine-a", "id": "acme/sql", "replace": False}
    taken = world.ask(live, "acme", "POST", "/v1/adapters", again)
    assert taken.status_code == 409 and "'mine-a' is published" in taken.text
    base = world.ask(live, "acme", "POST", "/v1/adapters", {"name": "base", "id": "acme/sql"})
    assert base.status_code == 400 and "base model's" in base.text


def test_the_operator_publishes_for_a_tenant(live, world: World) -> None:
    body = {"name": "given", "id": "nobodys/own", "owner": "beta"}
    row = world.ask(live, "operator", "POST", "/v1/adapters", body).json()
    assert (row["id"], row["owner"]) == ("beta\\given", "beta")
    assert world.generate(live, "beta", "given").status_code == 200 and world.generate(live, "acme", "given").status_code == 424
    assert world.rows(live, "beta")["given"]["owner"] == "beta"
    wrong = world.ask(live, "operator", "POST", "/v1/adapters", body | {"owner": "be/ta"})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "owner"


def test_prefix_caches_are_parted(live, world: World) -> None:
    """By a salt of the tenant's own, the base's and shared adapters' too."""
    salts = {(tenant, name): submitted(live, world.generate(live, tenant, name)).get("cache_salt", "")
             for tenant in ("acme", "beta", "operator") for name in (None, "common/pirate")}  # fmt: skip
    assert salts["acme", None] == salts["acme", "common/pirate"] != salts["beta", None] == salts["beta", "common/pirate"]
    assert all(salts[tenant, None] for tenant in ("acme", "beta")) and salts["operator", None] == ""


def test_numbers_are_the_operators_and_this_machines(live, world: World) -> None:
    assert b"manylora_tenants 2.0" in live.client.get("/metrics").content
    proxied = {"x-forwarded-for": "203.0.113.7"}
    assert live.client.get("/metrics", headers=proxied).status_code == 401
    assert live.client.get("/metrics", headers=proxied | world.headers("acme")).status_code == 403
    assert live.client.get("/metrics", headers=proxied | ADMIN).status_code == 200
    facts = world.ask(live, "acme", "GET", "/info")
    assert facts.status_code == 200 and "beta" not in facts.text


def test_a_tenant_of_the_gateway(live, world: World) -> None:
    gateway = {"x-manylora-gateway-key": "a-gateway-key-of-a-test", "x-manylora-tenant": "gw-acme"}
    body = {"inputs": "x y z", "parameters": {"adapter_id": "acme/sql", "max_new_tokens": 2}}
    answer = live.post("/generate", body, headers=gateway)
    assert answer.status_code == 200 and submitted(live, answer)["tenant"] == "acme"
    foreign = gateway | {"authorization": "Bearer a.b.c", "x-api-key": "whatever"}  # the gateway's own callers' affair
    assert live.post("/generate", body, headers=foreign).status_code == 200
    for headers in (
        {"x-manylora-tenant": "gw-acme"},
        gateway | {"x-manylora-gateway-key": "a-gateway-key-of-a-tess"},
        gateway | {"x-manylora-tenant": "gw-unknown"},
        gateway | {"x-manylora-tenant": ""},
        gateway | {"x-manylora-tenant": "anonymous"},
    ):
        refused = live.post("/generate", body, headers=headers)
        assert refused.status_code == 401 and "gw-" not in refused.text and "gateway-key" not in refused.text
    twice = [*gateway.items(), ("x-manylora-tenant", "beta")]
    assert live.post("/generate", body, headers=twice).status_code == 401


def test_what_is_the_operators_stays_closed_to_tenants(live, world: World) -> None:
    """A route that asks for AdminApi need not know of tenants."""
    app = FastAPI()
    app.state.api = live.api

    @app.get("/secret")
    async def secret(api: AdminApi) -> str:
        return "open"

    app.add_exception_handler(ServerError, lambda request, error: PlainTextResponse(error.message, error.status))
    app.add_middleware(LetIn, identities=live.api.tenancy)
    with TestClient(app) as client:
        statuses = [client.get("/secret", headers=world.headers(name)).status_code for name in ("operator", "acme")]
        assert statuses == [200, 403] and client.get("/secret").status_code == 401


def test_no_source_is_asked_for_what_is_anothers(live, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the answer takes as long for what there is as for what there is not."""
    source, asked = live.api.publisher.raw.get("local"), []
    real = source.snapshot
    monkeypatch.setattr(source, "snapshot", lambda adapter_id, **options: asked.append(adapter_id) or real(adapter_id, **options))
    for name in ("beta/secret", "beta/nothing", "nobodys/own", "nothing"):
        assert world.generate(live, "acme", name).status_code == 424
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/load"), ("POST", "/pin")):
            assert world.ask(live, "acme", method, f"/v1/adapters/{name}{path}").status_code == 404
        assert world.ask(live, "acme", "POST", "/v1/adapters", {"name": "mine", "id": name}).status_code == 404
    assert asked == []
    assert world.generate(live, "acme", "acme/nothing").status_code == 424 and "acme/nothing" in asked


def test_openais_client_with_a_tenants_key(live, world: World) -> None:
    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(api_key=key, base_url=f"{live.base_url}/v1", max_retries=0)

    with client(world.keys["acme"]) as acme, client("mlk_0000000000_" + "a" * 43) as nobody:
        listed = [one.id for one in acme.models.list()]
        assert "acme/sql" in listed and not [one for one in listed if one.startswith("beta")]
        assert acme.completions.create(model="acme/sql", prompt="one two", max_tokens=2).usage.completion_tokens == 2
        with pytest.raises(openai.NotFoundError) as missing:
            acme.completions.create(model="beta/sql", prompt="one two")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.AuthenticationError) as unknown:
            nobody.models.list()
        assert unknown.value.code == "key_unknown"


def test_a_tenant_rolls_back_its_own_names_and_sees_no_numbers_of_all(live, world: World) -> None:
    """What the page and the command line ask for."""
    for adapter_id in ("acme/sql", "common/pirate"):
        assert world.ask(live, "acme", "POST", "/v1/adapters", {"name": "turned", "id": adapter_id}).status_code == 200
    absent = world.ask(live, "beta", "POST", "/v1/adapters/turned/rollback")
    nothing = world.ask(live, "beta", "POST", "/v1/adapters/nothing/rollback")
    assert without_ids(absent, "turned", "nothing") == without_ids(nothing, "turned", "nothing") and absent.status_code == 404
    back = world.ask(live, "acme", "POST", "/v1/adapters/turned/rollback").json()
    assert (back["id"], back["version"], back["source_id"], back["past_versions"]) == ("turned", 1, "acme/sql", [])
    refusal = world.ask(live, "acme", "POST", "/v1/adapters/turned/rollback")
    assert refusal.status_code == 409 and "`name` 'turned' has no version" in refusal.text
    world.ask(live, "acme", "DELETE", "/v1/adapters/turned?release=true")
    for path in ("/v1/stats", "/v1/intake"):
        assert world.ask(live, "acme", "GET", path).status_code == 403 and world.ask(live, "operator", "GET", path).status_code == 200


def test_lists_are_made_beside_the_event_loop(live, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """To look at ten thousand ids takes tenths of a second, in which nothing else would be answered; prompts wait for other threads."""
    threads, real = [], Access.seen
    monkeypatch.setattr(Access, "seen", lambda *asked: threads.append(threading.current_thread().name) or real(*asked))
    for path in ("/v1/models", "/v1/adapters"):
        assert world.ask(live, "acme", "GET", path).status_code == 200
    assert sum(one.startswith("adapter-lists") for one in threads) >= 2 and "live server" not in threads

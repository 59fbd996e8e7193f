"""Credentials that open nothing: each refused with its name, on each family of routes; nothing of them in an answer or a log."""

import json
import logging
import re

import pytest

from server.api.tenants.tokens import Tokens
from tests.server.api.live import live_server, wait_for
from tests.server.api.tenants.issuing import AUDIENCE, ISSUER, IssuerStandIn
from tests.server.api.tenants.world import ADMIN, ADMIN_KEY, GATEWAY_KEY, RULES, World

SECRET_PROMPT = "the-prompt-that-no-log-may-show"
BODY = {"inputs": SECRET_PROMPT, "parameters": {"max_new_tokens": 2}}


@pytest.fixture(scope="module")
def issuer() -> IssuerStandIn:
    return IssuerStandIn()


@pytest.fixture
def trusting(live, world: World, issuer: IssuerStandIn):
    """The server trusts the issuer, whose keys lie in a file."""
    jwks = world.folder / "jwks.json"
    jwks.write_bytes(issuer.jwks)
    world.write(f'{RULES}\n[[issuers]]\nissuer = "{ISSUER}"\naudience = ["{AUDIENCE}"]\njwks = "{jwks}"\n')
    world.settle(live)
    return live


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def code_of(answer) -> str:
    return answer.json()["error"]["code"]


def test_a_tokens_tenant(trusting, world: World, issuer: IssuerStandIn) -> None:
    for tenant in ("acme", "beta"):
        listed = trusting.client.get("/v1/models", headers=bearer(issuer.token(tenant=tenant))).json()["data"]
        assert f"{tenant}/sql" in [one["id"] for one in listed] and world.models(trusting, tenant) == [one["id"] for one in listed]
    stranger = trusting.client.get("/v1/models", headers=bearer(issuer.token(tenant="gamma")))
    assert stranger.status_code == 401 and code_of(stranger) == "credential_unknown" and "gamma" not in stranger.text


def test_each_wrong_credential_is_refused_by_name_and_leaves_no_trace(
    trusting, world: World, issuer: IssuerStandIn, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="server")
    expired = world.ring.create("acme", expires_at=1)[0]
    revoked, prefix, _ = world.ring.create("acme")
    world.ring.revoke(prefix)
    orphan = world.ring.create("gamma")[0]  # of a tenant that there is not
    good = world.keys["acme"]
    key_unknown = [expired, revoked, orphan, good[:-1] + ("a" if good[-1] != "a" else "b"), "mlk_", "mlk_" + "x" * 54, good + "x"]
    wait_for(lambda: len(trusting.api.tenancy.keys.document.keys) >= 5)
    shown = issuer.wrong_tokens() | {"key_unknown": key_unknown}
    for code, credentials in shown.items():
        for credential in credentials:
            openai = trusting.client.get("/v1/models", headers=bearer(credential))
            assert (openai.status_code, code_of(openai)) == (401, code), (code, credential[:30])
            native = trusting.post("/generate", BODY, headers=bearer(credential))
            assert native.status_code == 401 and native.json()["error_type"] == "unauthorized" and native.headers["www-authenticate"]
            for text in (openai.text, native.text, caplog.text):
                assert credential not in text or len(credential) < 6
    for credential in (good, issuer.token()):
        for path in (f"/v1/models?api_key={credential}", f"/v1/models?x={credential}", "/v1/models?key=x", "/v1/models?access_token=x",
                     "/v1/models?Authorization=x"):  # fmt: skip
            answer = trusting.client.get(path, headers=bearer(good))
            assert (answer.status_code, code_of(answer)) == (401, "key_in_query"), path
            assert credential not in answer.text
    for headers, code in (
        ({}, "credential_missing"),
        ({"authorization": f"Basic {good}"}, "credential_missing"),
        ({"authorization": good}, "credential_missing"),
        ({"authorization": "Bearer"}, "credential_missing"),
        ([("authorization", f"Bearer {good}"), ("authorization", f"Bearer {world.keys['beta']}")], "credential_twice"),
        ({"x-api-key": good}, "credential_missing"),
    ):
        answer = trusting.client.get("/v1/models", headers=headers)
        assert (answer.status_code, code_of(answer)) == (401, code), headers
    assert 'manylora_callers_refused_total{reason="token_algorithm"}' in trusting.client.get("/metrics").text
    every = [good, world.keys["beta"], ADMIN_KEY, GATEWAY_KEY, SECRET_PROMPT, *(one for several in shown.values() for one in several)]
    assert "refused: POST / (token_expired)" in caplog.text
    assert not [secret for secret in every if len(secret) > 5 and secret in caplog.text]


def test_a_revoked_key_opens_nothing_on_any_server(fleet, world: World) -> None:
    key, prefix, _ = world.ring.create("acme")
    for live in fleet:
        wait_for(lambda live=live: live.client.get("/v1/models", headers=bearer(key)).status_code == 200)
    world.ring.revoke(prefix)
    for live in fleet:
        wait_for(lambda live=live: live.client.get("/v1/models", headers=bearer(key)).status_code == 401)


def test_logs_say_who_and_which_and_nothing_else(live, world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Odd requests of every kind; the log holds ids and tenants, and neither prompts nor credentials."""
    caplog.set_level(logging.DEBUG, logger="server")
    key = world.keys["acme"]
    odd = [
        ("/generate", BODY),
        ("/generate", BODY | {"parameters": {"adapter_id": "acme/nothing", "api_token": "hf_the-callers-own-token"}}),
        ("/generate", BODY | {"parameters": {"max_new_tokens": 10**9}}),
        ("/generate", BODY | {"parameters": {"stop": [SECRET_PROMPT] * 99}}),
        ("/generate", BODY | {"unheard_of": SECRET_PROMPT}),
        ("/generate_stream", BODY),
        ("/v1/completions", {"model": "base", "prompt": SECRET_PROMPT, "max_tokens": 2}),
        ("/v1/completions", {"model": "base", "prompt": SECRET_PROMPT * 999, "max_tokens": 2}),
        (
            "/v1/chat/completions",
            {"model": "base", "messages": [{"role": "user", "content": SECRET_PROMPT}], "max_tokens": 2, "stream": True},
        ),
        ("/v1/chat/completions", {"model": "base", "messages": [{"role": SECRET_PROMPT, "content": SECRET_PROMPT}]}),
        ("/v1/chat/completions", {"model": "base", "messages": SECRET_PROMPT, "tools": SECRET_PROMPT}),
        ("/tokenize", {"inputs": SECRET_PROMPT}),
        ("/embed", {"inputs": SECRET_PROMPT}),
        ("/v1/adapters", {"name": "x", "id": "acme/nothing", "api_token": "hf_the-callers-own-token"}),
    ]
    answers = [world.ask(live, "acme", "POST", path, body) for path, body in odd]
    assert {answer.status_code for answer in answers} >= {200, 400, 404, 422, 424}
    live.client.post(
        "/generate", content=b'{"inputs": "' + SECRET_PROMPT.encode(), headers=world.headers("acme") | {"content-type": "application/json"}
    )
    live.control(fail="no room", kind="GenerationFailed")
    assert world.ask(live, "acme", "POST", "/generate", BODY).status_code == 424
    request_id = answers[0].headers["x-request-id"]
    line = next(record.getMessage() for record in caplog.records if request_id in record.getMessage())
    assert "tenant=acme" in line and re.search(r"/generate [0-9a-f]{32} status=200", line)
    for secret in (SECRET_PROMPT, key, "hf_the-callers-own-token", "beta"):
        assert secret not in caplog.text, secret


def test_without_tenants_nothing_is_owned_and_prompts_are_logged_if_asked_for(
    tmp_path, model_dir, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="server")
    with live_server(tmp_path, model_dir, log_prompts=True, admin_key=ADMIN_KEY) as live:
        owned = live.post("/v1/adapters", {"name": "x", "owner": "acme"}, headers=ADMIN)
        assert owned.status_code == 400 and "has no tenants" in owned.text
        request_id = live.post("/generate", BODY).headers["x-request-id"]
        live.post("/v1/completions", {"model": "base", "prompt": ["a-first-one", "a-second-one"], "max_tokens": 1})
    assert f"prompt of {request_id}: {json.dumps([SECRET_PROMPT])}" in caplog.text and '["a-first-one", "a-second-one"]' in caplog.text


def test_the_callers_credential_never_goes_to_a_source(tmp_path, model_dir) -> None:
    """Under lorax-strict LoRAX's bearer is the source's token; with tenants it is the tenant's key."""
    world = World(tmp_path)
    with world.server("strict", model_dir, lorax_strict=True) as live:
        asked: list[str | None] = []
        source = live.api.publisher.raw.get("local")
        real = source.snapshot
        source.snapshot = lambda adapter_id, **options: asked.append(options["api_token"]) or real(adapter_id, **options)
        assert world.generate(live, "acme", "acme/sql").status_code == 200
        assert world.generate(live, "acme", "acme/sql", api_token="my-own").status_code == 200
        assert asked and set(asked) == {None, "my-own"}


def test_a_server_with_a_wrong_file_does_not_start(tmp_path, model_dir) -> None:
    world = World(tmp_path, RULES + "limit = { output_tokens = 1 }\n")
    with pytest.raises(ValueError, match=r"unknown key tenants\.beta\.limit; did you mean limits\?"), world.server("a", model_dir):
        pass


def test_a_preflight_needs_no_key_and_a_refusal_can_be_read(tmp_path, model_dir) -> None:
    world, origin = World(tmp_path), {"origin": "https://a.example"}
    with world.server("cors", model_dir, cors_allow_origin=["https://a.example"], root_path="/prod") as live:
        asked = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        assert live.client.options("/prod/generate", headers=asked).status_code == 200
        refused = live.client.get("/prod/v1/models", headers=origin)
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://a.example"
        assert live.client.get("/prod/health").status_code == 200
        assert live.client.get("/prod/v1/models", headers=ADMIN).status_code == 200


def test_trusting_no_issuer_costs_no_look_at_a_token() -> None:
    assert not Tokens(())

"""JSON web tokens: what holds, what is refused and by which name; how often an issuer is asked for its keys."""

import asyncio
import http.client
import json
import socket
import threading
import time

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from server.api.tenants import tokens as module
from server.api.tenants.rules import Issuer
from server.api.tenants.tokens import IssuerKeys, Tokens, fetch_jwks
from server.errors import Unauthorized, Unavailable
from tests.server.api.tenants.issuing import AUDIENCE, ISSUER, IssuerStandIn

RULES = Issuer(issuer=ISSUER, audience=(AUDIENCE, "second"), jwks="https://issuer.example/jwks", cache_s=60)


@pytest.fixture(scope="module")
def made() -> IssuerStandIn:
    return IssuerStandIn()


@pytest.fixture
def issuer(made: IssuerStandIn) -> IssuerStandIn:
    made.num_fetches, made.error, made.keys = 0, None, {"one": made.key}
    return made


async def refusal(tokens: Tokens, token: str) -> str | None:
    with pytest.raises(Unauthorized) as caught:
        await tokens.claim(token)
    assert token not in caught.value.message and not set(token.split(".")) & set(caught.value.message.split())
    return caught.value.code


async def test_a_token_of_the_issuer_holds(issuer: IssuerStandIn) -> None:
    tokens = Tokens((RULES,), fetch=issuer.fetch)
    for token in (
        issuer.token(),
        issuer.token(kid=None),
        issuer.token(aud=["x", "second"]),
        issuer.token(exp=issuer.claims()["exp"] - 620),
    ):
        assert await tokens.claim(token) == "acme"  # the last one has expired within the leeway
    assert issuer.num_fetches == 1


async def test_each_wrong_token_is_refused_by_name(issuer: IssuerStandIn) -> None:
    tokens = Tokens((RULES,), fetch=issuer.fetch)
    for code, wrong in issuer.wrong_tokens().items():
        for token in wrong:
            assert await refusal(tokens, token) == code, (code, token[:40])


async def test_keys_are_asked_for_once_and_again_when_they_are_old(issuer: IssuerStandIn) -> None:
    now = [0.0]
    keys = IssuerKeys(RULES, fetch=issuer.fetch, clock=lambda: now[0])
    await asyncio.gather(*(keys.find("one") for _ in range(20)))
    assert issuer.num_fetches == 1
    now[0] = 59
    await keys.find("one")
    assert issuer.num_fetches == 1
    now[0] = 61
    await keys.find("one")
    assert issuer.num_fetches == 2


async def test_a_new_key_is_found_and_forged_ids_cost_nothing(issuer: IssuerStandIn) -> None:
    now = [0.0]
    keys = IssuerKeys(RULES, fetch=issuer.fetch, clock=lambda: now[0])
    await keys.find("one")
    issuer.keys = {"one": issuer.key, "two": issuer.other}
    for number in range(50):
        with pytest.raises(Unauthorized):
            await keys.find(f"forged-{number}")
    assert issuer.num_fetches == 1
    now[0] = 31
    await keys.find("two")  # the issuer has turned its keys over
    assert issuer.num_fetches == 2
    issuer.keys = {"two": issuer.other}
    now[0] = 100
    with pytest.raises(Unauthorized):
        await keys.find("one")  # and taken the old one away


async def test_while_the_issuer_is_away_its_keys_hold(issuer: IssuerStandIn, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    keys = IssuerKeys(RULES, fetch=issuer.fetch, clock=lambda: now[0])
    await keys.find("one")
    for error in (OSError("connection refused"), ValueError("not JSON"), http.client.BadStatusLine("garbage")):
        issuer.error, now[0] = error, now[0] + 100
        assert await keys.find("one") is not None
        assert str(error) in caplog.text
    fresh = IssuerKeys(RULES, fetch=issuer.fetch, clock=lambda: now[0])
    for _ in range(10):
        with pytest.raises(Unavailable):
            await fresh.find("one")
    assert issuer.num_fetches == 5  # one each time that it was away, and one for ten requests that wait


@pytest.mark.parametrize("answer", ["[]", '"down for maintenance"', "{}", '{"keys": null}', '{"keys": 5}', "[" * 100_000])
async def test_while_the_issuer_answers_anything_else_its_keys_hold(issuer: IssuerStandIn, answer: str) -> None:
    now, answers = [0.0], [issuer.jwks, answer.encode()]
    keys = IssuerKeys(RULES, fetch=lambda where: answers.pop(0), clock=lambda: now[0])
    await keys.find("one")
    now[0] = 100
    assert await keys.find("one") is not None and not answers


async def test_an_issuer_that_hangs_holds_up_nobody(issuer: IssuerStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.1)
    now, release, answers = [0.0], threading.Event(), [lambda: issuer.jwks, lambda: release.wait(20)]
    keys = IssuerKeys(RULES, fetch=lambda where: answers.pop(0)(), clock=lambda: now[0])
    await keys.find("one")
    now[0] = 100
    try:
        async with asyncio.timeout(10):
            assert await keys.find("one") is not None and not answers
    finally:
        release.set()


def test_an_issuer_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_drip, args=(listener,), daemon=True).start()
        with pytest.raises(TimeoutError, match="bytes in 0.2 s"):
            fetch_jwks(f"http://127.0.0.1:{listener.getsockname()[1]}/jwks")


def _drip(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        for _ in range(200):
            try:
                connection.sendall(b" ")
            except OSError:  # it was given up
                return
            time.sleep(0.05)


async def test_a_key_of_another_kind_than_the_tokens_algorithm(issuer: IssuerStandIn) -> None:
    """Anybody can write such a token: the key's id is public."""
    curve = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key())) | {"kid": "curve"}
    published = json.dumps({"keys": [*json.loads(issuer.jwks)["keys"], curve]}).encode()
    tokens = Tokens((RULES.model_copy(update={"algorithms": ("RS256", "ES256")}),), fetch=lambda where: published)
    assert await tokens.claim(issuer.token()) == "acme"
    assert await refusal(tokens, issuer.token(kid="curve")) == "token_signature"


async def test_keys_that_must_not_sign_are_passed_over(issuer: IssuerStandIn) -> None:

    published = json.loads(issuer.jwks)["keys"]
    others = [
        {"kty": "oct", "kid": "secret", "k": "c2VjcmV0", "alg": "HS256"},
        published[0] | {"kid": "enc", "use": "enc"},
        {"kty": "RSA", "kid": "broken"},
        {"kty": "unheard-of", "kid": "new"},
        published[0] | {"kid": ["a", "list"]},
        published[0] | {"kid": "odd", "alg": ["RS256"]},
        "no object",
    ]
    keys = IssuerKeys(RULES, fetch=lambda where: json.dumps({"keys": others + published}).encode())
    assert await keys.find("one") is not None
    for kid in ("secret", "enc", "broken", "new", "odd"):
        with pytest.raises(Unauthorized):
            await keys.find(kid)


async def test_a_new_file_keeps_the_keys_of_issuers_that_did_not_change(issuer: IssuerStandIn) -> None:
    before = Tokens((RULES,), fetch=issuer.fetch)
    await before.claim(issuer.token())
    after = Tokens((RULES, RULES.model_copy(update={"issuer": "https://two.example"})), before, fetch=issuer.fetch)
    assert await after.claim(issuer.token()) == "acme" and issuer.num_fetches == 1
    changed = Tokens((RULES.model_copy(update={"audience": ("other",)}),), after, fetch=issuer.fetch)
    assert await refusal(changed, issuer.token()) == "token_audience"

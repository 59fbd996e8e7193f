"""JSON web tokens: what holds, what is refused and by which name; how often an issuer is asked for its keys."""

import asyncio
import json

import pytest

from server.api.tenants.rules import Issuer
from server.api.tenants.tokens import IssuerKeys, Tokens
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
    for error in (OSError("connection refused"), ValueError("not JSON")):
        issuer.error, now[0] = error, now[0] + 100
        assert await keys.find("one") is not None
        assert str(error) in caplog.text
    fresh = IssuerKeys(RULES, fetch=issuer.fetch, clock=lambda: now[0])
    for _ in range(10):
        with pytest.raises(Unavailable):
            await fresh.find("one")
    assert issuer.num_fetches == 4  # one each time that it was away, and one for ten requests that wait


async def test_keys_that_must_not_sign_are_passed_over(issuer: IssuerStandIn) -> None:

    published = json.loads(issuer.jwks)["keys"]
    others = [
        {"kty": "oct", "kid": "secret", "k": "c2VjcmV0", "alg": "HS256"},
        published[0] | {"kid": "enc", "use": "enc"},
        {"kty": "RSA", "kid": "broken"},
        {"kty": "unheard-of", "kid": "new"},
    ]
    keys = IssuerKeys(RULES, fetch=lambda where: json.dumps({"keys": others + published}).encode())
    assert await keys.find("one") is not None
    for kid in ("secret", "enc", "broken", "new"):
        with pytest.raises(Unauthorized):
            await keys.find(kid)


async def test_a_new_file_keeps_the_keys_of_issuers_that_did_not_change(issuer: IssuerStandIn) -> None:
    before = Tokens((RULES,), fetch=issuer.fetch)
    await before.claim(issuer.token())
    after = Tokens((RULES, RULES.model_copy(update={"issuer": "https://two.example"})), before, fetch=issuer.fetch)
    assert await after.claim(issuer.token()) == "acme" and issuer.num_fetches == 1
    changed = Tokens((RULES.model_copy(update={"audience": ("other",)}),), after, fetch=issuer.fetch)
    assert await refusal(changed, issuer.token()) == "token_audience"

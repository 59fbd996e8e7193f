"""The tenants file: what it says, and that each mistake in it is refused by name."""

import tomllib
from pathlib import Path

import pytest

from server.api.tenants.rules import MAX_WEIGHT, MIN_WEIGHT, Limits, RulesError, parse_rules, read_rules
from server.engine import fairness

ISSUER = '[[issuers]]\nissuer = "https://i"\naudience = ["a"]\n'


def rules(text: str):
    return parse_rules(tomllib.loads(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tenants.acme]\nwieght = 1", "unknown key tenants.acme.wieght; did you mean weight?"),
        ("[tenant.acme]", "unknown key tenant; did you mean tenants?"),
        ("[tenants.acme.limits]\ntokens_per_minute = 1", "tenants.acme.limits.tokens_per_minute; did you mean tokens_a_minute?"),
        ("[tenants.acme.adapters.s]\nrequest_in_flight = 1", "tenants.acme.adapters.s.request_in_flight; did you mean requests_in_flight?"),
        ("[shared.limits]", "unknown key shared.limits"),
        ("[tenants.acme]\nweight = 0", "tenants.acme.weight: Input should be greater than or equal to 0.001. Given: 0"),
        ('[tenants.acme.limits]\nqueue_length = "8"', "tenants.acme.limits.queue_length: Input should be a valid integer. Given: '8'"),
        ("[defaults.limits]\noutput_tokens = 0", "defaults.limits.output_tokens"),
        ('[tenants."ac/me"]', "tenants.ac/me: a tenant's name has 1 to 63 of a-z, 0-9, - and _"),
        ('[tenants."ac\\\\me"]', "(no separators)"),
        ('[tenants."ac:me"]', "(no separators)"),
        ('[tenants."ac me"]', "(no separators)"),
        ('[tenants."Acme"]', "a tenant's name has"),
        ('[tenants."../x"]', "a tenant's name has"),
        ('[tenants.""]', "a tenant's name has"),
        ("[tenants.anonymous]", "is not anonymous"),
        ('[tenants.a]\nsources = { s4 = ["x"] }', "sources.s4: there is no such source; allowed are hub, local, s3"),
        ('[defaults]\nsources = { lokal = ["{tenant}"] }', "defaults: sources.lokal: there is no such source; allowed are hub, local, s3"),
        ('[shared]\nsources = { lokal = ["x"] }', "shared: sources.lokal: there is no such source"),
        ('[tenants.a]\ngateway = ["k"]\n[tenants.b]\ngateway = ["k"]', "tenants.b.gateway: 'k' means tenant a already"),
        ('[tenants.a]\nclaims = ["b"]\n[tenants.b]', "tenants.b.claims: 'b' means tenant a already"),
        ('[gateway]\nothers = "all"', "gateway.others: Input should be 'refuse' or 'each'"),
        ('[[issuers]]\nissuer = "x"', "issuers.0.audience: Field required"),
        (ISSUER + 'jwks = "http://keys.example/x"', "jwks: keys come over https"),
        (ISSUER + 'jwks = "ftp://keys.example/x"', "jwks: keys come over https"),
        (ISSUER + 'jwks = "http://localhost.evil.example/x"', "jwks: keys come over https"),
        (ISSUER + 'jwks = "f"\nalgorithms = ["none"]', "algorithms: 'none' is none of RS256"),
        (ISSUER + 'jwks = "f"\nalgorithms = ["HS256"]', "algorithms: 'HS256' is none of RS256"),
        (ISSUER + 'jwks = "f"\n' + ISSUER + 'jwks = "g"', "issuers: each `issuer` may stand here once"),
        ("x = [", "Invalid value"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "tenants.toml").write_text(text)
    with pytest.raises(RulesError) as caught:
        read_rules(tmp_path / "tenants.toml")
    assert words in str(caught.value) and str(caught.value).startswith(f"tenants file {tmp_path}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RulesError, match="No such file"):
        read_rules(tmp_path / "nothing.toml")


def test_what_a_tenant_does_not_say_comes_from_the_defaults() -> None:
    found = rules(
        """
        [defaults]
        weight = 2.0
        limits = { requests_in_flight = 4, tokens_a_minute = 100 }
        sources = { local = ["{tenant}", "all"], s3 = ["models/{tenant}"] }
        [tenants.acme]
        limits = { tokens_a_minute = 50 }
        sources = { hub = ["acme-org"], s3 = [] }
        [tenants.acme.adapters.sql]
        queue_length = 1
        [tenants.acme.adapters."*"]
        queue_length = 2
        [tenants.beta]
        weight = 0.5
        publish = false
        """
    )
    acme, beta = found.tenant("acme"), found.tenant("beta")
    assert acme is not None and beta is not None and found.tenant("gamma") is None
    assert acme.limits == Limits(requests_in_flight=4, tokens_a_minute=50) and acme.weight == 2 and acme.publish
    assert acme.sources == {"local": ("acme", "all"), "s3": (), "hub": ("acme-org",)}
    assert acme.rules.limits_of("sql").queue_length == 1 and acme.rules.limits_of("other").queue_length == 2
    assert beta.weight == 0.5 and not beta.publish and beta.sources["s3"] == ("models/beta",)


def test_each_key_of_adapters_is_spelled_once() -> None:
    """A source that takes microseconds to spell an id is not asked about a thousand keys for each request."""
    asked: list[str] = []

    def spelling(key: str) -> str:
        asked.append(key)
        return key.strip("/")

    lines = "".join(f'"{key}" = {{ queue_length = {most} }}\n' for key, most in (("a/", 1), ("/a", 2), ("b", 3), ("*", 4)))
    text = f"[tenants.acme.adapters]\n{lines}"
    found, same = rules(text), rules(text)
    acme = found.tenant("acme").rules
    for _ in range(3):
        assert [acme.limits_of(one, "s3", spelling).queue_length for one in ("a", "/a", "b", "c")] == [1, 2, 3, 4]
    assert sorted(asked) == ["/a", "a/", "b"]
    assert acme.limits_of("a", "local", str).queue_length == 4  # each source has its own spelling
    assert found == same  # what is remembered is no part of the rules


def test_whom_the_gateway_and_claims_mean() -> None:
    text = '[tenants.acme]\ngateway = ["k1", "arn:aws:iam::1:role/a"]\nclaims = ["Acme Ltd."]\n[tenants.beta]\n'
    closed, each = rules(text), rules('[gateway]\nothers = "each"\n[defaults]\nsources = { local = ["{tenant}"] }\n' + text)
    for found in (closed, each):
        assert {value: found.of_gateway(value).name for value in ("k1", "arn:aws:iam::1:role/a", "acme", "beta")} == {
            "k1": "acme", "arn:aws:iam::1:role/a": "acme", "acme": "acme", "beta": "beta",
        }  # fmt: skip
        assert found.of_claim("Acme Ltd.").name == "acme" and found.of_claim("k1") is None
    assert closed.of_gateway("k2") is None
    assert each.of_gateway("k2").name == "k2" and each.of_gateway("k2").sources == {"local": ("k2",)}
    one, other = each.of_gateway("arn:aws:iam::1:role/x"), each.of_gateway("arn:aws:iam::1:role/y")
    assert one.name.startswith("id-") and one.name != other.name  # no separator of an ARN comes into a name
    posing = each.of_gateway(one.name)
    assert posing is not None and posing.name not in (one.name, other.name)  # who is called as another one's hash is not that one
    assert each.of_gateway("id-1").name == "id-1"
    assert each.of_gateway("") is None and each.of_gateway("anonymous") is None


def test_a_weight_is_one_that_the_scheduler_takes() -> None:
    assert (MIN_WEIGHT, MAX_WEIGHT) == (fairness.MIN_WEIGHT, fairness.MAX_WEIGHT)

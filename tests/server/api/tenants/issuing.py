"""An issuer of tokens in memory: its keys, its JWKS, and tokens that are right or wrong in one way."""

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

ISSUER, AUDIENCE = "https://issuer.example", "manylora"


class IssuerStandIn:
    """`jwks` is what it publishes; `num_fetches` how often it was asked."""

    def __init__(self) -> None:
        self.key, self.other = (rsa.generate_private_key(65537, 2048) for _ in range(2))
        self.keys = {"one": self.key}
        self.num_fetches = 0
        self.error: Exception | None = None

    @property
    def jwks(self) -> bytes:
        public = {kid: json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key())) for kid, key in self.keys.items()}
        return json.dumps({"keys": [one | {"kid": kid, "use": "sig", "alg": "RS256"} for kid, one in public.items()]}).encode()

    def fetch(self, where: str) -> bytes:
        self.num_fetches += 1
        if self.error is not None:
            raise self.error
        return self.jwks

    def claims(self, **changes: Any) -> dict[str, Any]:
        return {"iss": ISSUER, "aud": AUDIENCE, "exp": int(time.time()) + 600, "tenant": "acme"} | changes

    def token(self, *, key: Any = None, algorithm: str = "RS256", kid: str | None = "one", **changes: Any) -> str:
        headers = {"kid": kid} if kid is not None else {}
        claims = {name: value for name, value in self.claims(**changes).items() if value is not None}
        return jwt.encode(claims, key or self.key, algorithm=algorithm, headers=headers)

    def wrong_tokens(self) -> dict[str, list[str]]:
        """Code of the refusal -> tokens that earn it."""
        now = int(time.time())
        pem = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        good = self.token().split(".")
        return {
            "token_expired": [self.token(exp=now - 60)],
            "token_early": [self.token(nbf=now + 600)],
            "token_audience": [self.token(aud="other"), self.token(aud=["other", "more"])],
            "token_issuer": [self.token(iss="https://other.example"), self.token(iss=None)],
            "token_algorithm": [
                f"{_part({'alg': 'none', 'kid': 'one'})}.{_part(self.claims())}.",
                f"{_part({'alg': 'NoNe', 'kid': 'one'})}.{_part(self.claims())}.{good[2]}",
                _with_hmac(pem, {"alg": "HS256", "kid": "one"}, self.claims()),  # the public key as a shared secret
                self.token(algorithm="ES256", key=ec.generate_private_key(ec.SECP256R1())),
                self.token(algorithm="PS256"),
            ],
            "token_signature": [
                self.token(key=self.other),
                f"{good[0]}.{_part(self.claims(tenant='beta'))}.{good[2]}",
                _with_hmac(pem, {"alg": "RS256", "kid": "one"}, self.claims()),
                self.token(kid="unknown"),
                f"{good[0]}.{good[1]}.",
            ],
            "token_claim": [self.token(exp=None), self.token(aud=None), self.token(tenant=None), self.token(tenant=["acme"])],
            "token_malformed": ["q.w.z", "abc", "ey.ey.ey", "x" * 20_000, "..", good[0]],
        }


def _part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def _with_hmac(secret: bytes, header: dict[str, Any], claims: dict[str, Any]) -> str:
    signed = f"{_part(header)}.{_part(claims)}"
    return f"{signed}.{base64.urlsafe_b64encode(hmac.new(secret, signed.encode(), hashlib.sha256).digest()).rstrip(b'=').decode()}"

"""JSON web tokens (RFC 7519) of the issuers that the tenants file names, checked with their published keys (JWKS, RFC 7517).

Owns the check, the cache of each issuer's keys, and the words of each refusal. Keys are asked for in a thread, once however many wait; an
unknown key id asks again, but not more often than every half minute, so that forged ids cost nothing; while an issuer does not answer,
or answers anything but keys, those that it last gave hold. It does not know what a tenant is: the claim's value is `tenancy`'s to read.
"""

import asyncio
import json
import logging
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jwt

from server.api.tenants.rules import Issuer
from server.errors import Unauthorized, Unavailable

log = logging.getLogger(__name__)

_MAX_TOKEN_CHARS = 16_384
_MAX_JWKS_BYTES = 1 << 20
_FETCH_TIMEOUT_S = 5.0  # for each read
_PATIENCE_S = 10.0  # for all of it: an issuer that drips must hold up nobody
_ASK_AGAIN_S = 30.0  # for a key id that nobody knows, and after a failure

Fetch = Callable[[str], bytes]


def refused(code: str, why: str) -> Unauthorized:
    """A credential that opens nothing. `why` never holds any of it."""
    error = Unauthorized(why)
    error.code = code
    return error


def fetch_jwks(where: str) -> bytes:
    """The document at an address or in a file. Blocks. OSError, ValueError. Redirects are not followed: they could leave https."""
    if "://" not in where:
        with Path(where).open("rb") as file:
            return file.read(_MAX_JWKS_BYTES)
    opener, give_up_at, raw = urllib.request.build_opener(_NoRedirect), time.monotonic() + _PATIENCE_S, b""
    with opener.open(urllib.request.Request(where, headers={"accept": "application/json"}), timeout=_FETCH_TIMEOUT_S) as answer:
        length = answer.length
        while (length is None or len(raw) < length) and (chunk := answer.read1(_MAX_JWKS_BYTES - len(raw))):
            raw += chunk
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"it sent {len(raw)} bytes in {_PATIENCE_S:g} s")
    return raw


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None


class IssuerKeys:
    """The keys of one issuer, as it last gave them. For the event loop's thread."""

    def __init__(self, issuer: Issuer, *, fetch: Fetch = fetch_jwks, clock: Callable[[], float] = time.monotonic) -> None:
        self.issuer, self._fetch, self._clock = issuer, fetch, clock
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._asked_at = self._given_at = float("-inf")
        self._asking = asyncio.Lock()

    async def find(self, key_id: str | None) -> jwt.PyJWK:
        """The key of that id; without an id, the only one. Unauthorized if there is none, Unavailable if the issuer never gave any."""
        if self._clock() - self._given_at > self.issuer.cache_s or self._known(key_id) is None:
            await self._ask()
        if (found := self._known(key_id)) is not None:
            return found
        if not self._keys:
            raise Unavailable("the keys of the token's issuer cannot be had", retry_after_s=_ASK_AGAIN_S)
        raise refused("token_signature", "the token was not signed by a key of its issuer")

    def _known(self, key_id: str | None) -> jwt.PyJWK | None:
        if key_id is None:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(key_id)

    async def _ask(self) -> None:
        began_at = self._clock()
        async with self._asking:
            if self._asked_at >= began_at or self._clock() - self._asked_at < _ASK_AGAIN_S:
                return  # somebody else just did
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    raw = await asyncio.to_thread(self._fetch, self.issuer.jwks)
                self._keys = _read(raw, self.issuer.algorithms)
                self._given_at = self._clock()
            except Exception as error:  # a broken answer may raise anything, and is no reason to turn away whose key is known
                log.error("the keys of issuer %s cannot be had, those that it gave before hold: %r", self.issuer.issuer, error)
            finally:
                self._asked_at = self._clock()


def _read(raw: bytes, algorithms: tuple[str, ...]) -> dict[str | None, jwt.PyJWK]:
    """The keys that may sign; others of the set (for encryption, of a kind that is not taken) are passed over."""
    found: dict[str | None, jwt.PyJWK] = {}
    for item in json.loads(raw)["keys"]:
        if not isinstance(item, dict) or item.get("use", "sig") != "sig" or item.get("kty") == "oct":
            continue
        try:
            key, key_id = jwt.PyJWK.from_dict(item), item.get("kid")
        except (jwt.PyJWTError, TypeError, ValueError):
            continue
        if isinstance(key_id, str | None) and (key.algorithm_name in algorithms or "alg" not in item):
            found[key_id] = key
    if not found:
        raise ValueError("there is no key for the allowed algorithms in it")
    return found


class Tokens:
    """The tokens of all issuers. A new one is made when the rules change; keys of issuers that did not change are kept."""

    def __init__(self, issuers: tuple[Issuer, ...], before: "Tokens | None" = None, *, fetch: Fetch = fetch_jwks) -> None:
        known = before._keys if before is not None else {}
        self._keys = {
            one.issuer: known[one.issuer] if one.issuer in known and known[one.issuer].issuer == one else IssuerKeys(one, fetch=fetch)
            for one in issuers
        }

    def __bool__(self) -> bool:
        return bool(self._keys)

    async def claim(self, token: str) -> str:
        """The value of the claim that says which tenant. Unauthorized, naming what is wrong with the token."""
        if len(token) > _MAX_TOKEN_CHARS:
            raise refused("token_malformed", f"the token is longer than {_MAX_TOKEN_CHARS} characters")
        try:
            header = jwt.get_unverified_header(token)
            claimed = jwt.decode(token, options={"verify_signature": False}).get("iss")
        except (jwt.PyJWTError, ValueError):
            raise refused("token_malformed", "the bearer's credential is neither a key of this server nor a readable token") from None
        keys = self._keys.get(claimed) if isinstance(claimed, str) else None
        if keys is None:
            raise refused("token_issuer", "the token's issuer is not one that this server trusts")
        issuer = keys.issuer
        if header.get("alg") not in issuer.algorithms:
            raise refused("token_algorithm", f"the token's algorithm is not allowed; allowed are {', '.join(issuer.algorithms)}")
        key_id = header.get("kid")
        key = await keys.find(key_id if isinstance(key_id, str) else None)
        claims = _verified(token, key, header["alg"], issuer)
        value = claims.get(issuer.claim)
        if not isinstance(value, str) or not value:
            raise refused("token_claim", f"the token has no claim `{issuer.claim}`, which says whose it is")
        return value


def _verified(token: str, key: jwt.PyJWK, algorithm: str, issuer: Issuer) -> dict[str, Any]:
    """The claims of a token whose signature, times, issuer and audience hold."""
    try:
        return jwt.decode(
            token, key.key, algorithms=[algorithm], audience=list(issuer.audience), issuer=issuer.issuer, leeway=issuer.leeway_s,
            options={"require": ["exp", "iss", "aud"]},
        )  # fmt: skip
    except (jwt.PyJWTError, TypeError) as error:
        _refuse(error)


_REASONS: tuple[tuple[type[Exception], str, str], ...] = (
    (jwt.ExpiredSignatureError, "token_expired", "the token has expired"),
    (jwt.ImmatureSignatureError, "token_early", "the token does not hold yet"),
    (jwt.InvalidAudienceError, "token_audience", "the token is for another audience"),
    (jwt.InvalidIssuerError, "token_issuer", "the token's issuer is not one that this server trusts"),
    (jwt.MissingRequiredClaimError, "token_claim", "the token must say until when, by whom and for whom it is (exp, iss, aud)"),
    (jwt.InvalidSignatureError, "token_signature", "the token was not signed by a key of its issuer"),
    (TypeError, "token_signature", "the token was not signed by a key of its issuer"),  # the key is of another kind than its `alg`
)


def _refuse(error: Exception) -> NoReturn:
    for kind, code, why in _REASONS:
        if isinstance(error, kind):
            raise refused(code, why) from None
    raise refused("token_malformed", "the token is not valid") from None

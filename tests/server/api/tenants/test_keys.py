"""API keys: shown once, kept as hashes, known to every server of a fleet, refused alike whatever is wrong with them."""

import re
from pathlib import Path

import pytest

from server.api.tenants import keys as module
from server.api.tenants.keys import KeyRing
from server.errors import ValidationFailed


def test_a_key_opens_until_it_expires_or_is_revoked(tmp_path: Path) -> None:
    now = [1000.0]
    ring = KeyRing(tmp_path, clock=lambda: now[0])
    key, prefix, _ = ring.create("acme")
    short, _, kept = ring.create("beta", expires_at=1010, label="ci")
    assert re.fullmatch(r"mlk_[0-9a-f]{10}_[A-Za-z0-9_-]{43}", key) and key.startswith(prefix) and kept.label == "ci"
    assert ring.check(key) == ("acme", prefix) and ring.check(short)[0] == "beta"
    now[0] = 1010
    assert ring.check(short) is None and ring.check(key) is not None
    assert ring.revoke(prefix) == prefix and ring.check(key) is None
    assert [one.state(now[0]) for one in ring.document.keys.values()] == ["revoked", "expired"]


def test_nothing_but_the_key_itself_opens(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path)
    key, prefix, kept = ring.create("acme")
    other = ring.create("beta")[0]
    swapped = prefix + other[len(prefix) :]  # the prefix of one, the secret of another
    for wrong in (
        "",
        prefix,
        kept.hash,
        key[:-1],
        key + "x",
        key.upper(),
        f" {key}",
        swapped,
        "mlk_é",
        key.replace("mlk", "MLK"),
        "\ud800",
    ):
        assert ring.check(wrong) is None, wrong


def test_every_check_compares_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In constant time, for a prefix that there is and one that there is not."""
    ring = KeyRing(tmp_path)
    key, prefix, _ = ring.create("acme")
    compared = []
    real = module.hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda one, other: compared.append((len(one), len(other))) or real(one, other))
    for shown in (key, key[:-1] + ("a" if key[-1] != "a" else "b"), "mlk_0000000000_" + "a" * 43, "nonsense"):
        ring.check(shown)
    assert compared == [(64, 64)] * 4


def test_no_key_is_kept(tmp_path: Path) -> None:
    key, prefix, _ = KeyRing(tmp_path).create("acme")
    text = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert prefix in text and key not in text and key[len(prefix) + 1 :] not in text


def test_two_servers_of_a_fleet(tmp_path: Path) -> None:
    """What one makes or revokes holds on the other once it looks; what is written at the same time is not lost."""
    one, other = KeyRing(tmp_path), KeyRing(tmp_path)
    key, prefix, _ = one.create("acme")
    second, _, _ = other.create("beta")  # other has not looked since
    assert other.check(key) is not None and one.check(second) is None
    assert one.refresh() and one.check(second) is not None and not one.refresh()
    other.revoke(key)
    assert one.check(key) is not None and one.refresh() and one.check(key) is None
    assert one.document.generation == 3


def test_what_is_not_there_cannot_be_revoked_and_is_not_echoed(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path)
    for wrong in ("mlk_0000000000", "mlk_0000000000_" + "s" * 43, ""):
        with pytest.raises(ValidationFailed) as caught:
            ring.revoke(wrong)
        assert "sss" not in caught.value.message


def test_dead_keys_give_their_place_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KEYS", 2)
    ring = KeyRing(tmp_path)
    _, first, _ = ring.create("acme")
    ring.create("acme")
    with pytest.raises(ValidationFailed, match="all that are kept"):
        ring.create("acme")
    ring.revoke(first)
    ring.create("acme")
    assert len(ring.document.keys) == 2 and first not in ring.document.keys

"""Limits: each refused by its name with a time to wait, held against one tenant or adapter alone, given back whatever ends a request."""

from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from server.api.selection import AdapterSelection, Merge
from server.api.tenants.limits import LimitBook, Scope, scopes_of
from server.api.tenants.rules import Limits, Shared, parse_rules
from server.errors import LimitReached, ValidationFailed


@dataclass
class Running:
    is_waiting: bool = True
    num_used_tokens: int = 0


def scope(key: str = "tenant/acme", **limits: int) -> list[Scope]:
    return [Scope(key, "the tenant", Limits(**limits))]


@pytest.fixture
def now() -> list[float]:
    return [1000.0]


@pytest.fixture
def book(now: list[float]) -> LimitBook:
    return LimitBook(clock=lambda: now[0])


def test_sequences_in_flight_are_of_one_tenant(book: LimitBook) -> None:
    acme, beta = scope(requests_in_flight=3), scope("tenant/beta", requests_in_flight=1)
    with book.admitted(acme, 2, Running()):
        with (
            pytest.raises(LimitReached, match=r"limit `requests_in_flight` of the tenant is reached \(3\)") as caught,
            book.admitted(acme, 2, Running()),
        ):
            pass
        assert caught.value.retry_after_s == 1 and caught.value.headers["x-manylora-limit"] == "requests_in_flight"
        with book.admitted(acme, 1, Running()), book.admitted(beta, 1, Running()):
            pass
    with book.admitted(acme, 3, Running()):
        pass


def test_only_what_has_no_token_waits(book: LimitBook) -> None:
    first = Running()
    with ExitStack() as stack:
        stack.enter_context(book.admitted(scope(queue_length=1), 1, first))
        with pytest.raises(LimitReached, match="`queue_length`"):
            stack.enter_context(book.admitted(scope(queue_length=1), 1, Running()))
        first.is_waiting = False
        stack.enter_context(book.admitted(scope(queue_length=1), 1, Running()))


def test_tokens_are_taken_for_what_may_come_and_given_back(book: LimitBook, now: list[float]) -> None:
    limited, request = scope(tokens_a_minute=100), Running()
    with book.admitted(limited, 1, request) as lease:
        lease.take(80)
        with pytest.raises(LimitReached) as caught, book.admitted(limited, 1, Running()) as other:
            other.take(30)
        assert caught.value.retry_after_s == 60 and caught.value.headers == {
            "x-manylora-limit": "tokens_a_minute", "x-ratelimit-limit-tokens": "100", "x-ratelimit-remaining-tokens": "20",
            "x-ratelimit-reset-tokens": "60s",
        }  # fmt: skip
        request.num_used_tokens = 15
    assert book.used() == {"tenant/acme": 15}
    now[0] += 20
    with book.admitted(limited, 1, Running(num_used_tokens=85)) as lease:
        lease.take(85)
        assert lease.headers()["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(LimitReached) as caught, book.admitted(limited, 1, None):
        pass
    assert caught.value.retry_after_s == 40  # when the first fifteen are a minute old
    now[0] += 40
    assert book.used() == {"tenant/acme": 85}


def test_tokens_come_back_from_a_request_that_fails(book: LimitBook) -> None:
    with pytest.raises(RuntimeError), book.admitted(scope(tokens_a_minute=100), 1, Running(num_used_tokens=7)) as lease:
        lease.take(100)
        raise RuntimeError
    assert book.used() == {"tenant/acme": 7}


def test_a_request_beyond_the_limit_passes_when_nothing_was_used(book: LimitBook, now: list[float]) -> None:
    limited = scope(tokens_a_minute=100)
    with book.admitted(limited, 1, Running(num_used_tokens=300)) as lease:
        lease.take(300)
    with pytest.raises(LimitReached), book.admitted(limited, 1, Running()):
        pass
    now[0] += 60
    with book.admitted(limited, 1, Running()) as lease:
        lease.take(300)


def test_what_the_fleet_used_counts(book: LimitBook) -> None:
    book.others = {"tenant/acme": 90}
    with pytest.raises(LimitReached) as caught, book.admitted(scope(tokens_a_minute=100), 1, Running()) as lease:
        lease.take(40)
    assert caught.value.retry_after_s == 20  # 30 of the 90, as if they had come evenly
    with book.admitted(scope("tenant/beta", tokens_a_minute=100), 1, Running()) as lease:
        lease.take(100)


def test_the_length_of_an_answer(book: LimitBook) -> None:
    both = scope(output_tokens=50) + [Scope("adapter/acme/local/sql", "adapter 'sql'", Limits(output_tokens=20))]
    with book.admitted(both, 1, Running()) as lease:
        assert lease.bounded([100, 5]) == [20, 5]
        lease.check_output(20, "max_tokens")
        lease.check_output(None, "max_tokens")
        with pytest.raises(ValidationFailed, match="`max_tokens` must be <= 20, the limit `output_tokens` of adapter 'sql'. Given: 21"):
            lease.check_output(21, "max_tokens")


def test_nothing_is_held_after_a_refusal(book: LimitBook) -> None:
    both = scope(requests_in_flight=5) + [Scope("adapter/acme/local/sql", "adapter 'sql'", Limits(requests_in_flight=1))]
    with book.admitted(both, 1, Running()):
        for _ in range(9):
            with pytest.raises(LimitReached, match="adapter 'sql'"), book.admitted(both, 1, Running()):
                pass
    assert not book._open


def test_what_a_request_counts_for() -> None:
    rules = parse_rules(
        {
            "tenants": {
                "acme": {
                    "limits": {"queue_length": 9},
                    "adapters": {"sql": {"queue_length": 1}, "*": {"queue_length": 2}},
                },
                "beta": {},
            }
        }
    )
    shared = Shared(adapters={"pirate": Limits(queue_length=3)})
    acme, beta = rules.tenant("acme"), rules.tenant("beta")

    def keys(tenant, selection, *shared_ids: str) -> dict[str, int | None]:
        return {one.key: one.limits.queue_length for one in scopes_of(tenant, shared, selection, shared_ids)}

    assert keys(acme, None) == {"tenant/acme": 9} and keys(beta, None) == {}
    assert keys(acme, AdapterSelection("local", "acme\\sql")) == {"tenant/acme": 9, "adapter/acme/local/acme\\sql": 1}
    pirate = AdapterSelection("local", "pirate")
    assert keys(acme, pirate, "pirate") == {"tenant/acme": 9, "adapter/acme/local/pirate": 2, "shared/local/pirate": 3}
    assert keys(beta, pirate, "pirate") == {"shared/local/pirate": 3}  # the same count for both
    merged = AdapterSelection("local", merge=Merge(("a", "b", "a"), (1, 1, 1)))
    assert keys(acme, merged) == {"tenant/acme": 9, "adapter/acme/local/a": 2, "adapter/acme/local/b": 2}
    with_own = AdapterSelection("local", merge=Merge(("pirate", "beta\\own"), (1, 0)))
    assert keys(beta, with_own, "pirate") == {"shared/local/pirate": 3}  # merged with one's own it is still the shared one

"""What one server knows of tenants stays up to date, whatever goes wrong once."""

import asyncio

import pytest

from server.api.tenants.tenancy import Tenancy


async def test_a_fault_of_ours_does_not_end_the_following(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    calls = {"rules": 0, "keys": 0, "usage": 0}
    tenancy = Tenancy.__new__(Tenancy)
    for name in calls:

        async def refresh(name: str = name) -> None:
            calls[name] += 1
            if calls[name] == 1:
                raise RecursionError(f"a fault about {name}")

        monkeypatch.setattr(tenancy, f"_refresh_{name}", refresh, raising=True)
    following = asyncio.create_task(tenancy.follow(0.01))
    async with asyncio.timeout(10):
        while min(calls.values()) < 3:
            await asyncio.sleep(0.01)
    following.cancel()
    assert all(f"a fault about {name}" in caplog.text for name in calls)

"""What one server knows of tenants stays up to date, whatever goes wrong once."""

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from server.api.tenants import tenancy as module
from server.api.tenants.tenancy import Tenancy
from server.metrics import TenantSeries


async def test_a_changed_file_is_read_beside_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of thousands of tenants takes tenths of a second."""
    threads, real = [], module.LinkBounds
    monkeypatch.setattr(module, "LinkBounds", lambda rules: threads.append(threading.current_thread()) or real(rules))
    file = tmp_path / "tenants.toml"
    file.write_text('[tenants.acme]\nsources = { local = ["a"] }\n')
    settings = SimpleNamespace(admin_key=None, gateway_key=None, tenants_file=file, registry_dir=tmp_path)
    tenancy = Tenancy(settings, None, None, TenantSeries(CollectorRegistry()))
    assert tenancy.link_bounds("b/x") == []
    file.write_text('[tenants.acme]\nsources = { local = ["a", "b"] }\n')
    await tenancy._refresh_rules()
    assert tenancy.link_bounds("b/x") == ["b"] and tenancy.rules.tenant("acme").sources == {"local": ("a", "b")}
    assert len(threads) == 2 and threads[1] is not threading.current_thread()


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

"""The shared file system (EFS) of a fleet hangs or fails, for all that a server asks of it: adapters, published names, orders."""

import errno
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.api import registry
from tests.faults.stall import Stall
from tests.server.api.live import live_server, wait_for
from tests.server.api.test_adapters import PROMPT, write_adapter

KEY = "an-admin-key-of-a-test"
ADMIN = {"authorization": f"Bearer {KEY}"}


def body(adapter=None, **parameters):
    return {"inputs": PROMPT, "parameters": {"adapter_id": adapter, "max_new_tokens": 3, **parameters}}


@pytest.fixture
def fleet(tmp_path, model_dir, monkeypatch):
    """A server with two known adapters (one of them published) and one that it has not seen, on a file system that can go away."""
    shared = tmp_path / "efs"
    for name in ("known", "source", "new"):
        write_adapter(shared / "adapters" / name, seed=len(name))
    stall = Stall(shared, monkeypatch)
    settings = {"adapters_dir": shared / "adapters", "registry_dir": shared / "registry", "admin_key": KEY, "registry_poll_s": 0.05}
    monkeypatch.setattr(registry, "_PATIENCE_S", 1.0)
    with live_server(tmp_path / "server", model_dir, adapter_timeout_s=4, **settings) as live:
        assert live.post("/v1/adapters", {"name": "published", "id": "source"}, headers=ADMIN).status_code == 200
        time.sleep(2.6)  # the folders are older than what the store takes for settled
        for name in ("known", "published") * 2:
            assert live.post("/generate", body(name)).status_code == 200
        yield live, stall


@pytest.mark.fault(
    "Files and disks", "the shared file system hangs, every call of it",
    "an adapter that is not here: 424 after `--adapter-timeout-s`; an order of the admin: 503 after 20 s",
    "the base goes on, adapters and published names that are here go on after 2 s at most; all as before once it answers",
)  # fmt: skip
def test_it_hangs(fleet) -> None:
    live, stall = fleet
    with ThreadPoolExecutor(40) as pool:
        with stall.hangs():
            wait_for(lambda: stall.num_waiting)  # the poll of the registry, for one
            unknown = [pool.submit(live.post, "/generate", body("new")) for _ in range(3)]
            orders = [pool.submit(live.post, "/v1/adapters/known/unload", None, headers=ADMIN) for _ in range(12)]
            publish = pool.submit(live.post, "/v1/adapters", {"name": "another", "id": "new"}, headers=ADMIN)
            known = [pool.submit(live.post, "/generate", body(name)) for name in ("known", "published", None) * 5]
            assert [one.result(30).status_code for one in known] == [200] * 15
            chat = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
            assert live.post("/v1/chat/completions", chat).status_code == 200  # rendered and tokenized in threads: none is lost to the hang
            assert live.client.get("/health").status_code == 200 and live.client.get("/v1/models", timeout=30).status_code == 200
            answers = [one.result(30) for one in unknown]
            assert [one.status_code for one in answers] == [424] * 3 and "was not ready within 4 s" in answers[0].text
            refused = [one.result(30) for one in orders]
            assert {one.status_code for one in refused} == {503} and "file system does not answer" in refused[0].text
            assert publish.result(30).status_code == 424 and "within 4 s" in publish.result().text
            assert live.post("/generate", body("known")).status_code == 200
        wait_for(lambda: not stall.num_waiting)
    wait_for(lambda: live.post("/generate", body("new")).status_code == 200)
    assert live.post("/v1/adapters", {"name": "published", "id": "new"}, headers=ADMIN).status_code == 200


@pytest.mark.fault(
    "Files and disks", "the shared file system answers every call with an error (EIO, ESTALE)",
    "424 for an adapter that is not here; an order changes nothing and says so", "adapters and names that are here go on as they were",
)  # fmt: skip
@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_it_fails(fleet, error) -> None:
    live, stall = fleet
    with stall.fails(error):
        for name in ("known", "published", None):
            assert live.post("/generate", body(name)).status_code == 200, name
        answer = live.post("/generate", body("new"))
        assert answer.status_code == 424 and "unavailable" in answer.text and "efs" not in answer.text
        refused = live.post("/v1/adapters/published/pin", None, headers=ADMIN)
        assert refused.status_code == 424 and "nothing was changed" in refused.text
        assert live.client.get("/health").status_code == 200
    assert live.api.publisher.registry.entry("published").pinned is False
    wait_for(lambda: live.post("/generate", body("new")).status_code == 200)
    assert live.post("/v1/adapters/published/pin", None, headers=ADMIN).status_code == 200


def test_a_source_that_comes_back_with_something_else_is_believed_at_once(fleet) -> None:
    live, stall = fleet
    before = live.post("/generate", body("known")).headers["x-request-id"]
    with stall.hangs():
        assert live.post("/generate", body("known")).status_code == 200
    wait_for(lambda: not stall.num_waiting)
    write_adapter(live.api.settings.adapters_dir / "known", seed=99)
    after = live.post("/generate", body("known")).headers["x-request-id"]
    hashes = {one["request_id"].rsplit("-", 1)[0]: one["adapter"]["hash"] for one in live.seen("Submit") if one.get("adapter")}
    assert hashes[before] != hashes[after]

"""/v1/adapters over HTTP: what orders do to requests, memory and a second server on the same folder."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from server.api.adapters import AdapterSelection
from tests.server.api.fleet import answered, forgotten, order, publish, rows, submitted, write
from tests.server.api.live import wait_for
from tests.server.api.test_adapters import PROMPT


def test_a_name_keeps_what_was_published_whatever_becomes_of_the_folder(fleet) -> None:
    live, _ = fleet
    one = write(live, "kept-source", seed=1, rank=3)
    row = publish(live, "kept", id="kept-source")
    assert row | {"load_s": 0} == {
        "id": "kept", "object": "adapter", "source": "local", "source_id": "kept-source", "version": 1, "hash": one, "base": "x", "rank": 3,
        "published_at": row["published_at"], "state": "ready", "tier": "host", "file_bytes": row["file_bytes"],
        "memory_bytes": row["memory_bytes"], "load_s": 0, "error": None, "hits": 0, "requests": 0, "pinned": False,
        "past_versions": [],
    }  # fmt: skip
    assert row["file_bytes"] > 0 and row["memory_bytes"] > 0
    two = write(live, "kept-source", seed=2)
    assert answered(live, "kept") == one and answered(live, "kept-source") == two
    shutil.rmtree(live.folder.parent / "adapters/kept-source")
    assert answered(live, "kept") == one and answered(live, "kept-source") is None
    assert rows(live)["kept"]["hits"] == 2
    models = {model["id"]: model["created"] for model in live.client.get("/v1/models").json()["data"]}
    assert models["kept"] == row["published_at"]
    order(live, "adapters/kept", method="DELETE")
    assert "kept" not in {model["id"] for model in live.client.get("/v1/models").json()["data"]}


def test_publishing_anew_takes_effect_at_once_and_running_requests_end_as_they_began(fleet) -> None:
    live, _ = fleet
    one = write(live, "turn", seed=3)
    publish(live, "turn")
    live.control(step_s=0.1)
    body = {"inputs": PROMPT, "parameters": {"adapter_id": "turn", "max_new_tokens": 15}}
    with ThreadPoolExecutor() as threads, live.client.stream("POST", "/generate_stream", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)  # it runs
        two = write(live, "turn", seed=4)
        assert threads.submit(publish, live, "turn").result()["version"] == 2
        later = threads.submit(answered, live, "turn")
        assert later.result() == two
        listed = order(live, "adapters", method="GET")
        assert [(one["hash"], one["requests"]) for one in listed["draining"]] == [(one, 1)]
        assert not forgotten(live, one)
        rest = [json.loads(line[5:]) for line in lines if line.startswith("data:")]
    assert rest[-1]["generated_text"] and submitted(live, stream.headers["x-request-id"]) == one
    assert wait_for(lambda: forgotten(live, one))[0]["running"] == []
    assert not forgotten(live, two) and order(live, "adapters", method="GET")["draining"] == []


def test_unload_frees_memory_once_the_last_request_ends_and_the_name_goes_on(fleet) -> None:
    live, _ = fleet
    one = write(live, "heavy", seed=5)
    assert answered(live, "heavy") == one  # never published: a folder's name is as good
    assert rows(live)["heavy"]["tier"] == "host"
    live.control(step_s=0.1)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(answered, live, "heavy", max_new_tokens=8)
        wait_for(lambda: rows(live)["heavy"]["requests"] == 1)
        order(live, "adapters/heavy/unload")
        assert not forgotten(live, one)
        assert running.result() == one
    wait_for(lambda: forgotten(live, one))
    wait_for(lambda: order(live, "adapters/heavy", method="GET")["tier"] == "absent")
    assert answered(live, "heavy") == one and len(forgotten(live, one)) == 1


def test_weights_that_another_name_means_are_not_freed(fleet) -> None:
    live, _ = fleet
    one = write(live, "shared-a", seed=6)
    publish(live, "shared-a")
    publish(live, "shared-b", id="shared-a")
    order(live, "adapters/shared-a", method="DELETE")
    assert answered(live, "shared-a") is None and answered(live, "shared-b") == one
    assert not forgotten(live, one)
    order(live, "adapters/shared-b", method="DELETE")
    wait_for(lambda: forgotten(live, one))


def test_a_replaced_folder_is_forgotten_too(fleet) -> None:
    live, _ = fleet
    one = write(live, "followed", seed=7)
    assert answered(live, "followed") == one
    two = write(live, "followed", seed=8)
    assert answered(live, "followed") == two
    wait_for(lambda: forgotten(live, one))
    shutil.rmtree(live.folder.parent / "adapters/followed")
    assert answered(live, "followed") is None
    wait_for(lambda: forgotten(live, two))


def test_a_deleted_name_stays_deleted_though_its_folder_is_there(fleet) -> None:
    live, _ = fleet
    one = write(live, "gone", seed=9)
    order(live, "adapters/gone", method="DELETE")
    assert answered(live, "gone") is None and "gone" not in rows(live)
    assert live.post("/v1/completions", {"model": "gone", "prompt": PROMPT}).status_code == 404
    merged = {"ids": ["gone", "gone"], "weights": [0.5, 0.5]}
    both = live.post("/generate", {"inputs": PROMPT, "parameters": {"merged_adapters": merged}})
    assert both.status_code == 424 and "'gone' was not found" in both.text
    order(live, "adapters/gone", method="DELETE", status=404)
    order(live, "adapters/gone", method="GET", status=404)
    order(live, "adapters/gone/pin", status=404)
    assert publish(live, "gone")["hash"] == one and answered(live, "gone") == one
    order(live, "adapters/gone?release=true", method="DELETE")
    assert answered(live, "gone") == one  # the folder's
    assert rows(live)["gone"]["version"] is None


def test_orders_reach_the_other_server(fleet) -> None:
    a, b = fleet
    one = write(a, "far", seed=10)
    publish(a, "far")
    shutil.rmtree(a.folder.parent / "adapters/far")
    wait_for(lambda: answered(b, "far") == one)
    two = write(a, "far", seed=11)
    publish(a, "far")
    wait_for(lambda: answered(b, "far") == two)
    wait_for(lambda: forgotten(b, one))
    order(a, "adapters/far/pin")
    wait_for(lambda: [pin for pin in b.seen("Pin") if pin["hash"] == two])
    assert rows(b)["far"]["pinned"] is True
    order(b, "adapters/far/unload")
    wait_for(lambda: forgotten(a, two) and forgotten(b, two))
    wait_for(lambda: [unpin for unpin in a.seen("Unpin") if unpin["hash"] == two])
    order(a, "adapters/far/load")
    wait_for(lambda: rows(b)["far"]["tier"] == "host")
    order(a, "adapters/far", method="DELETE")
    wait_for(lambda: answered(b, "far") is None)
    assert order(a, "adapters", method="GET")["generation"] == order(b, "adapters", method="GET")["generation"]


def test_pins_follow_the_name_and_survive_the_engine(fleet) -> None:
    live, _ = fleet
    one = write(live, "dear", seed=12)
    publish(live, "dear", pin=True)
    wait_for(lambda: [pin for pin in live.seen("Pin") if pin["hash"] == one])
    two = write(live, "dear", seed=13)
    assert publish(live, "dear")["pinned"] is True
    wait_for(lambda: [pin for pin in live.seen("Unpin") if pin["hash"] == one])
    num_pins = len([pin for pin in live.seen("Pin") if pin["hash"] == two])
    assert num_pins == 1 and wait_for(lambda: forgotten(live, one))
    live.control(exit=1)
    assert live.post("/generate", {"inputs": PROMPT}).status_code == 503
    live.control()
    wait_for(lambda: len([pin for pin in live.seen("Pin") if pin["hash"] == two]) == 2)
    assert order(live, "adapters/dear/unpin")["pinned"] is False
    wait_for(lambda: [pin for pin in live.seen("Unpin") if pin["hash"] == two])


def test_a_fault_of_ours_with_one_pinned_adapter_leaves_the_others_pinned(fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    live, _ = fleet
    names = ("faulty", "sound")
    hashes = {name: write(live, name, seed=seed) for seed, name in enumerate(names, 40)}
    for name in names:
        publish(live, name, pin=True)

    def num_pins(name: str) -> int:
        return len([pin for pin in live.seen("Pin") if pin["hash"] == hashes[name]])

    wait_for(lambda: all(num_pins(name) == 1 for name in names))
    resolve = live.api.adapters.resolve

    async def resolve_or_fail(selection: AdapterSelection, *arguments: Any, **options: Any) -> Any:
        if selection.adapter_id == "faulty":
            raise RuntimeError("a fault of ours")
        return await resolve(selection, *arguments, **options)

    monkeypatch.setattr(live.api.adapters, "resolve", resolve_or_fail)
    assert live.server._loop is not None
    for name in names:  # as if both had new content: the first one to be looked at fails
        live.server._loop.call_soon_threadsafe(live.api.publisher._pins.let_go, name)
    wait_for(lambda: num_pins("sound") == 2)
    assert num_pins("faulty") == 1
    monkeypatch.undo()
    wait_for(lambda: num_pins("faulty") == 2)  # it is tried again
    for name in names:
        order(live, f"adapters/{name}/unpin")


def test_what_cannot_be_served_changes_nothing(fleet) -> None:
    live, _ = fleet
    one = write(live, "firm", seed=14)
    publish(live, "firm")
    write(live, "unfit", target_modules=["nothing_of_that_name"])
    refused = order(live, "adapters", {"name": "firm", "id": "unfit"}, status=424)
    assert "firm" in refused["error"]["message"] and "target_modules" in refused["error"]["message"]
    order(live, "adapters", {"name": "firm", "id": "nowhere"}, status=404)
    heavy = write(live, "too-heavy", seed=15)
    live.control(refuse_adapters="it needs more than there is")
    assert "more than there is" in order(live, "adapters", {"name": "firm", "id": "too-heavy"}, status=424)["error"]["message"]
    live.control()
    wait_for(lambda: forgotten(live, heavy))
    conflict = order(live, "adapters", {"name": "firm", "id": "too-heavy", "replace": False}, status=409)
    assert "`replace`" in conflict["error"]["message"] and conflict["error"]["param"] == "name"
    row = rows(live)["firm"]
    assert (row["hash"], row["version"]) == (one, 1) and answered(live, "firm") == one


def test_publishing_the_same_again_is_no_new_version(fleet) -> None:
    live, _ = fleet
    write(live, "same", seed=16)
    first = publish(live, "same")
    assert publish(live, "same") | {"load_s": 0} == first | {"load_s": 0}

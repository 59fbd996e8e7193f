"""/v1/adapters over HTTP: which orders there are, who may give them, what is refused, and names that outlive a server."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from server.sources.content import hash_adapter
from tests.server.api.fleet import ADMIN, KEY, answered, order, publish, rows, write
from tests.server.api.live import live_server, wait_for
from tests.server.api.test_adapters import PROMPT, write_adapter


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "missing field `name`"),
        ({"name": "base"}, "`name` must not be the base model's"),
        ({"name": "../etc"}, "`..` and names that begin with a dot"),
        ({"name": "/abs"}, "must be a relative path"),
        ({"name": "a", "id": "/etc"}, "must be a relative path"),
        ({"name": "a\nb"}, "U+000A"),
        ({"name": ""}, "`name`"),
        ({"name": 5}, "`name`"),
        ({"name": "a", "source": "ftp"}, "`source`: Invalid source 'ftp'"),
        ({"name": "a", "source": "hub"}, "hub"),
        ({"name": "a", "replace": "yes"}, "`replace`"),
        ({"name": "a", "pined": True}, "did you mean `pin`?"),
        ([], "must be a JSON object"),
    ],
)
def test_bad_orders_are_named(fleet, body: Any, words: str) -> None:
    error = order(fleet[0], "adapters", body, status=400)["error"]
    assert words in error["message"] and error["type"] == "invalid_request_error"


def test_names_in_paths(fleet) -> None:
    live, _ = fleet
    one = write(live, "team one/ädapter+50%", seed=17)
    path = "adapters/team%20one/%C3%A4dapter+50%25"
    assert order(live, f"{path}/load")["hash"] == one
    assert order(live, path, method="GET")["tier"] == "host"
    assert order(live, path, method="DELETE")["deleted"] is True
    order(live, "adapters/never-was/unload", status=404)
    order(live, "adapters/..%2Fup/unload", status=404)
    assert "limit" in order(live, "adapters?limit=0", method="GET", status=400)["error"]["message"]


def test_pages(fleet) -> None:
    live, _ = fleet
    for name in ("page/1", "page/2", "page/3"):
        write(live, name, seed=18)
    live.api.adapters._lists._kept.clear()
    first = order(live, "adapters?after=page/&limit=2", method="GET")
    assert [row["id"] for row in first["data"]] == ["page/1", "page/2"] and first["has_more"]
    rest = order(live, "adapters?after=page/2", method="GET")
    assert rest["data"][0]["id"] == "page/3" and rest["has_more"] is False
    assert rest["data"][0] | {"tier": "absent", "state": "idle", "hash": None, "rank": None} == rest["data"][0]


def test_vllms_names(fleet) -> None:
    live, _ = fleet
    one = write(live, "lora/v1", seed=19)
    absolute = str(live.folder.parent / "adapters/lora/v1")
    assert "added successfully" in order(live, "load_lora_adapter", {"lora_name": "vlora", "lora_path": absolute})
    assert answered(live, "vlora") == one
    two = write(live, "lora/v2", seed=20)
    order(live, "load_lora_adapter", {"lora_name": "vlora", "lora_path": "lora/v2"}, status=409)
    order(live, "load_lora_adapter", {"lora_name": "vlora", "lora_path": "lora/v2", "load_inplace": True})
    assert answered(live, "vlora") == two
    assert "removed successfully" in order(live, "unload_lora_adapter", {"lora_name": "vlora"})
    assert answered(live, "vlora") is None
    order(live, "unload_lora_adapter", {"lora_name": "vlora"}, status=404)
    assert "`lora_path`" in order(live, "load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, status=400)["error"]["message"]


def test_only_the_admin_key_opens(fleet) -> None:
    live, _ = fleet
    calls = [("GET", "adapters"), ("POST", "adapters"), ("GET", "adapters/x"), ("DELETE", "adapters/x"), ("POST", "load_lora_adapter"),
             ("POST", "unload_lora_adapter"), *(("POST", f"adapters/x/{verb}") for verb in ("load", "pin", "unpin", "unload"))]  # fmt: skip
    for method, path in calls:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}, {"authorization": f"Bearer {KEY} "[:-2]}):
            answer = live.client.request(method, f"/v1/{path}", headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", (method, path, headers)
            assert "admin key" in answer.json()["error"]["message"] and KEY not in answer.text


def test_without_an_admin_key_nobody_may(tmp_path: Path, model_dir: Path) -> None:
    write_adapter(tmp_path / "adapters/one")
    with live_server(tmp_path, model_dir) as live:
        for headers in ({}, ADMIN, {"authorization": "Bearer"}):
            answer = live.client.get("/v1/adapters", headers=headers)
            assert answer.status_code == 403 and "MANYLORA_ADMIN_KEY" in answer.json()["error"]["message"]
        assert answered(live, "one") is not None  # requests are as they were


def test_names_survive_a_restart_and_a_damaged_registry_is_refused_at_start(tmp_path: Path, model_dir: Path) -> None:
    one = hash_adapter(write_adapter(tmp_path / "adapters/one"))
    with live_server(tmp_path, model_dir, admin_key=KEY) as live:
        publish(live, "kept", id="one", pin=True)
    shutil.rmtree(tmp_path / "adapters/one")
    with live_server(tmp_path, model_dir, admin_key=KEY) as live:
        assert answered(live, "kept") == one
        wait_for(lambda: len(live.seen("Pin")) == 2)
        live.api.admission.draining = True
        assert order(live, "adapters", {"name": "late"}, status=503)["error"]["message"] == "the server is shutting down"
        assert rows(live)["kept"]["pinned"] is True
    file = tmp_path / "store/registry/model-base/names.json"
    weights = next((tmp_path / "store/registry/model-base/objects").glob("*/adapter_model.safetensors"))
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    shutil.rmtree(tmp_path / "store/packs")
    with live_server(tmp_path, model_dir, admin_key=KEY) as live:
        answer = live.post("/generate", {"inputs": PROMPT, "parameters": {"adapter_id": "kept"}})
        assert answer.status_code == 424 and "not what was published" in answer.json()["error"]
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match="names.json is not a registry"), live_server(tmp_path, model_dir):
        pass

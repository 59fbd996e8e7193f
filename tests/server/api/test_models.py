"""GET /v1/models/NAME: one adapter is looked up by itself, however its id is written."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.api.tenants.access import Access
from tests.server.api.live import LiveServer, live_server


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[LiveServer]:
    bucket = {"model_bucket": "models", "model_folder": "/team/", "s3_endpoint_url": "http://127.0.0.1:1", "adapter_source": "s3"}
    with live_server(tmp_path_factory.mktemp("models"), model_dir, **bucket) as live:
        yield live


@pytest.fixture(autouse=True)
def ids(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def list_ids(source: str) -> list[str]:
        assert source == "s3"
        return ["other", "sql"]

    monkeypatch.setattr(live.api.adapters, "list_ids", list_ids)


@pytest.mark.parametrize("written", ["sql", "sql/", "s3://models/team/sql", "s3://models/team/sql/"])
def test_every_spelling_is_one_model(live: LiveServer, monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    (listed,) = (one for one in live.client.get("/v1/models").json()["data"] if one["id"] == "sql")
    monkeypatch.setattr(Access, "seen", lambda *asked: pytest.fail("all ids were looked at"))
    answer = live.client.get(f"/v1/models/{written}")
    assert answer.status_code == 200 and answer.json() == listed


@pytest.mark.parametrize("written", ["sq", "s3://models/sql", "sql%5C", "s3://", "S3://models/team/sql"])
def test_what_there_is_not(live: LiveServer, written: str) -> None:
    assert live.client.get(f"/v1/models/{written}").status_code == 404

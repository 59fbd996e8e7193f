"""The admin key as a gateway shows it: in a header of its own, since Authorization is its callers'."""

from pathlib import Path

import pytest

from infra.endpoint import ADMIN_HEADER
from server.api.admin import GATEWAY_HEADER
from tests.server.api.live import live_server

KEY = "an-admin-key-of-a-test"


def test_the_gateway_and_the_servers_mean_the_same_header():
    assert GATEWAY_HEADER == ADMIN_HEADER


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, model_dir: Path):
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "adapters").mkdir()
    with live_server(folder, model_dir, adapters_dir=folder / "adapters", admin_key=KEY, root_path="/prod") as one:
        yield one


def test_an_order_through_the_gateway(live) -> None:
    """A signature or a foreign token in Authorization does not stand in the way."""
    for authorization in ({}, {"authorization": "AWS4-HMAC-SHA256 Credential=..."}, {"authorization": "Bearer a.b.c"}):
        answer = live.client.get("/prod/v1/adapters", headers={GATEWAY_HEADER: KEY, **authorization})
        assert answer.status_code == 200 and answer.json()["object"] == "list"


def test_a_wrong_key_in_it_opens_nothing(live) -> None:
    for headers in (
        {GATEWAY_HEADER: "wrong"},
        {GATEWAY_HEADER: "wrong", "authorization": f"Bearer {KEY}"},
        {GATEWAY_HEADER: f"Bearer {KEY}"},
    ):
        assert live.client.get("/prod/v1/adapters", headers=headers).status_code == 401

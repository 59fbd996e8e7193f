"""A real server with a real engine on a tiny model, and adapters that betray themselves (benchmarks.soak.marks)."""

import pytest

from tests.faults.marked import MarkedServer


@pytest.fixture(scope="session")
def marked(tmp_path_factory):
    """One server for all that it must survive: short bounds, six adapters."""
    with MarkedServer(
        tmp_path_factory.mktemp("marked"), heartbeat_timeout_s=1.5, hang_timeout_s=2.0, adapter_timeout_s=3.0, write_timeout_s=5.0
    ) as server:
        yield server


@pytest.fixture
def server(marked):
    """It, well again after whatever the last test did to it."""
    marked.wait_well()
    return marked

"""A source in memory for the store's tests, and what they share."""

import threading
from collections.abc import Callable
from pathlib import Path

from server.sources import Progress, Snapshot, SourceFile
from tests.server.sources.worlds import adapter_files


class ToySource:
    """Adapters in a dict, with a hook in the middle of each fetch."""

    name = "toy"

    def __init__(self) -> None:
        self.num_fetches = 0
        self.midway: Callable[[Path], object] = lambda into: None

    def snapshot(self, adapter_id: str, *, revision: str | None = None, api_token: str | None = None) -> Snapshot:
        files = tuple(SourceFile(name, len(data)) for name, data in self.content(adapter_id).items())
        return Snapshot(self.name, adapter_id, f"v-{adapter_id}", files)

    def content(self, adapter_id: str) -> dict[str, bytes]:
        return adapter_files(seed=sum(adapter_id.encode()))

    def fetch(self, snapshot: Snapshot, into: Path, api_token: str | None = None, progress: Progress | None = None) -> None:
        self.num_fetches += 1
        for i, (name, data) in enumerate(self.content(snapshot.adapter_id).items()):
            if i == 1:
                self.midway(into)
            (into / name).write_bytes(data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_clean(root: Path) -> None:
    """Nothing is left of work that failed or ended."""
    assert names(root / "staging") == []
    assert names(root / "locks") == []


def run_threads(num: int, work: Callable[[], object]) -> list[object]:
    """Results or errors of `work`, run in many threads at once."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def write(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)

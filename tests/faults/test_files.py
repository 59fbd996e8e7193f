"""Files of a real server that are damaged, hang or are gone, while it serves."""

import os
import shutil
import time

import pytest

from tests.faults.marked import MarkedServer, wait_for

pytestmark = pytest.mark.slow


@pytest.mark.fault(
    "Files and disks", "an adapter's packed file overwritten, cut off or removed while it is used",
    "nothing: the file is made anew under the request",
    "running requests go on with what is in memory; others do not notice",
)  # fmt: skip
@pytest.mark.parametrize("damage", ["overwritten", "cut off", "removed"])
def test_a_pack_is_damaged_while_it_is_used(server: MarkedServer, damage: str) -> None:
    expected = server.ask(0, 20)
    running = [server.stream(0, 400), server.stream(None, 400)]
    wait_for(lambda: all(len(stream.tokens) > 5 for stream in running))
    pack = server.pack_of(0)
    whole = pack.read_bytes()
    if damage == "removed":
        pack.unlink()
    else:
        with pack.open("r+b") as file:  # in place, as a disk does it: what reads it now sees it too
            file.truncate(len(whole) - 1000) if damage == "cut off" else (file.seek(-5000, os.SEEK_END), file.write(b"\xa5" * 4000))
    for stream in running:
        assert stream.done.wait(60) and stream.is_right and len(stream.tokens) == 400
    server.order("/a-0/unload")
    asked = [server.stream(0, 20) for _ in range(6)]
    for stream in asked:
        assert stream.done.wait(60) and stream.is_right and stream.tokens == expected, stream
    assert server.pack_of(0).read_bytes() == whole


@pytest.mark.fault(
    "Files and disks", "the adapter's own files damaged in the source while it is used",
    "424 that names the adapter, until they are whole again",
    "running requests end with what they began with; other adapters and the base do not notice",
)  # fmt: skip
def test_the_source_is_damaged_while_it_is_used(server: MarkedServer) -> None:
    expected = server.ask(1, 8)
    running = server.stream(1, 300)
    wait_for(lambda: len(running.tokens) > 5)
    weights = server.adapters_dir / "a-1" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    try:
        answer = server.client.post("/generate", json=server.body(1, 8))
        assert answer.status_code == 424 and "'a-1'" in answer.text and str(server.adapters_dir) not in answer.text
        assert server.ask(2) and server.ask(None)
        assert running.done.wait(60) and running.is_right and len(running.tokens) == 300, running
    finally:
        weights.write_bytes(whole)
    wait_for(lambda: server.client.post("/generate", json=server.body(1, 8)).status_code == 200, 10)
    assert server.ask(1, 8) == expected


@pytest.mark.fault(
    "Files and disks", "a read of an adapter that never returns", "424 after `--adapter-timeout-s`",
    "the heartbeat and all other requests go on, those that need another adapter read included; works as soon as the file does",
)  # fmt: skip
def test_a_read_that_hangs(server: MarkedServer) -> None:
    expected = server.ask(3, 8)
    pack = server.pack_of(3)
    server.order("/a-3/unload")
    for other in (4, 5):
        server.ask(other)
        server.order(f"/a-{other}/unload")
    aside = pack.with_suffix(".aside")
    pack.rename(aside)
    os.mkfifo(pack)  # who opens it to read waits in the kernel for a writer
    try:
        hung = [server.stream(3, 8) for _ in range(3)]
        running = server.stream(None, 300)
        begun_at = time.monotonic()
        assert server.ask(4) and server.ask(5) and server.ask(None)  # two readers are two: one hangs, the other reads
        for stream in hung:
            assert stream.done.wait(30) and stream.is_right and stream.error_type == "generation" and stream.status == 424
        assert "could not be read within 3 s" in hung[0].terminal[0]["error"] and time.monotonic() - begun_at < 30
        assert running.done.wait(60) and running.is_right and len(running.tokens) == 300
        assert server.is_well()
    finally:
        aside.rename(pack)
    assert server.ask(3, 8) == expected


@pytest.mark.fault(
    "Files and disks", "the shared file system gone (unmounted) for a while",
    "424, “the adapters' folder is missing”, for adapters that are not here",
    "adapters that are here go on as they were; all is as before once it is back",
)  # fmt: skip
def test_the_adapters_folder_is_gone_for_a_while(server: MarkedServer) -> None:
    time.sleep(2.6)  # nothing in it is so fresh that it could change unnoticed: see server.sources.content.is_settled
    here = {adapter: server.ask(adapter, 8) for adapter in (0, 1, 2)}
    away = server.adapters_dir.with_suffix(".away")
    shutil.copytree(server.adapters_dir / "a-5", server.adapters_dir / "never-used", dirs_exist_ok=True)
    server.adapters_dir.rename(away)
    try:
        assert {adapter: server.ask(adapter, 8) for adapter in here} == here
        body = server.body(None, 4)
        body["parameters"]["adapter_id"] = "never-used"
        answer = server.client.post("/generate", json=body)
        assert answer.status_code == 424 and "the adapters' folder is missing" in answer.text
        assert server.ask(None) and server.is_well()
    finally:
        away.rename(server.adapters_dir)
    wait_for(lambda: server.client.post("/generate", json=body).status_code == 200, 10)
    assert {adapter: server.ask(adapter, 8) for adapter in here} == here

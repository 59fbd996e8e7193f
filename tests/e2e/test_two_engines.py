"""One API, two real engines, as on an instance with several GPUs: who answers, and what one engine's death costs."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.e2e.test_serve import EXAMPLES, Server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(model_dir, tmp_path_factory):
    flags = ["--num-engines", "2", "--device", "cpu", "--num-threads", "1", "--max-total-tokens", "256"]
    running = Server(model_dir, EXAMPLES, tmp_path_factory.mktemp("two"), *flags)
    yield running.wait_healthy()
    running.stop()


def engines(server):
    children = psutil.Process(server.process.pid).children()
    return sorted((child for child in children if "server.engine" in child.cmdline()), key=lambda child: child.pid)


def wait_up(server, count):
    deadline = time.monotonic() + 120
    while server.metric("manylora_engine_up") != count:
        assert time.monotonic() < deadline, server.log_path.read_text()[-2000:]
        time.sleep(0.1)


def test_both_answer_the_same_and_one_outlives_the_other(server):
    wait_up(server, 2)
    assert len(engines(server)) == 2
    alone = {name: server.generate(name).json()["generated_text"] for name in (None, "pirate", "sql")}
    busy_before = [process.cpu_times().user for process in engines(server)]
    with ThreadPoolExecutor(24) as pool:
        names = [None, "pirate", "sql"] * 8
        answers = list(pool.map(server.generate, names))
    assert [answer.json()["generated_text"] for answer in answers] == [alone[name] for name in names]
    worked = [process.cpu_times().user - before for process, before in zip(engines(server), busy_before, strict=True)]
    assert min(worked) > 0.2, worked  # both had a share
    assert server.metric("lorax_request_success") >= 27

    victim = engines(server)[0].pid
    with ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(server.generate, None, 60) for _ in range(16)]
        time.sleep(0.5)
        os.kill(victim, signal.SIGKILL)
        codes = [future.result().status_code for future in waiting]
        assert set(codes) <= {200, 503} and codes.count(200) >= 4  # the other engine's share
    assert server.client.get("/health").status_code == 200
    answer = server.generate("pirate")  # whatever is sent to the dead one is taken over by the other
    assert answer.status_code == 200, answer.text
    assert answer.json()["generated_text"] == alone["pirate"]
    wait_up(server, 2)
    assert victim not in [process.pid for process in engines(server)]
    assert server.generate().json()["generated_text"] == alone[None]

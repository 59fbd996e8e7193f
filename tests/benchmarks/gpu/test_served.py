"""The parts over HTTP on the tiny model, as they are called: real servers, real client processes."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.arrivals import latencies, percentile
from benchmarks.gpu.clients import Answer, Ask, Load, LoadFailed, run_load
from benchmarks.gpu.rows import read_rows
from benchmarks.gpu.serve import RandomServer, flags_for
from benchmarks.gpu.start import cache_environment


def run(folder, *parts):
    arguments = ["--model", "tiny", "--device", "cpu", "--work", str(folder), "--out", str(folder / "rows.jsonl"), "--clients", "2"]
    assert main([*arguments, "--repeats", "1", "--part", *parts]) == 0
    return read_rows([folder / "rows.jsonl"])


@pytest.mark.slow
def test_http_and_arrivals(tmp_path, capsys):
    rows = run(tmp_path, "http", "arrivals")
    http_rows = {row["case"]: row for row in rows if row["part"] == "http"}
    assert http_rows.keys() == {"direct", "not streamed", "streamed"}
    assert all(row["num_adapters"] == 3 and row["rate"] > 0 for row in http_rows.values())
    base, adapters = (row for row in rows if row["part"] == "arrivals")
    assert (base["case"], adapters["case"]) == ("base", "zipf") and base["num_requests"] == adapters["num_requests"] > 0
    assert (base["num_cold"], base["num_warm"]) == (0, 0) and base["num_adapters"] == 0
    assert adapters["num_cold"] == adapters["num_adapters"] > 0 and adapters["num_cold"] + adapters["num_warm"] == adapters["num_requests"]
    assert adapters["num_packs_made"] == 0  # what was registered before is what the server used
    assert 0 <= adapters["itl_p50_ms"] <= adapters["itl_p99_ms"] and 0 < adapters["ttft_p50_ms"] <= adapters["ttft_p99_ms"]
    assert all(0 < row["api_cpu_s"] < 60 and 0 < row["engine_cpu_s"] < 60 for row in (base, adapters))
    assert adapters["requests_s"] == pytest.approx(0.6 * adapters["peak"] / adapters["num_new"], rel=0.01)
    assert main(["--table", str(tmp_path / "rows.jsonl")]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    # Whether an adapter comes twice in so short a load depends on the machine.
    expected = {"ratio_http_to_direct", "ratio_http_streamed_to_direct", "ratio_itl_p99_to_base"}
    assert figures.keys() - {"ratio_ttft_p99_cold_to_warm"} == expected


@pytest.mark.slow
def test_start(tmp_path):
    cold, warm = run(tmp_path, "start")
    for row, case in ((cold, "cold"), (warm, "warm")):
        assert row["case"] == case and 0 < row["seconds_without_weights"] <= row["seconds"] - row["phases"]["load"] + 0.002
        assert row["healthy_s"] < row["seconds"] and row["progress_lines"] >= 3 and row["adapter_first_token_s"] > 0
    assert not list(tmp_path.glob("caches-*"))
    caches = tmp_path / "caches"
    subprocess.run([sys.executable, "-c", "import json"], env=os.environ | cache_environment(caches), check=True)
    assert list((caches / "bytecode").rglob("*.pyc"))
    environment = cache_environment(tmp_path.__class__("/c"))
    assert environment.pop("PYTHONDONTWRITEBYTECODE") == ""  # Python's word for "not set"
    assert all(path.startswith("/c/") or path == "/c" for path in environment.values())


def test_engine_options_become_the_servers_flags():
    assert flags_for({"max_batch_tokens": 64, "prefix_caching": False, "model_dir": "/m", "num_blocks": None}) == [
        "--max-batch-prefill-tokens=64", "--prefix-caching=false",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="--option nothing_like_it"):
        flags_for({"nothing_like_it": 1})


def test_latencies():
    answers = [
        Answer(i, sent, event_times=times) for i, (sent, times) in enumerate([(0.0, [0.5, 0.6]), (1.0, [1.1, 1.2]), (2.2, [2.3, 2.6])])
    ]
    row = latencies(answers, [0.0, 1.0, 2.0], [4, 4, 5])
    assert (row["num_cold"], row["num_warm"]) == (2, 1)
    assert row["ttft_cold_p50_ms"] == 400 and row["ttft_warm_p99_ms"] == 100  # 500 and 300 (from when it was due); 100
    assert row["itl_p50_ms"] == 100 and row["itl_p99_ms"] == pytest.approx(296) and row["late_p99_ms"] == pytest.approx(196)
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self._answer(200, b"")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body["model"] == "broken":
            return self._answer(500, b'{"error": "on fire"}')
        self._answer(200, json.dumps({"usage": {"completion_tokens": body["max_tokens"] - (body["model"] == "short")}}).encode())

    def _answer(self, status, body):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_request_that_fails_or_falls_short_fails_the_load():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:

        def load(*models):
            asks = [Ask(0.05 * i, "w1", 3, model) for i, model in enumerate(models)]
            return run_load(Load(f"http://127.0.0.1:{server.server_port}", "base", asks, False, 2, 10.0))

        answers = load(None, "a", "b")
        assert [answer.index for answer in answers] == [0, 1, 2]
        assert all(answer.sent_at >= 0.05 * answer.index and answer.done_at > answer.sent_at for answer in answers)
        with pytest.raises(LoadFailed, match="1 of 2 .* 500 .*on fire"):
            load("a", "broken")
        with pytest.raises(LoadFailed, match="2 tokens"):
            load("short")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("log", "waits"),
    [
        ("ready\n", False),  # a CPU's engine captures nothing
        ("56 graphs take 0.51 GB; 80 more are captured later\nready\n", True),
        ("56 graphs take 0.51 GB; 80 more are captured later\nall 136 graphs are captured; they take 1.12 GB\n", False),
        ("2 graphs take 0.01 GB; 0 more are captured later\n", False),
        ("56 graphs take 0.51 GB; 80 more are captured later\nno more steps are captured\n", False),
    ],
)
def test_a_load_waits_until_every_step_is_captured(tmp_path, log, waits):
    server = RandomServer.__new__(RandomServer)
    server._log = tmp_path / "server.log"
    server._log.write_text(log)
    until = time.monotonic() + (0.3 if waits else 60)
    server.wait_captured(until)
    assert (time.monotonic() >= until) == waits

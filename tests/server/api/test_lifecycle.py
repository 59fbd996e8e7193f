"""The server's life: starting, healthy, full, an engine that dies or hangs, draining, the command line."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from server.api import serving
from tests.server.api.live import LiveServer, live_server, wait_for

BODY = {"inputs": "one two three four", "parameters": {"max_new_tokens": 100}}


def post_in_thread(live: LiveServer, path: str = "/generate", body: dict | None = None) -> tuple[threading.Thread, list]:
    answers: list = []
    thread = threading.Thread(target=lambda: answers.append(live.post(path, body or BODY)))
    num_submitted = len(live.seen("Submit"))
    thread.start()
    wait_for(lambda: len(live.seen("Submit")) > num_submitted)
    return thread, answers


@pytest.mark.parity("1.1", "`GET /info`, `/metrics`", "same")
def test_health_info_and_metrics(live: LiveServer) -> None:
    for path in ("/health", "/ping", "/"):
        answer = live.client.get(path)
        assert answer.status_code == 200 and answer.content == b""
    info = live.client.get("/info").json()
    assert (
        info["model_id"] == "base"
        and info["max_total_tokens"] == 128
        and info["max_input_length"] == 127
        and info["engine"]["num_blocks"] == 100
    )
    live.post("/generate", BODY)
    live.post("/generate", {"inputs": "x", "parameters": {"temperature": -1}})
    metrics = live.client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if not line.startswith("#"))
    assert float(lines["lorax_request_count"]) >= 2 and float(lines["lorax_request_success"]) >= 1
    assert float(lines['lorax_request_failure{err="validation"}']) >= 1
    assert lines["manylora_engine_up"] == "1.0" and float(lines["lorax_request_generated_tokens_sum"]) >= 100
    wait_for(
        lambda: float(dict(x.rsplit(" ", 1) for x in live.client.get("/metrics").text.splitlines())["manylora_engine_steps_total"]) > 50
    )


def test_a_silent_engine_is_unhealthy_and_a_stuck_one_too(tmp_path: Path, model_dir: Path) -> None:
    with live_server(tmp_path, model_dir, heartbeat_timeout_s=0.5) as live:
        wait_for(lambda: live.api.engine.stats is not None)
        live.control(silent=True)
        wait_for(lambda: live.client.get("/health").status_code == 503)
        assert live.client.get("/health").json()["error_type"] == "healthcheck"
        assert "silent" in live.client.get("/health").json()["error"]
        live.control(hang=True)
        wait_for(lambda: "stuck in phase 'step'" in live.client.get("/health").text)
        live.control()
        wait_for(lambda: live.client.get("/health").status_code == 200)


@pytest.mark.fault(
    "Engine", "a step that never ends while the heartbeat goes on", "503 once the step is over its time for the hang's timeout",
    "killed and restarted",
)  # fmt: skip
def test_a_hung_engine_is_replaced(tmp_path: Path, model_dir: Path) -> None:
    with live_server(tmp_path, model_dir, heartbeat_timeout_s=0.5, hang_timeout_s=0.5) as live:
        live.control(hang=True)
        thread, answers = post_in_thread(live)
        thread.join(10)
        assert answers[0].status_code == 503 and "stuck in phase" in answers[0].json()["error"]
        live.control()
        wait_for(lambda: live.client.get("/health").status_code == 200)
        assert len({entry["pid"] for entry in live.seen("Start")}) >= 2


def test_an_engine_that_dies_ends_its_requests_and_comes_back(tmp_path: Path, model_dir: Path) -> None:
    with live_server(tmp_path, model_dir) as live:
        live.control(step_s=0.05)
        plain, answers = post_in_thread(live)
        stream, streamed = post_in_thread(live, "/generate_stream")
        os.kill(live.seen("Start")[-1]["pid"], signal.SIGKILL)
        plain.join(10)
        stream.join(10)
        assert answers[0].status_code == 503 and answers[0].json()["error_type"] == "unavailable"
        assert "killed by signal 9" in answers[0].json()["error"] and answers[0].headers["retry-after"] == "1"
        assert '"error_type":"unavailable"' in streamed[0].text.strip().splitlines()[-1]
        live.control()
        wait_for(lambda: live.client.get("/health").status_code == 200)
        assert live.post("/generate", BODY).status_code == 200
        assert "manylora_engine_starts_total 2.0" in live.client.get("/metrics").text


def test_an_engine_that_cannot_start_stops_the_server(tmp_path: Path, model_dir: Path) -> None:
    with live_server(tmp_path, model_dir, wait=False, control={"refuse": "architecture X is not verified"}) as live:
        wait_for(lambda: live.server.exit_code == 1)
        assert "architecture X is not verified" in (live.api.engine.unhealthy_reason() or "")


def test_the_engine_dies_with_the_server(tmp_path: Path, model_dir: Path) -> None:
    with live_server(tmp_path, model_dir) as live:
        pid = live.seen("Start")[0]["pid"]
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_full_queue_answers_429(tmp_path: Path, model_dir: Path) -> None:
    with live_server(tmp_path, model_dir, max_concurrent_requests=2, max_best_of=4) as live:
        live.control(step_s=0.03)
        first, answers = post_in_thread(live)
        two = {"inputs": "x", "parameters": {"best_of": 2, "do_sample": True}}
        assert live.post("/generate", two).status_code == 429
        second, _ = post_in_thread(live)
        for path in ("/generate", "/generate_stream", "/"):
            answer = live.post(path, {"inputs": ""})  # before anything is checked
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
            assert answer.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
        answer = live.post("/v1/completions", {"model": "", "prompt": "x"})
        assert answer.status_code == 429 and answer.json()["error"]["type"] == "rate_limit_error"
        assert live.api.metrics.request_failure.labels("overloaded")._value.get() == 5  # those refused at the door are counted too
        live.control()
        first.join(10)
        second.join(10)
        assert answers[0].status_code == 200 and live.post("/generate", BODY).status_code == 200
        refused = live.post("/generate", {"inputs": "x", "parameters": {"best_of": 3, "do_sample": True}})
        assert refused.status_code == 422 and "at most 2 sequences" in refused.json()["error"]


def test_draining_finishes_what_runs_and_refuses_what_comes(tmp_path: Path, model_dir: Path) -> None:
    with live_server(tmp_path, model_dir) as live:
        live.control(step_s=0.01)
        thread, answers = post_in_thread(live)
        live.server.handle_exit(signal.SIGTERM, None)
        wait_for(lambda: live.client.get("/health").status_code == 503)
        refused = live.post("/generate", BODY)
        assert refused.status_code == 503 and refused.json() == {"error": "the server is shutting down", "error_type": "unavailable"}
        assert "retry-after" in refused.headers
        thread.join(10)
        assert answers[0].status_code == 200 and answers[0].json()["generated_text"]
        wait_for(lambda: live.server.should_exit)
        assert live.server.exit_code == 0


def test_a_server_that_is_to_go_says_so_and_goes_on_serving(tmp_path: Path, model_dir: Path) -> None:
    with live_server(tmp_path, model_dir) as live:
        live.server.leave()
        for path in ("/health", "/ping", "/"):
            answer = live.client.get(path)
            assert answer.status_code == 503 and answer.json()["error"] == "unhealthy: the server is shutting down"
        assert live.post("/generate", BODY).status_code == 200
        live.server.handle_exit(signal.SIGTERM, None)
        wait_for(lambda: live.server.should_exit)
        assert live.server.exit_code == 0


def test_an_end_that_was_announced_and_does_not_come_is_forgotten(tmp_path: Path, model_dir: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(serving, "_LEAVE_S", 3.0)
    with live_server(tmp_path, model_dir) as live:
        live.server.leave()
        assert live.api.admission.leaving
        wait_for(lambda: live.client.get("/health").status_code == 200)
        assert "nothing came of it in 3 s" in caplog.text


def test_draining_is_bounded(tmp_path: Path, model_dir: Path) -> None:
    with live_server(tmp_path, model_dir, drain_timeout_s=0.2) as live:
        live.control(step_s=0.2)
        thread, answers = post_in_thread(live)
        live.server.handle_exit(signal.SIGTERM, None)
        thread.join(5)
        assert answers[0].status_code == 503 and answers[0].json()["error"] == "the server is shutting down"


def run_main(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MANYLORA_")} | environment
    return subprocess.run([sys.executable, "-m", "server", *arguments], capture_output=True, text=True, env=env, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--modle-id", "x"], {}, "unknown flag --modle-id; did you mean --model-id?"),
        (["--model-id", "/nowhere"], {}, "--model-id /nowhere: there is no such folder"),
        ([], {"MANYLORA_PORTT": "1"}, "unknown environment variable MANYLORA_PORTT; did you mean MANYLORA_PORT?"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments: list, environment: dict, words: str) -> None:
    result = run_main(*arguments, **environment)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--adapters-dir", "/nowhere"], "--adapters-dir /nowhere: there is no such folder"),
        (["--adapter-source", "ftp"], "--adapter-source: Invalid source 'ftp'"),
        (["--max-total-tokens", "9000"], "max_total_tokens must be <= 8192"),
    ],
)
def test_settings_that_no_request_could_use(model_dir: Path, tmp_path: Path, flags: list, words: str) -> None:
    result = run_main("--model-id", str(model_dir), "--store-dir", str(tmp_path), *flags)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr


def test_the_whole_process_ends_when_its_engine_cannot_start(tmp_path: Path, model_dir: Path) -> None:
    """`python -m server` itself, with an engine that cannot be (no weights): says so, exits with 1 and leaves nothing behind."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_dir / name).read_bytes())
    started_at = time.monotonic()
    result = run_main("--model-id", str(folder), "--port", "0", "--store-dir", str(tmp_path / "store"), "--json-output")
    assert result.returncode == 1 and "cannot serve" in result.stderr
    assert time.monotonic() - started_at < 60

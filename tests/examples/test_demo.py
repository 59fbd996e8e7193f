"""The demo's client side against a stand-in transport: what it shows, and what it calls a failure."""

import json
import subprocess
import sys
from collections.abc import Callable

import httpx
import pytest
from rich.console import Console

from examples import server_process
from examples.demo import Answer, draw_answers, find_failures, stream_answer
from examples.server_process import ServerFailed, ServerProcess, adapter_ids


def events(*pieces: str, num_tokens: int | None = None, done: bool = True) -> str:
    """A chat completion as server-sent events."""
    data = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    data += [] if num_tokens is None else [{"choices": [], "usage": {"completion_tokens": num_tokens}}]
    return "".join(f"data: {json.dumps(event)}\n\n" for event in data) + ("data: [DONE]\n\n" if done else "")


async def answer_from(respond: Callable[[httpx.Request], httpx.Response]) -> Answer:
    answer = Answer("sql", "How many?")
    async with httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(respond)) as client:
        await stream_answer(client, answer)
    return answer


async def test_stream_is_put_together() -> None:
    seen: list[dict] = []

    def respond(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return httpx.Response(200, text=": keep-alive\n\n" + events("SELECT", " 1;", num_tokens=3))

    answer = await answer_from(respond)
    assert (answer.text, answer.num_tokens, answer.error, answer.done) == ("SELECT 1;", 3, "", True)
    assert answer.first_token_s > 0 and answer.tokens_per_s > 0
    assert (seen[0]["model"], seen[0]["messages"], seen[0]["stream"]) == ("sql", [{"role": "user", "content": "How many?"}], True)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (424, '{"error": "no such adapter"}', "HTTP 424.*no such adapter"),
        (200, 'data: {"error": {"message": "engine died"}}\n\n', "engine died"),
        (200, events("SELECT", done=False), r"without \[DONE\]"),
        (200, events(), "empty"),
        (200, "data: not json\n\n", "Expecting value"),
    ],
)
async def test_a_failed_stream_says_why(status: int, body: str, error: str) -> None:
    answer = await answer_from(lambda request: httpx.Response(status, text=body))
    with pytest.raises(AssertionError, match=error):
        assert not find_failures([answer], ["sql"]), answer.error


def test_an_adapter_that_answers_as_the_base_is_a_failure() -> None:
    answers = [Answer(model, "q", text=text) for model, text in (("base", "Paris"), ("sql", "SELECT"), ("json", "Paris"))]
    assert find_failures(answers, ["base", "sql", "json"]) == ["json answered just as the base did"]


def test_the_table_shows_every_answer() -> None:
    answers = [Answer("base", "q", text="Paris"), Answer("sql", "q", error="HTTP 424")]
    console = Console(width=120, record=True, quiet=True)
    console.quiet = False
    with console.capture() as captured:
        console.print(draw_answers(answers, ["base", "sql"]))
    assert all(word in captured.get() for word in ("base (base)", "sql", "Paris", "HTTP 424"))


def test_example_adapters_are_listed() -> None:
    assert adapter_ids() == ["json", "pirate", "sql", "triage"]


def fake_server(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the next ServerProcess run `code` in place of the server."""
    start = subprocess.Popen
    monkeypatch.setattr(server_process.subprocess, "Popen", lambda command, **options: start([sys.executable, "-c", code], **options))


def test_a_server_that_dies_is_reported_with_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    fake_server(monkeypatch, "raise SystemExit('no such model')")
    with (
        pytest.raises(ServerFailed, match=r"status 1 while starting(.|\n)*no such model"),
        ServerProcess(log_path=tmp_path / "log") as server,
    ):
        server.wait_healthy(lambda _: None, timeout_s=30)


def test_a_server_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    fake_server(monkeypatch, code)
    server = ServerProcess(log_path=tmp_path / "log")
    while "up" not in (tmp_path / "log").read_text():
        assert server._process.poll() is None
    with pytest.raises(ServerFailed, match="was killed"):
        server.stop(timeout_s=0.3)
    assert server._process.poll() is not None

"""`python -m server chat`: one question, or a conversation at a terminal."""

import io
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest

from server.commands.chat import Conversation
from tests.server.api.live import LiveServer, wait_for
from tests.server.api.test_adapters import write_adapter
from tests.server.commands.conftest import KEY, Run

ROOT = Path(__file__).parents[3]


def test_one_question_is_answered_as_it_comes(live: LiveServer, run: Run) -> None:
    live.answer("Hello there, how are you?")
    asked = run("chat", "hi")
    assert (asked.status, asked.out, asked.err) == (0, "Hello there, how are you?\n", "")


def test_json_has_text_times_and_tier(live: LiveServer, run: Run) -> None:
    write_adapter(live.folder / "adapters" / "talker")
    live.answer("yes")
    asked = run("chat", "--adapter", "talker", "--json", "--system", "be brief", "hi")
    answer = asked.json
    assert answer["text"] == "yes" and answer["adapter"] == "talker" and answer["finish_reason"] == "stop"
    assert answer["adapter_tier"] == "source" and answer["usage"]["completion_tokens"] >= 1
    assert 0 < answer["first_token_s"] <= answer["total_s"]
    assert "be brief" in live.api.model.tokenizer.decode(live.seen("Submit")[-1]["token_ids"])


def test_the_question_may_come_from_a_pipe(live: LiveServer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    live.answer("read")
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert run("chat").out == "read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("  \n"))
    empty = run("chat", "-")
    assert empty.status == 2 and "PROMPT must not be empty" in empty.err


def test_what_fails_ends_with_its_reason(live: LiveServer, run: Run) -> None:
    assert "'nobody' was not found" in run("chat", "--adapter", "nobody", "hi").err
    live.control(fail="the engine could not", kind="GenerationFailed")
    failed = run("chat", "hi")
    assert failed.status == 1 and "the engine could not" in failed.err
    live.control()
    bad = run("chat", "--temperature", "9", "hi")
    assert bad.status == 1 and "temperature" in bad.err


class FakeServer:
    """Answers each chat with the number of turns that it was told."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []

    def stream(self, path: str, body: dict):
        self.bodies.append(body)
        if body["messages"][-1]["content"] == "fail":
            raise KeyboardInterrupt
        yield {"choices": [{"delta": {"content": str(len(body["messages"]))}, "finish_reason": "stop"}]}


def test_a_conversation_remembers_turns_but_not_those_that_were_stopped() -> None:
    server = FakeServer()
    conversation = Conversation(server, system="s")  # type: ignore[arg-type]
    said: list[str] = []
    for text in ("one", "fail", "two"):
        try:
            conversation.ask(text, said.append)
        except KeyboardInterrupt:
            said.append("stopped")
    assert said == ["2", "stopped", "4"]  # system and one; system, one, its answer and two
    assert [turn["content"] for turn in conversation.turns] == ["one", "2", "two", "4"]


def test_at_a_terminal(live: LiveServer) -> None:
    """A person's session, on a terminal of its own: another adapter, an unknown one, the end."""
    write_adapter(live.folder / "adapters" / "other")
    wait_for(lambda: "other" in live.client.get("/v1/models").text)  # a listing is remembered for some seconds
    live.answer("Good day.")
    ours, theirs = pty.openpty()
    environment = os.environ | {"MANYLORA_SERVER": live.base_url, "MANYLORA_KEY": KEY, "TERM": "dumb", "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "chat"], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = ""

    def until(words: str) -> None:
        nonlocal shown
        while words not in shown:
            ready, _, _ = select.select([ours], [], [], 60)
            assert ready, f"waited for {words!r} in vain, after {shown!r}"
            shown += os.read(ours, 4096).decode(errors="replace")
        shown = shown.split(words, 1)[1]

    def type_line(text: str) -> None:
        os.write(ours, text.encode() + b"\n")

    try:
        type_line("hello")
        until("Good day.")
        type_line("/adapter oth")
        until("there is no adapter 'oth'; there are other")
        type_line("/adapter other")
        type_line("hello")
        until("Good day.")
        assert live.seen("Submit")[-1]["adapter"]["name"] == "other"
        type_line("/nonsense")
        until("there is no /nonsense")
        type_line("/quit")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)

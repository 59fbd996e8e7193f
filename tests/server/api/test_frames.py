"""Events whose bytes are put together by hand: the same as json writes of the whole event."""

import json
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.api.render_native import running_event, stream_event
from server.api.schemas_native import GenerateParameters
from server.api.sequence import TextSequence, Token
from server.api.stream import event
from server.types import Logprob
from tests.server.api.live import LiveServer

ODD = 'a "b" \\ 日本語 🏴‍☠️ \t\n/ %d %b {} é'


@given(
    id=st.integers(0, 1 << 31), text=st.text(), special=st.booleans(),
    logprob=st.none() | st.floats(max_value=0, allow_nan=False, width=32),
)  # fmt: skip
@example(id=1, text=ODD + "\u2028\x00\ud800", special=False, logprob=-1e-7)
def test_a_running_token_of_lorax(id: int, text: str, special: bool, logprob: float | None) -> None:
    token = Token(id, "" if special else text, special, text, None if logprob is None else Logprob(id, logprob))
    parameters, unused = GenerateParameters.model_validate({}), None
    whole = stream_event(
        unused, TextSequence(0, []), token, unused, parameters=parameters, samples=False, prompt="", length_first=False,  # type: ignore[arg-type]
    )  # fmt: skip
    assert running_event(token) == event(whole)


def test_a_log_probability_that_is_no_number_is_a_fault() -> None:
    with pytest.raises(ValueError, match="no number"):
        running_event(Token(1, "x", False, "x", Logprob(1, math.nan)))


@pytest.mark.parametrize("usage", [{}, {"stream_options": {"include_usage": True}}], ids=["", "usage"])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": ODD, "n": 2, "max_tokens": 50}),
        ("/v1/completions", {"prompt": ODD, "echo": True, "max_tokens": 50}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ODD}], "n": 2, "max_tokens": 60}),
    ],
)
def test_events_of_openai(live: LiveServer, path: str, asked: dict[str, Any], usage: dict[str, Any]) -> None:
    frames = live.post(path, {"model": "base", "stream": True} | asked | usage).content.split(b"\n\n")
    assert frames.pop() == b"" and frames.pop() == b"data: [DONE]"
    events = [json.loads(frame.removeprefix(b"data: ")) for frame in frames]
    assert [event(each) for each in events] == [frame + b"\n\n" for frame in frames]
    choices = [choice for each in events for choice in each["choices"]]
    running = [choice for choice in choices if choice["finish_reason"] is None]
    assert len(running) > 8 and len({tuple(choice) for choice in choices}) == 1  # the same keys in the same order as what ends it
    assert len({tuple(each) for each in events if each["choices"]}) == 1
    if "prompt" in asked:
        text = "".join(choice["text"] for choice in choices if choice["index"] == 0)
        assert ODD in text

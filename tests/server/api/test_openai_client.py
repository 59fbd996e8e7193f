"""The official `openai` client against our routes: sync and async, whole answers and streams."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.server.api.live import LiveServer, live_server

PROMPT = "one two three four"
MESSAGES: Any = [{"role": "user", "content": "hi"}]
ADD: Any = {"type": "function", "function": {"name": "add", "strict": True, "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False,
}}}  # fmt: skip
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 41}}\n</tool_call>'


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("live"), model_dir, max_total_tokens=1024) as server:
        yield server


@pytest.fixture
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.base_url + "/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()][0] == "base"
    assert client.models.retrieve("base").id == "base"


def test_equal_prompts_are_drawn_apart_unless_a_seed_is_given(client: openai.OpenAI, live: LiveServer) -> None:
    def seeds(**options: Any) -> list[int]:
        before = len(live.seen("Submit"))
        client.completions.create(model="base", prompt=[PROMPT] * 3, n=2, max_tokens=1, **options)
        return [one["params"].get("seed", 0) for one in live.seen("Submit")[before:]]

    assert len(set(seeds())) == 6
    assert sorted(seeds(seed=7)) == [7, 7, 7, 8, 8, 8]


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="base", prompt=PROMPT, max_tokens=4, n=2, logprobs=2, seed=0, echo=True, stop=None)
    assert [choice.text for choice in answer.choices] == [PROMPT * 2] * 2
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and len(logprobs.tokens) == 8
    assert logprobs.top_logprobs is not None and len(logprobs.top_logprobs[-1]) == 2
    assert answer.usage is not None and answer.usage.total_tokens == 12


def test_completions_in_a_stream(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    with client.completions.create(model="base", prompt=PROMPT, max_tokens=4, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == PROMPT
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4


@pytest.mark.parity(
    "1.8", "the official client: every sampling parameter, `logit_bias` included", "better", "applied; LoRAX ignores logit_bias"
)
def test_chat(client: openai.OpenAI, live: LiveServer) -> None:
    live.answer("Hello!")
    answer = client.chat.completions.create(
        model="base", messages=MESSAGES, max_completion_tokens=50, logprobs=True, top_logprobs=1, logit_bias={"5": -100}, seed=7,
        stop="zzz", presence_penalty=0.5, frequency_penalty=0.5, top_p=0.9, user="me",
    )  # fmt: skip
    choice = answer.choices[0]
    assert choice.message.content == "Hello!" and choice.finish_reason == "stop" and answer.created > 1_700_000_000
    assert choice.logprobs is not None and choice.logprobs.content is not None and choice.logprobs.content[0].token == "Hello"
    params = live.seen("Submit")[-1]["params"]
    assert params["logit_bias"] == {"5": -100} and params["seed"] == 7


async def test_chat_in_a_stream(live: LiveServer) -> None:
    live.answer("Hello there, all of you!")
    async with openai.AsyncOpenAI(base_url=live.base_url + "/v1", api_key="unused", max_retries=0) as client:
        answer = await client.chat.completions.create(model="base", messages=MESSAGES)
        assert answer.choices[0].message.content == "Hello there, all of you!"
        stream = await client.chat.completions.create(
            model="base", messages=MESSAGES, n=2, stream=True, stream_options={"include_usage": True}
        )
        texts = ["", ""]
        async with stream:
            async for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
        assert texts == ["Hello there, all of you!"] * 2 and chunk.usage is not None


class Person(BaseModel):
    name: str
    age: int


def test_an_answer_as_a_type(client: openai.OpenAI, live: LiveServer) -> None:
    live.answer('{"name": "Ada", "age": 36}')
    answer = client.chat.completions.parse(model="base", messages=MESSAGES, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Ada", age=36)
    told = json.loads(live.seen("Submit")[-1]["params"]["grammar"]["text"])
    assert told["required"] == ["name", "age"] and told["additionalProperties"] is False


@pytest.mark.parity("1.8", "the official client: tools, typed answers, its own stream reader", "better", "they work")
def test_a_conversation_with_tools(client: openai.OpenAI, live: LiveServer) -> None:
    live.answer(CALL)
    message = client.chat.completions.create(model="base", messages=MESSAGES, tools=[ADD], tool_choice="required").choices[0].message
    assert message.tool_calls is not None and message.tool_calls[0].type == "function"
    assert json.loads(message.tool_calls[0].function.arguments) == {"a": 41}
    live.answer("42")
    turns = [*MESSAGES, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "42"}]
    assert client.chat.completions.create(model="base", messages=turns, tools=[ADD]).choices[0].message.content == "42"


def test_tools_in_the_clients_own_stream(client: openai.OpenAI, live: LiveServer) -> None:
    live.answer("Well. " + CALL)
    with client.chat.completions.stream(model="base", messages=MESSAGES, tools=[ADD]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds and kinds.count("tool_calls.function.arguments.done") == 1
    assert final.finish_reason == "tool_calls" and final.message.content == "Well."
    assert final.message.tool_calls is not None and final.message.tool_calls[0].function.parsed_arguments == {"a": 41}


def test_errors_have_their_classes(client: openai.OpenAI, live: LiveServer) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="base", messages=MESSAGES, top_p=2)
    assert refused.value.param == "top_p" and refused.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    live.control(fail="busy", kind="Overloaded")
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="base", messages=MESSAGES)
    live.control(fail="gone", kind="Unavailable")
    with pytest.raises(openai.InternalServerError) as gone:
        client.chat.completions.create(model="base", messages=MESSAGES)
    assert gone.value.status_code == 503

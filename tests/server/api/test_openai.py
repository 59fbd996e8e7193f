"""OpenAI's routes: shapes, streams, defaults, log probabilities, refusals in OpenAI's words."""

import time

import pytest

from tests.server.api.live import LiveServer

PROMPT = "one two three four"
MESSAGES = [{"role": "user", "content": "hi"}]


def complete(live: LiveServer, **body):
    return live.post("/v1/completions", {"model": "base", "prompt": PROMPT} | body)


def chat(live: LiveServer, **body):
    return live.post("/v1/chat/completions", {"model": "base", "messages": MESSAGES} | body)


def last_params(live: LiveServer) -> dict:
    return live.seen("Submit")[-1]["params"]


@pytest.mark.parity("1.8", "`POST /v1/completions`: shape", "better", 'a real id, time and model; LoRAX says "null" and 0')
def test_completion(live: LiveServer) -> None:
    answer = complete(live, max_tokens=4).json()
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion" and answer["model"] == "base"
    assert answer["choices"] == [{"index": 0, "text": PROMPT, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8, "prompt_tokens_details": {"cached_tokens": 0}}


@pytest.mark.parity(
    "1.8", "defaults: 16 tokens, temperature 1", "better", "OpenAI's on both routes; LoRAX's completions are greedy without `n`"
)
def test_defaults_are_openai_ones(live: LiveServer) -> None:
    assert complete(live).json()["usage"]["completion_tokens"] == 16
    assert last_params(live)["temperature"] == 1.0
    complete(live, temperature=0)
    assert last_params(live).get("temperature", 0.0) == 0.0
    chat(live)
    assert last_params(live)["temperature"] == 1.0 and last_params(live)["max_new_tokens"] > 16


@pytest.mark.parity("1.8", "`model`: empty or the base's name is the base, anything else an adapter", "same")
@pytest.mark.parametrize("model", ["base", "", "smollm2-135m-instruct"])
def test_names_of_the_base(live: LiveServer, model: str) -> None:
    assert complete(live, model=model, max_tokens=1).status_code == 200
    assert live.seen("Submit")[-1].get("adapter") is None


@pytest.mark.parity("1.8", "`prompt`", "better", "also lists of texts and of token ids; LoRAX answers 422")
def test_prompts_of_four_shapes(live: LiveServer) -> None:
    ids = live.api.model.tokenizer.encode(PROMPT)
    for prompt in (PROMPT, ids):
        assert [choice["text"] for choice in complete(live, prompt=prompt, max_tokens=4).json()["choices"]] == [PROMPT]
    for prompts in ([PROMPT, "five"], [ids, live.api.model.tokenizer.encode("five")]):
        answer = complete(live, prompt=prompts, max_tokens=4, n=2).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert [choice["text"] for choice in answer["choices"]] == [PROMPT, PROMPT, "five" * 4, "five" * 4]
        assert answer["usage"]["prompt_tokens"] == 5 and answer["usage"]["completion_tokens"] == 16


@pytest.mark.parity("1.8", "`stop`", "better", "also one string; cut off; finish_reason stop, where LoRAX says content_filter")
def test_stop_is_cut_off(live: LiveServer) -> None:
    for stop in ("o th", ["zzz", "o th"]):
        choice = complete(live, max_tokens=9, stop=stop).json()["choices"][0]
        assert choice["text"] == "one tw" and choice["finish_reason"] == "stop"


@pytest.mark.parity("1.8", "`n` and `best_of`", "better", "n answers, with a seed too; LoRAX ignores n, or takes it for best_of")
def test_best_of_keeps_the_likeliest(live: LiveServer) -> None:
    choices = complete(live, max_tokens=1, n=2, best_of=4, logprobs=0, seed=0).json()["choices"]
    assert [choice["logprobs"]["token_logprobs"] for choice in choices] == [[-0.5], [-1.5]]


@pytest.mark.parity("1.8", "`echo` and `logprobs` of completions", "better", "OpenAI's form; LoRAX answers null")
def test_echo_and_logprobs(live: LiveServer) -> None:
    choice = complete(live, max_tokens=2, echo=True, logprobs=1).json()["choices"][0]
    assert choice["text"] == PROMPT + "one two"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["one", " two", " three", " four", "one", " two"]
    assert logprobs["token_logprobs"][:4] == [None, -2.0, -3.0, -4.0]
    assert logprobs["text_offset"] == [0, 3, 7, 13, 18, 21]
    assert logprobs["top_logprobs"][0] is None and logprobs["top_logprobs"][1] == {" two": -2.0}
    assert last_params(live)["raw_logprobs"] is True


def test_scoring_a_prompt_alone(live: LiveServer) -> None:
    choice = complete(live, max_tokens=0, echo=True, logprobs=0).json()["choices"][0]
    assert choice["text"] == PROMPT and choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == [None, -2.0, -3.0, -4.0]


@pytest.mark.parity(
    "1.8", "chunks and `[DONE]`; `usage`", "better", "with `stream_options`, in a chunk of its own, as OpenAI; LoRAX always sends it"
)
def test_completion_stream(live: LiveServer) -> None:
    events = live.events(
        "/v1/completions", {"model": "", "prompt": PROMPT, "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == [] and events[-2]["usage"]["total_tokens"] == 8
    assert "".join(event["choices"][0]["text"] for event in events[:-2]) == PROMPT
    assert [event["choices"][0]["finish_reason"] for event in events[:-2]] == [None, None, None, "length"]
    assert len({event["id"] for event in events[:-1]}) == 1 and all(event["usage"] is None for event in events[:-2])


def test_completion_stream_with_echo_logprobs_and_n(live: LiveServer) -> None:
    body = {"model": "", "prompt": PROMPT, "max_tokens": 2, "stream": True, "echo": True, "logprobs": 0, "n": 2}
    events = live.events("/v1/completions", body)[:-1]
    for index in (0, 1):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == PROMPT + "one two"
        assert sum((choice["logprobs"]["tokens"] for choice in mine), []) == ["one", " two", " three", " four", "one", " two"]
        assert mine[-1]["finish_reason"] == "length"


def test_a_held_back_stop_is_never_shown(live: LiveServer) -> None:
    live.control(step_s=0.01)
    events = live.events("/v1/completions", {"model": "", "prompt": PROMPT, "max_tokens": 9, "stream": True, "stop": " two three"})
    assert [event["choices"][0]["text"] for event in events[:-1]] == ["one", ""]
    released = live.events("/v1/completions", {"model": "", "prompt": PROMPT, "max_tokens": 4, "stream": True, "stop": " two thirds"})
    assert "".join(event["choices"][0]["text"] for event in released[:-1]) == PROMPT


@pytest.mark.parity("1.8", "`POST /v1/chat/completions`: shape", "better", "object chat.completion; LoRAX says text_completion")
def test_chat(live: LiveServer) -> None:
    answer = chat(live, max_tokens=3, n=2).json()
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert set(answer["choices"][0]["message"]) == {"role", "content"} and answer["choices"][0]["message"]["role"] == "assistant"
    prompt = live.api.model.tokenizer.decode(live.seen("Submit")[-1]["token_ids"], skip_special_tokens=False)
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_chat_content_parts_are_joined(live: LiveServer) -> None:
    chat(live, max_tokens=1, messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}])
    assert "user\nab<|im_end|>" in live.api.model.tokenizer.decode(live.seen("Submit")[-1]["token_ids"], skip_special_tokens=False)


@pytest.mark.parity("1.8", "`logprobs`, `top_logprobs` of chats", "better", "LoRAX has none")
def test_chat_logprobs(live: LiveServer) -> None:
    entries = chat(live, max_tokens=2, logprobs=True, top_logprobs=2, ignore_eos_token=True, seed=0).json()["choices"][0]["logprobs"][
        "content"
    ]
    assert len(entries) == 2 and all(set(entry) == {"token", "logprob", "bytes", "top_logprobs"} for entry in entries)
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] == -0.5 for entry in entries)
    assert bytes(entries[0]["bytes"]).decode() == entries[0]["token"] == "<|im_start|>"


def test_chat_stream(live: LiveServer) -> None:
    body = {"model": "", "messages": MESSAGES, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    events = live.events("/v1/chat/completions", body)
    assert events[-1] == "[DONE]" and events[-2]["usage"]["completion_tokens"] == 2
    deltas = [event["choices"][0] for event in events[:-2]]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert deltas[-1]["delta"] == {} and deltas[-1]["finish_reason"] == "length"
    assert all(choice["finish_reason"] is None for choice in deltas[:-1])


@pytest.mark.parity("1.8", "`suffix`; fields that are unknown, or known and not served", "refused", "by name; LoRAX ignores them")
@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "not supported"),
        ({"n": 9}, "n", "`n` must be > 0 and <= 8. Given: 9"),
        ({"n": 2, "best_of": 1}, "best_of", "`best_of` must be >= `n`"),
        ({"best_of": 2, "stream": True}, "best_of", "not supported when streaming"),
        ({"best_of": 2, "temperature": 0}, "best_of", "you must use sampling"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"max_tokens": 0}, "max_tokens", "strictly positive"),
        ({"max_tokens": 1000}, "prompt", "`prompt` tokens + `max_tokens` must be <= 128"),
        ({"logprobs": 21}, "logprobs", "`logprobs` must be <= 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed with `stream`"),
        ({"prompt": []}, "prompt", "must be a string"),
        ({"prompt": ""}, "prompt", "cannot be empty"),
        ({"prompt": [1.5]}, "prompt", "must be a string"),
        ({"prompt": [10**300]}, "prompt", "token ids must be from 0 to 49151"),
        ({"prompt": [True]}, "prompt", "must be a string"),
        ({"prompt": ["x"] * 300}, "prompt", "up to 256 prompts"),
        ({"stop": 5}, "stop", "valid list"),
        ({"messages": []}, "messages", "unknown field `messages`"),
        ({"model": None}, "model", "valid string"),
        ({"adapter_source": "ftp"}, "adapter_source", "Invalid source 'ftp'"),
        ({"seed": 2**64}, "seed", "less than"),
    ],
)
def test_completion_refusals(live: LiveServer, body: dict, param: str, words: str) -> None:
    answer = complete(live, **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == param and words in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"functions": [{"name": "f"}]}, "functions", "`functions` is not supported; use `tools`"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "`reasoning_effort` is not supported"),
        ({"guided_json": {}}, "guided_json", "`guided_json` is not supported; use `structured_outputs`"),
        ({"store": True}, "store", "`store` is not supported"),
        ({"tool_prompt": "x"}, "tool_prompt", "`tool_prompt` is not supported; put it into a message"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "images and audio are not supported"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "must be a string"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing field"),
        ({"messages": ["x"]}, "messages[0]", "must be a JSON object"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages", "`messages` must have less than 127 tokens"),
        ({"top_logprobs": 2}, "top_logprobs", "needs `logprobs`"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "at most one"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "strictly positive"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "may not set"),
        ({"best_of": 2}, "best_of", "unknown field `best_of`"),
        ({"stop": ["a"] * 5}, "stop", "supports up to 4 stop sequences"),
    ],
)
def test_chat_refusals(live: LiveServer, body: dict, param: str, words: str) -> None:
    answer = chat(live, **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and words in error["message"]


def test_values_that_ask_for_nothing_pass(live: LiveServer) -> None:
    body = {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}, "store": False,
            "n": None, "stop": None, "logit_bias": {"5": -1}, "seed": -1}  # fmt: skip
    assert chat(live, max_tokens=1, **body).status_code == 200
    assert last_params(live)["seed"] == 2**64 - 1


@pytest.mark.parity("1.8", "errors", "better", "OpenAI's shape and statuses, which its clients raise as their classes")
def test_a_missing_adapter_is_a_missing_model(live: LiveServer) -> None:
    answer = complete(live, model="nobody")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found" and "'nobody' was not found" in answer.json()["error"]["message"]


def test_errors_in_a_stream(live: LiveServer) -> None:
    live.control(fail="broke", kind="GenerationFailed")
    answer = chat(live, stream=True)
    assert answer.status_code == 424 and answer.json()["error"]["message"] == "broke"


def test_guideline_and_other_variables_reach_the_template(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.api.model.tokenizer, "chat_template", "{{ guideline }} {{ mood }} {{ messages[0].content }}")
    chat(live, max_tokens=1, guideline="one", chat_template_kwargs={"mood": "two"}, messages=[{"role": "user", "content": "three"}])
    assert live.api.model.tokenizer.decode(live.seen("Submit")[-1]["token_ids"]) == "one two three"


def test_one_model(live: LiveServer) -> None:
    assert live.client.get("/v1/models/base").json() == live.client.get("/v1/models").json()["data"][0]
    missing = live.client.get("/v1/models/no/body")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


def test_models(live: LiveServer) -> None:
    models = live.client.get("/v1/models").json()
    assert models["object"] == "list" and models["data"][0]["id"] == "base" and models["data"][0]["max_model_len"] == 128
    assert abs(models["data"][0]["created"] - time.time()) < 600


def test_prompts_and_chats_that_cannot_fit_are_not_tokenized(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = live.api.model.tokenizer
    text = "x" * (127 * tokenizer.max_token_chars + 1)
    monkeypatch.setattr(tokenizer, "_encode", lambda *_: pytest.fail("tokenized"))
    for answer, name in (
        (complete(live, prompt=["a", text]), "prompt"),
        (chat(live, messages=[{"role": "user", "content": text}]), "messages"),
    ):
        assert answer.status_code == 400 and answer.json()["error"]["param"] == name
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert f"`{name}` must have less than 127 tokens" in answer.json()["error"]["message"]


def test_token_ids_are_decoded_for_the_echo_alone(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = live.api.model.tokenizer.encode(PROMPT)
    assert complete(live, prompt=ids, max_tokens=4, echo=True).json()["choices"][0]["text"] == PROMPT * 2
    decoded = []
    decode = live.api.model.tokenizer.decode
    monkeypatch.setattr(live.api.model.tokenizer, "decode", lambda ids, **options: decoded.append(len(ids)) or decode(ids, **options))
    assert complete(live, prompt=ids * 100, echo=True).status_code == 400 and decoded == []


def test_a_scored_prompt_generates_nothing(live: LiveServer) -> None:
    asked = {"max_tokens": 0, "echo": True, "logprobs": 0}
    answer = complete(live, **asked).json()
    assert answer["usage"]["completion_tokens"] == 0 and answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] == 4
    events = live.events(
        "/v1/completions", {"model": "base", "prompt": PROMPT, "stream": True, "stream_options": {"include_usage": True}} | asked
    )
    assert events[-2]["usage"]["completion_tokens"] == 0
    assert [event["choices"][0]["finish_reason"] for event in events[:-2]] == ["length"]

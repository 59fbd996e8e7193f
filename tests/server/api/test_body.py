"""Bodies of every bad kind: an error that names the field, in the route's dialect, never a 500."""

import json

import pytest
from pydantic import ValidationError

from server.api.schemas_native import GenerateParameters, GenerateRequest
from server.api.schemas_openai import ChatRequest, CompletionRequest
from tests.server.api.live import LiveServer

NATIVE = ["/generate", "/generate_stream", "/", "/tokenize"]
OPENAI = ["/v1/completions", "/v1/chat/completions"]
JSON = {"content-type": "application/json"}


def send(live: LiveServer, path: str, content: bytes, headers: dict | None = None):
    return live.client.post(path, content=content, headers=JSON if headers is None else headers)


@pytest.mark.parametrize("path", NATIVE + OPENAI)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b'{"inputs": NaN}', b'{"inputs": -Infinity}', b'{"inputs": "\\ud800"}', b"[" * 100_000,
     b'{"a": ' + b"9" * 5000 + b"}", b'{"inputs": "\x00"}'],
    ids=["empty", "cut off", "not utf-8", "nan", "infinity", "lone surrogate", "deep", "huge integer", "control character"],
)  # fmt: skip
def test_what_is_no_json(live: LiveServer, path: str, content: bytes) -> None:
    answer = send(live, path, content)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"] if path in OPENAI else answer.json()["error"]
    assert "Failed to parse the request body as JSON" in message


@pytest.mark.parametrize("path", NATIVE + OPENAI)
@pytest.mark.parametrize("content", [b"null", b"[]", b"3", b'"x"', b"{}"])
def test_what_is_no_request(live: LiveServer, path: str, content: bytes) -> None:
    answer = send(live, path, content)
    assert answer.status_code == (400 if path in OPENAI else 422)
    message = answer.json()["error"]["message"] if path in OPENAI else answer.json()["error"]
    assert "must be a JSON object" in message or "missing field `" in message


@pytest.mark.parity("1.2", "`application/json` and `application/*+json`", "same")
def test_media_types(live: LiveServer) -> None:
    body = json.dumps({"inputs": "a", "parameters": {"max_new_tokens": 1}}).encode()
    for kind in ("application/json; charset=utf-8", "APPLICATION/JSON", "application/problem+json"):
        assert send(live, "/generate", body, {"content-type": kind}).status_code == 200
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "multipart/form-data"}):
        answer = send(live, "/generate", body, headers)
        assert answer.status_code == 415
        assert answer.json() == {"error": "Expected request with `Content-Type: application/json`", "error_type": "validation"}


@pytest.mark.parity("1.2", "413 beyond 2 MiB", "better", "`--max-body-bytes` can raise it")
def test_too_long_bodies(live: LiveServer) -> None:
    body = json.dumps({"inputs": "x" * (2 << 20)}).encode()
    answer = send(live, "/generate", body)
    assert answer.status_code == 413 and "2097152 bytes" in answer.json()["error"]

    def chunks():
        for start in range(0, len(body), 100_000):
            yield body[start : start + 100_000]

    assert live.client.post("/generate", content=chunks(), headers=JSON).status_code == 413


def test_ten_thousand_stop_strings(live: LiveServer) -> None:
    stops = [f"stop {n}" for n in range(10_000)]
    answer = live.post("/generate", {"inputs": "a", "parameters": {"stop": stops}})
    assert answer.status_code == 422
    assert answer.json()["error"] == "Input validation error: `stop` supports up to 4 stop sequences. Given: 10000"
    assert live.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}}).status_code == 200


HUGE = 10**300
ATTACKS = [
    {"temperature": 1e999}, {"temperature": HUGE}, {"top_k": -HUGE}, {"max_new_tokens": HUGE}, {"truncate": HUGE}, {"seed": HUGE},
    {"best_of": HUGE}, {"stop": ["x" * 1001]}, {"stop": "x"}, {"stop": [None]}, {"stop_token_ids": [HUGE]}, {"stop_token_ids": [-1]},
    {"logit_bias": {"1": 1e999}}, {"logit_bias": {"\u0661": 1}}, {"logit_bias": {"-1": 1}}, {"logit_bias": [1]}, {"adapter_id": 5},
    {"adapter_id": "x" * 2000},
    {"adapter_id": "../../etc/passwd"}, {"adapter_id": "/etc"}, {"adapter_id": "a\x00b"}, {"adapter_id": "a\nb"},
    {"adapter_id": "x", "adapter_source": "ftp"}, {"adapter_source": "\U0001f3f4"}, {"adapter_id": "x", "adapter_source": "pbase"},
    {"merged_adapters": {"ids": ["a"] * 33, "weights": [1.0] * 33}}, {"merged_adapters": {"ids": ["a"], "weights": [1e999]}},
    {"merged_adapters": {}}, {"merged_adapters": []}, {"return_k_alternatives": HUGE}, {"repetition_penalty": 1e-300}, {"details": 1},
    {"\U0001f3f4": 1}, {"": 1}, {"__class__": 1}, {"temperature": True}, {"temperature": "1"}, {"min_p": -1},
]  # fmt: skip


@pytest.mark.parametrize("parameters", ATTACKS, ids=lambda p: ascii(p)[:50])
@pytest.mark.parity(
    "2",
    "ids with `..`, absolute paths, control characters; unknown sources",
    "better",
    "422 before anything is opened; LoRAX reads any folder and any bucket",
)
def test_attacks_on_parameters(live: LiveServer, parameters: dict) -> None:
    content = json.dumps({"inputs": "hello", "parameters": parameters}).encode()
    answer = send(live, "/generate", content.replace(b"Infinity", b"1e999"))
    assert answer.status_code == 422, answer.text
    assert set(answer.json()) == {"error", "error_type"} and answer.json()["error_type"] == "validation"
    name = next(iter(parameters))
    assert name in answer.json()["error"] or "adapter" in answer.json()["error"]
    assert len(answer.content) < 3000


@pytest.mark.parametrize(
    "inputs",
    ["\u0000", "\u202e\u0000\uffff", "e" + "\u0301" * 20, "\U0010ffff", "<|im_start|><|im_end|>", " ", "\r\n", "\u2028{{7*7}}", "%s%n"],
    ids=ascii,
)
def test_strange_texts_are_texts(live: LiveServer, inputs: str) -> None:
    answer = live.post("/generate", {"inputs": inputs, "parameters": {"max_new_tokens": 2, "details": True, "ignore_eos_token": True}})
    assert answer.status_code == 200
    assert answer.json()["details"]["generated_tokens"] == 2
    chat = live.post("/v1/chat/completions", {"model": "", "messages": [{"role": "user", "content": inputs}], "max_tokens": 2})
    assert chat.status_code == 200


@pytest.mark.parity("1.1", "unknown paths and methods: 404, 405", "better", "with a JSON error; LoRAX's body is empty")
def test_unknown_paths_and_methods(live: LiveServer) -> None:
    answer = live.client.get("/nope")
    assert answer.status_code == 404 and answer.json() == {"error": "GET /nope: Not Found", "error_type": "not_found"}
    assert live.client.get("/v1/nope").json()["error"]["message"] == "GET /v1/nope: Not Found"
    assert live.client.get("/generate").status_code == 405


def test_docs_show_the_bodies(live: LiveServer) -> None:
    document = live.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert "temperature" in schemas["GenerateParameters"]["properties"] and "messages" in schemas["ChatRequest"]["properties"]

    def references(value):
        if isinstance(value, dict):
            yield from ([value["$ref"]] if "$ref" in value else [])
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                yield from references(item)

    assert all(reference.removeprefix("#/components/schemas/") in schemas for reference in references(document))
    assert live.client.get("/docs").status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/generate", {"inputs": "a", "parameters": {"stop": [1] * 20_000}}, "parameters.stop"),
        ("/generate", {"inputs": "a", "parameters": {"logit_bias": dict.fromkeys(map(str, range(20_000)), 1)}}, "parameters.logit_bias"),
        ("/v1/completions", {"model": "", "prompt": [[1]] * 20_000}, "prompt"),
        ("/v1/chat/completions", {"model": "", "messages": [dict.fromkeys("abcdefghijklmnop", 1)] * 4_000}, "messages"),
        ("/generate", dict.fromkeys(map(str, range(20_000)), 1), "the body"),
    ],
)  # fmt: skip
def test_too_many_items_are_refused_unseen(live: LiveServer, monkeypatch: pytest.MonkeyPatch, path: str, body: dict, name: str) -> None:
    def validate(*_args, **_options):
        raise AssertionError("items were validated")

    for schema in (GenerateRequest, CompletionRequest, ChatRequest):
        monkeypatch.setattr(schema, "model_validate", validate)
    answer = live.post(path, body)
    assert answer.status_code == (400 if path in OPENAI else 422)
    assert name in answer.text and "0 items" in answer.text


def test_a_list_of_wrong_items_makes_one_error() -> None:
    for schema, body in (
        (GenerateParameters, {"stop": [1] * 5000}),
        (CompletionRequest, {"model": "", "prompt": "a", "stop": [1] * 5000}),
    ):
        with pytest.raises(ValidationError) as caught:
            schema.model_validate(body)
        assert caught.value.error_count() == 1
    assert CompletionRequest.model_validate({"model": "", "prompt": [[5] * 30_000, [6]]}).prompt[1] == [6]


def test_many_token_ids_are_no_attack(live: LiveServer) -> None:
    answer = live.post("/v1/completions", {"model": "", "prompt": [5] * 60_000})
    assert answer.status_code == 400 and "60000 `prompt` tokens" in answer.text


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/", *OPENAI])
def test_bad_bodies_are_counted(live: LiveServer, path: str) -> None:
    metrics = live.api.metrics
    counters = (metrics.request_count, metrics.request_failure.labels("validation"))
    before = [counter._value.get() for counter in counters]
    assert send(live, path, b"{").status_code == 400
    assert [counter._value.get() for counter in counters] == [value + 1 for value in before]

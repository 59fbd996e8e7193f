"""`--lorax-strict`: where the server differs from LoRAX by choice, LoRAX's reading; each beside the default's."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.api.live import LiveServer, live_server

PROMPT = "one two three four"


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("strict"), model_dir, lorax_strict=True) as server:
        yield server


def generate(server: LiveServer, inputs: str = PROMPT, **parameters):
    return server.post("/generate", {"inputs": inputs, "parameters": {"max_new_tokens": 2} | parameters})


@pytest.mark.parity("1.4", "unknown fields", "better", "refused by name, with the nearest one; lorax-strict: ignored, as LoRAX does")
def test_unknown_fields(live: LiveServer, strict: LiveServer) -> None:
    assert generate(live, tempurature=1).status_code == 422
    answer = strict.post("/generate", {"inputs": PROMPT, "x": 1, "parameters": {"max_new_tokens": 2, "tempurature": 1, "adapters": []}})
    assert answer.json() == {"generated_text": "one two"}


@pytest.mark.parity("1.2", "bodies that are no request: 400, 413, 415, 422", "better",
                    "LoRAX's JSON error, naming the field; lorax-strict: text/plain, as LoRAX's framework answers")  # fmt: skip
@pytest.mark.parametrize(
    ("content", "kind", "status", "words"),
    [
        (b"{", "application/json", 400, "Failed to parse the request body as JSON: "),
        (b"{}", "application/json", 422, "Failed to deserialize the JSON body into the target type: missing field `inputs`"),
        (b"{}", "text/plain", 415, "Expected request with `Content-Type: application/json`"),
        (b'{"inputs": "' + b"x" * (2 << 20) + b'"}', "application/json", 413, ""),
    ],
    ids=["malformed", "mismatch", "media type", "too long"],
)
def test_bodies(live: LiveServer, strict: LiveServer, content: bytes, kind: str, status: int, words: str) -> None:
    answer = strict.client.post("/generate", content=content, headers={"content-type": kind})
    assert answer.status_code == status and answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text.startswith(words)
    answer = live.client.post("/generate", content=content, headers={"content-type": kind})
    assert answer.status_code == status and answer.json()["error_type"] == "validation"


@pytest.mark.parity("1.7", "errors of a stream before its first token", "better",
                    "an answer with the error's status; lorax-strict: 200 and an event, as LoRAX, overload included")  # fmt: skip
def test_errors_of_streams(live: LiveServer, strict: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"inputs": "", "stream": True}
    assert live.post("/", body).status_code == 422
    assert strict.post("/", body).status_code == 200
    assert strict.events("/", body) == [{"error": "Input validation error: `inputs` cannot be empty", "error_type": "validation"}]
    for server in (live, strict):
        monkeypatch.setattr(server.api.admission, "_max", 0)
    assert live.post("/", body).status_code == 429
    assert strict.events("/", body) == [{"error": "Model is overloaded", "error_type": "overloaded"}]
    assert strict.post("/generate", {"inputs": "a"}).status_code == 429


@pytest.mark.parity("1.4", "`truncate`", "better", "comes before the check of the length; lorax-strict: after it, as LoRAX")
def test_truncate(live: LiveServer, strict: LiveServer) -> None:
    long = "word " * 150
    assert generate(live, long, truncate=5).status_code == 200
    assert "must have less than 127 tokens" in generate(strict, long, truncate=5, max_new_tokens=None).json()["error"]
    assert generate(strict, truncate=2).json()["generated_text"] == " three four"


@pytest.mark.parity("1.6", "`finish_reason` if the last allowed token is also the end", "better",
                    "`eos_token` or `stop_sequence`: the text is whole; lorax-strict: `length`, as LoRAX")  # fmt: skip
def test_finish_reason(live: LiveServer, strict: LiveServer) -> None:
    inputs = "one<|im_end|> two"
    for server, reason in ((live, "eos_token"), (strict, "length")):
        assert generate(server, inputs, details=True).json()["details"]["finish_reason"] == reason
        events = server.events("/generate_stream", {"inputs": inputs, "parameters": {"max_new_tokens": 2, "details": True}})
        assert events[-1]["details"]["finish_reason"] == reason
        assert generate(server, inputs, details=True, max_new_tokens=3).json()["details"]["finish_reason"] == "eos_token"


@pytest.mark.parity("1.4", "`apply_chat_template`", "better", "applied; lorax-strict: ignored, as LoRAX")
def test_chat_template(live: LiveServer, strict: LiveServer) -> None:
    for server in (live, strict):
        assert generate(server, "hello", apply_chat_template=True).status_code == 200
    assert len(live.seen("Submit")[-1]["token_ids"]) > len(strict.seen("Submit")[-1]["token_ids"]) == 1


@pytest.mark.parity("1.5", "`best_of` 0", "better", "refused, as LoRAX's own words say; lorax-strict: 1, as LoRAX")
def test_best_of_zero(live: LiveServer, strict: LiveServer) -> None:
    assert generate(live, best_of=0).json()["error"] == "Input validation error: `best_of` must be > 0 and <= 8. Given: 0"
    assert generate(strict, best_of=0).status_code == 200


def test_cors_is_as_open_as_loraxs(strict: LiveServer) -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    answer = strict.client.options("/generate", headers=asked)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parity("1.4", "`watermark`", "refused", "its green lists hang on the random numbers of one kind of GPU, so that "
                    "no detector elsewhere would agree; refused under lorax-strict too; `false` passes")  # fmt: skip
def test_watermark(live: LiveServer, strict: LiveServer) -> None:
    for server in (live, strict):
        assert "`watermark` is not supported" in generate(server, watermark=True).json()["error"]
        assert generate(server, watermark=False).status_code == 200

"""LoRAX's routes: answers, details, headers, and what becomes of an engine's error."""

import json

import pytest
from starlette.requests import Request

from server.api.native import lorax_bearer
from server.api.render_native import token_of
from server.api.sequence import Token
from server.settings import Settings
from server.types import Logprob
from tests.server.api.live import LiveServer

PROMPT = "one two three four"


def generate(live: LiveServer, inputs: str = PROMPT, **parameters):
    return live.post("/generate", {"inputs": inputs, "parameters": parameters})


@pytest.mark.parity("1.1", "`POST /generate`: one object", "same")
@pytest.mark.parity("1.6", "`details` absent unless asked for", "same")
def test_answer_without_details_is_text_alone(live: LiveServer) -> None:
    answer = generate(live, max_new_tokens=4)
    assert answer.status_code == 200
    assert answer.json() == {"generated_text": PROMPT}


@pytest.mark.parity("1.1", "`POST /`: a list of one", "same")
def test_compat_route_answers_a_list_of_one(live: LiveServer) -> None:
    answer = live.post("/", {"inputs": PROMPT, "parameters": {"max_new_tokens": 4}, "stream": False})
    assert answer.json() == [{"generated_text": PROMPT}]


@pytest.mark.parity("1.2", "optional fields may be null; `parameters` too", "same")
def test_null_parameters_and_null_options_are_defaults(live: LiveServer) -> None:
    answer = live.post(
        "/generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 4, "temperature": None, "adapter_id": None, "seed": None}}
    )
    assert answer.status_code == 200
    assert live.post("/generate", {"inputs": PROMPT, "parameters": None}).status_code == 200


@pytest.mark.parity("1.4", "`details`", "same")
@pytest.mark.parity("1.6", "`details`: `finish_reason`, counts, `seed`, `prefill`, `tokens`; `skipped` always there", "same")
def test_details(live: LiveServer) -> None:
    details = generate(live, max_new_tokens=3, details=True).json()["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == 3 and details["prompt_tokens"] == 4 and details["skipped_tokens"] == 0
    assert details["seed"] is None and details["prefill"] == []
    assert [token["text"] for token in details["tokens"]] == ["one", " two", " three"]
    assert all(token["logprob"] == -0.5 and token["special"] is False and token["skipped"] is False for token in details["tokens"])
    assert "best_of_sequences" not in details and "alternative_tokens" not in details["tokens"][0]


@pytest.mark.parity("1.4", "`decoder_input_details`, `return_k_alternatives`", "same")
@pytest.mark.parity("1.6", "`prefill`: first logprob null; `alternative_tokens` with the chosen one, likeliest first", "same")
def test_prompt_details_and_alternatives(live: LiveServer) -> None:
    details = generate(live, max_new_tokens=1, decoder_input_details=True, return_k_alternatives=2).json()["details"]
    assert [token["text"] for token in details["prefill"]] == ["one", " two", " three", " four"]
    assert [token["logprob"] for token in details["prefill"]] == [None, -2.0, -3.0, -4.0]
    alternatives = details["tokens"][0]["alternative_tokens"]
    assert [entry["logprob"] for entry in alternatives] == sorted((entry["logprob"] for entry in alternatives), reverse=True)
    assert details["tokens"][0]["id"] in [entry["id"] for entry in alternatives]


@pytest.mark.parity("1.4", "`seed`: 64 bits, random if not given; in `details` only when sampling", "same")
@pytest.mark.parity("1.4", "`do_sample` with `temperature` 0", "better", "greedy; LoRAX samples at temperature 1")
def test_sampling_draws_a_seed_and_tells_it(live: LiveServer) -> None:
    drawn = [generate(live, max_new_tokens=1, details=True, temperature=0.7).json()["details"]["seed"] for _ in range(2)]
    assert drawn[0] != drawn[1] and all(0 <= seed < 2**64 for seed in drawn)
    assert generate(live, max_new_tokens=1, details=True, do_sample=True, seed=2**64 - 1).json()["details"]["seed"] == 2**64 - 1
    assert generate(live, max_new_tokens=1, details=True, temperature=0, do_sample=True).json()["details"]["seed"] is None


@pytest.mark.parity("1.4", "`best_of`", "better", "up to 8 (LoRAX: 2; `--max-best-of`)")
@pytest.mark.parity("1.6", "`best_of_sequences`", "same")
def test_best_of_answers_with_the_likeliest(live: LiveServer) -> None:
    details = generate(live, max_new_tokens=2, details=True, best_of=3, do_sample=True).json()["details"]
    others = details["best_of_sequences"]
    assert len(others) == 2 and set(others[0]) == {"generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"}
    assert all(details["tokens"][0]["logprob"] >= other["tokens"][0]["logprob"] for other in others)
    assert len({details["seed"], *(other["seed"] for other in others)}) == 3


@pytest.mark.parity("1.4", "`stop`", "same")
@pytest.mark.parity(
    "1.6", "stop strings", "better", "the text ends with the stop string, also where it ends within a token, where LoRAX goes on"
)
def test_stop_string_across_tokens_stays_in_the_text(live: LiveServer) -> None:
    answer = generate(live, max_new_tokens=20, stop=["o th"], details=True).json()
    assert answer["generated_text"] == "one two th"
    assert answer["details"]["finish_reason"] == "stop_sequence" and answer["details"]["generated_tokens"] == 3


@pytest.mark.parity("1.4", "`ignore_eos_token`", "same")
@pytest.mark.parity("1.6", "the end token is in `tokens`, special and counted", "same")
def test_end_token_ends_unless_ignored(live: LiveServer) -> None:
    inputs = "one two<|im_end|> three"
    ended = generate(live, inputs, max_new_tokens=9, details=True).json()
    assert ended["generated_text"] == "one two" and ended["details"]["finish_reason"] == "eos_token"
    assert ended["details"]["tokens"][-1]["text"] == "<|im_end|>" and ended["details"]["tokens"][-1]["special"] is True
    went_on = generate(live, inputs, max_new_tokens=4, ignore_eos_token=True).json()
    assert went_on["generated_text"] == "one two three"
    named = generate(live, inputs, max_new_tokens=9, ignore_eos_token=True, stop=["<|im_end|>"], details=True).json()
    assert named["details"]["finish_reason"] == "stop_sequence"


def test_truncate_keeps_the_last_tokens_and_comes_before_the_length_check(live: LiveServer) -> None:
    assert generate(live, max_new_tokens=2, truncate=2).json()["generated_text"] == " three four"
    assert generate(live, "word " * 500, max_new_tokens=2, truncate=5).status_code == 200


@pytest.mark.parity("1.4", "`return_full_text`", "same")
def test_full_text_begins_with_the_prompt(live: LiveServer) -> None:
    assert generate(live, max_new_tokens=4, return_full_text=True).json()["generated_text"] == PROMPT * 2


@pytest.mark.parity("1.4", "`max_new_tokens`: by default what the prompt leaves", "same")
def test_without_max_new_tokens_the_rest_of_the_room_is_used(live: LiveServer) -> None:
    assert generate(live, details=True).json()["details"]["generated_tokens"] == 128 - 4


@pytest.mark.parity(
    "1.6",
    "response headers `x-total-time`, `x-prompt-tokens` and the others",
    "better",
    "also `x-request-id`; `x-compute-type` is `cpu` on one",
)
def test_headers(live: LiveServer) -> None:
    headers = generate(live, max_new_tokens=3).headers
    assert headers["x-prompt-tokens"] == "4" and headers["x-generated-tokens"] == "3" and headers["x-total-tokens"] == "7"
    assert headers["x-compute-characters"] == str(len(PROMPT)) and headers["x-model-id"] == "base" and headers["x-compute-type"] == "cpu"
    for name in ("total", "compute", "validation", "queue", "inference"):
        assert int(headers[f"x-{name}-time"]) >= 0
    assert int(headers["x-time-per-token"]) >= 0 and int(headers["x-time-to-first-token"]) >= 0
    assert "x-adapter-id" not in headers


@pytest.mark.parity(
    "1.4",
    "`temperature`, `repetition_penalty`, `top_k`, `top_p`, `typical_p`",
    "better",
    "one request's values never touch another's row, as LoRAX's temperature does",
)
@pytest.mark.parity("1.4", "`frequency_penalty`, `presence_penalty`", "better", "OpenAI's meaning; LoRAX divides the counts by the length")
@pytest.mark.parity("1.4", "`min_p`, `logit_bias`, `stop_token_ids`", "better", "additions")
def test_params_reach_the_engine(live: LiveServer) -> None:
    generate(live, max_new_tokens=1, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, typical_p=0.8, repetition_penalty=1.5, seed=7,
             frequency_penalty=0.5, presence_penalty=-0.5, logit_bias={"5": -100}, stop_token_ids=[9])  # fmt: skip
    params = live.seen("Submit")[-1]["params"]
    assert params == {
        "max_new_tokens": 1, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.5,
        "frequency_penalty": 0.5, "presence_penalty": -0.5, "logit_bias": {"5": -100.0}, "seed": 7, "stop_token_ids": [2, 9],
        "num_logprobs": 0,
    }  # fmt: skip


@pytest.mark.parity("1.4", "when it samples: `do_sample`, or `temperature` other than 0 and 1, `top_k`, `top_p`, `typical_p`", "same")
def test_greedy_is_the_default_and_temperature_one_alone_too(live: LiveServer) -> None:
    for parameters in ({}, {"temperature": 1.0}, {"top_p": 1.0}):
        generate(live, max_new_tokens=1, **parameters)
        assert live.seen("Submit")[-1]["params"].get("temperature", 0.0) == 0.0
    generate(live, max_new_tokens=1, top_k=1)
    assert live.seen("Submit")[-1]["params"]["temperature"] == 1.0


def test_neutral_values_of_what_is_not_served_pass(live: LiveServer) -> None:
    assert generate(live, max_new_tokens=1, watermark=False, response_format=None).status_code == 200


@pytest.mark.parity("1.6", "log probabilities with the shortest digits of their float32", "same")
@pytest.mark.parametrize(("value", "shown"), [(-0.3400000035762787, -0.34), (-0.5, -0.5), (0.0, 0.0), (-1e30, -9999.0), (None, -9999.0)])
def test_log_probabilities_are_short_and_never_null(live: LiveServer, value: float | None, shown: float) -> None:
    token = Token(5, "x", False, "x", Logprob(5, value, [(5, value if value is not None else float("-inf"))]))
    rendered = token_of(token, live.api.model.tokenizer, 1)
    assert rendered["logprob"] == rendered["alternative_tokens"][0]["logprob"] == shown


@pytest.mark.parity("1.4", "`response_format` with a schema", "same")
@pytest.mark.parity(
    "1.4", "`response_format` without a schema, or with null", "better", "any JSON object; LoRAX lets null through unconstrained"
)
def test_response_formats(live: LiveServer) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    for given, text in (
        ({"type": "json_object", "schema": schema}, schema),
        ({"type": "JsonSchema", "schema": schema}, schema),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_object", "schema": None}, {"type": "object"}),
    ):
        assert generate(live, max_new_tokens=1, response_format=given).status_code == 200
        grammar = live.seen("Submit")[-1]["params"]["grammar"]
        assert grammar["kind"] == "json_schema" and json.loads(grammar["text"]) == text
    assert generate(live, max_new_tokens=1, structured_outputs={"regex": "a+"}).status_code == 200
    assert live.seen("Submit")[-1]["params"]["grammar"]["text"] == "a+"
    for neither in (None, {"type": "text"}):
        generate(live, max_new_tokens=1, response_format=neither)
        assert "grammar" not in live.seen("Submit")[-1]["params"]


@pytest.mark.parity("1.3", "424 `generation`: `Request failed during generation: Server error: ...`", "same")
def test_engine_errors_keep_their_kind(live: LiveServer) -> None:
    live.control(fail="no memory for it", kind="GenerationFailed")
    answer = generate(live, max_new_tokens=1)
    assert answer.status_code == 424
    assert answer.json() == {"error": "Request failed during generation: Server error: no memory for it", "error_type": "generation"}
    live.control(fail="secret", kind="NoSuchKind")
    assert generate(live, max_new_tokens=1).status_code == 424


@pytest.mark.parity("1.1", "`POST /tokenize`", "same")
def test_tokenize(live: LiveServer) -> None:
    answer = live.post("/tokenize", {"inputs": "héllo 12"}).json()
    assert [entry["id"] for entry in answer] == live.api.model.tokenizer.encode("héllo 12")
    assert answer[0]["start"] == 0 and answer[-1]["stop"] == len("héllo 12") and set(answer[0]) == {"id", "text", "start", "stop"}


def test_bundled_tokens_change_nothing(live: LiveServer) -> None:
    alone = generate(live, max_new_tokens=20, stop=["e f"], details=True).json()
    live.control(bundle=7)
    assert generate(live, max_new_tokens=20, stop=["e f"], details=True).json() == alone


def test_texts_that_cannot_fit_are_not_tokenized(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = live.api.model.tokenizer
    text = "x" * (127 * tokenizer.max_token_chars + 1)
    assert generate(live, text, truncate=5, max_new_tokens=1).status_code == 200
    monkeypatch.setattr(tokenizer, "_encode", lambda *_: pytest.fail("tokenized"))
    for answer in (generate(live, text), live.post("/tokenize", {"inputs": text})):
        assert answer.status_code == 422
        assert f"`inputs` must have less than 127 tokens. Given: {len(text)} characters" in answer.json()["error"]


def test_tokenize_is_bounded_and_admitted(live: LiveServer) -> None:
    answer = live.post("/tokenize", {"inputs": "a b " * 100})
    assert answer.status_code == 422 and "`inputs` must have less than 127 tokens. Given: 201" in answer.json()["error"]
    live.api.admission.draining = True
    try:
        assert live.post("/tokenize", {"inputs": "a"}).status_code == 503
    finally:
        live.api.admission.draining = False


@pytest.mark.parametrize(("strict", "expected"), [(False, None), (True, "secret")])
@pytest.mark.parity(
    "1.4",
    "`api_token`",
    "better",
    "the only token that reaches a source; `Authorization` is the caller's and never leaves the server (lorax-strict: as LoRAX)",
)
def test_the_bearer_leaves_the_server_only_where_lorax_would_send_it(strict: bool, expected: str | None) -> None:
    settings = Settings(model_id="m", lorax_strict=strict)
    request = Request({"type": "http", "headers": [(b"authorization", b"Bearer secret")]})
    assert lorax_bearer(request, settings) == expected

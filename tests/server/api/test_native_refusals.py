"""LoRAX's routes: every refusal in LoRAX's words and order."""

import json

import pytest

from tests.server.api.live import LiveServer
from tests.server.api.test_native import PROMPT, generate

REFUSALS = [
    ({"best_of": 9}, "`best_of` must be > 0 and <= 8. Given: 9"),
    ({"best_of": 0}, "`best_of` must be > 0 and <= 8. Given: 0"),
    ({"adapter_id": "a", "merged_adapters": {"ids": ["a"], "weights": [1]}}, "at most one of `adapter_id` or `adapters` may be provided"),
    ({"merged_adapters": {"ids": [], "weights": []}}, "at least one adapter ID must be provided when setting `adapters`"),
    ({"merged_adapters": {"ids": ["a", "b"], "weights": [1]}}, "number of adapter IDs must match number of adapter weights"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"temperature": -0.1}, "`temperature` must be non-negative"),
    ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"presence_penalty": -2.1}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 1.1}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"return_k_alternatives": 0}, "`return_k_alternatives` must be strictly positive"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"seed": 1, "best_of": 2, "do_sample": True}, "`seed` must not be set when `best_of` > 1"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 127. Given: 0"),
    ({"truncate": 200}, "`truncate` must be strictly positive and less than 127. Given: 200"),
    ({"max_new_tokens": 125}, "`inputs` tokens + `max_new_tokens` must be <= 128. Given: 4 `inputs` tokens and 125 `max_new_tokens`"),
    # ours
    ({"min_p": 1.5}, "`min_p` must be >= 0.0 and <= 1.0"),
    ({"return_k_alternatives": 21}, "`return_k_alternatives` must be <= 20. Given: 21"),
    ({"stop": [""]}, "`stop` sequences must have 1 to 1000 characters. Given: 0"),
    ({"logit_bias": {"x": 1}}, "`logit_bias` keys must be token ids from 0 to 49151. Given: 'x'"),
    ({"logit_bias": {"1": 101}}, "`logit_bias` values must be from -100 to 100. Given: 101"),
    ({"stop_token_ids": [49152]}, "`stop_token_ids` must be token ids from 0 to 49151. Given: 49152"),
    ({"merged_adapters": {"ids": ["a"], "weights": [1], "merge_strategy": "ties"}},
     "`merged_adapters.density` must be > 0 and <= 1 for ties"),
]  # fmt: skip


@pytest.mark.parametrize(("parameters", "message"), REFUSALS, ids=[json.dumps(row[0])[:60] for row in REFUSALS])
@pytest.mark.parity("1.5", "every check's message, in LoRAX's words", "same")
def test_refusals(live: LiveServer, parameters: dict, message: str) -> None:
    answer = live.post("/generate", {"inputs": PROMPT, "parameters": parameters})
    assert answer.status_code == 422
    assert answer.json() == {"error": f"Input validation error: {message}", "error_type": "validation"}


@pytest.mark.parity("1.5", "the order of the checks", "same")
def test_refusals_come_in_lorax_order(live: LiveServer) -> None:
    everything = {"temperature": -1, "top_p": 5, "top_k": -1, "max_new_tokens": 0, "seed": 1}
    for name, found in [("temperature", "temperature"), ("top_p", "top_p"), ("top_k", "top_k"), ("max_new_tokens", "max_new_tokens")]:
        assert f"`{found}`" in live.post("/generate", {"inputs": "", "parameters": everything}).json()["error"]
        del everything[name]
    assert "`inputs` cannot be empty" in live.post("/generate", {"inputs": "", "parameters": everything}).json()["error"]


@pytest.mark.parity("1.5", "`inputs` must have less than ... tokens", "same")
def test_long_prompts(live: LiveServer) -> None:
    answer = generate(live, "word " * 200)
    assert answer.status_code == 422
    assert answer.json()["error"] == "Input validation error: `inputs` must have less than 127 tokens. Given: 201"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"watermark": True}, "`watermark` is not supported"),
        ({"response_format": {"type": "yaml"}}, "`parameters.response_format.type`: Input should be 'text', 'json_object'"),
        ({"response_format": {"type": "text", "schema": {}}}, "`response_format`: a `schema` needs `type`"),
        ({"tempurature": 1}, "unknown field `parameters.tempurature`, did you mean `temperature`?"),
        ({"top_k": 5.0}, "`parameters.top_k`: Input should be a valid integer"),
        ({"top_k": "5"}, "`parameters.top_k`: Input should be a valid integer"),
        ({"do_sample": None}, "`parameters.do_sample`: Input should be a valid boolean"),
        ({"seed": 2**64}, "`parameters.seed`: Input should be less than"),
        ({"seed": -1}, "`parameters.seed`: Input should be greater than or equal to 0"),
        ({"merged_adapters": {"ids": ["a"], "weights": [1], "merge_strategy": "slerp"}},
         "merge_strategy`: Input should be 'linear', 'ties'"),
        ({"merged_adapters": {"ids": ["a", "b" * 1025], "weights": [1, 1]}},
         "`parameters.merged_adapters.ids[1]`: String should have at most 1024 characters"),
    ],
)  # fmt: skip
@pytest.mark.parity("1.2", "integers take no floats, nothing takes strings, a flag takes no null, 64-bit bounds", "same")
@pytest.mark.parity("1.5", "unknown `merge_strategy`, `majority_sign_method`", "better", "422; LoRAX's whole server ends")
def test_fields_are_named(live: LiveServer, parameters: dict, message: str) -> None:
    answer = live.post("/generate", {"inputs": PROMPT, "parameters": parameters})
    assert answer.status_code == 422 and answer.json()["error_type"] == "validation"
    assert message in answer.json()["error"]


def test_merges_that_are_made_up_leave_nothing_in_memory(live: LiveServer) -> None:
    for number in range(3):
        merged = {"ids": [f"made-up-{number}", "and-another"], "weights": [1, number]}
        assert live.post("/generate", {"inputs": PROMPT, "parameters": {"merged_adapters": merged}}).status_code in (422, 424)
    residency = live.api.adapters.residency
    assert not [key for key in (*residency._hits, *residency._uses) if key[2] is not None]

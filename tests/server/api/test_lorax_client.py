"""LoRAX's own Python client, unchanged: 0.6.3 from PyPI calls the server; what its successor's types (0.7.0) ask for is there as well."""

from collections.abc import Iterator
from typing import Any, Literal

import lorax
import pytest
from lorax import AsyncClient, Client, errors
from lorax.types import MergedAdapters
from pydantic import BaseModel, ConfigDict

from tests.server.api.live import LiveServer
from tests.server.api.test_adapters import write_adapter

PROMPT = "one two three four"
# It calls pydantic's old methods.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")


@pytest.fixture
def client(live: LiveServer) -> Iterator[Client]:
    client = Client(live.base_url, timeout=30)
    yield client
    if client.session is not None:
        client.session.close()


@pytest.mark.parity("1.1", "lorax-client 0.6.3: `generate` with every parameter", "same")
def test_generate(client: Client, live: LiveServer) -> None:
    assert lorax.__file__
    response = client.generate(PROMPT, max_new_tokens=3, return_k_alternatives=2, decoder_input_details=True)
    assert response.generated_text == "one two three"
    assert response.details.finish_reason == "length" and response.details.prompt_tokens == 4
    assert [token.text for token in response.details.tokens] == ["one", " two", " three"]
    assert response.details.prefill[0].logprob is None and len(response.details.tokens[0].alternative_tokens) >= 2
    response = client.generate(
        PROMPT, do_sample=True, max_new_tokens=2, ignore_eos_token=True, best_of=2, repetition_penalty=1.1, return_full_text=True,
        stop_sequences=["zzz"], temperature=0.5, top_k=5, top_p=0.9, truncate=4, typical_p=0.9, details=True,
    )  # fmt: skip
    assert response.generated_text == PROMPT + "one two" and len(response.details.best_of_sequences) == 1
    seeded = client.generate(PROMPT, max_new_tokens=1, do_sample=True, seed=7)
    assert seeded.details.seed == 7 and live.seen("Submit")[-1]["params"]["seed"] == 7


@pytest.mark.parity("1.7", "lorax-client 0.6.3: `generate_stream`", "same")
def test_generate_stream(client: Client) -> None:
    responses = list(client.generate_stream(PROMPT, max_new_tokens=3))
    assert [response.token.text for response in responses] == ["one", " two", " three"]
    assert [response.generated_text for response in responses] == [None, None, "one two three"]
    assert responses[-1].details.finish_reason == "length" and responses[-1].details.generated_tokens == 3


@pytest.mark.parity("1.1", "lorax-client 0.6.3: `AsyncClient`", "same")
async def test_async_client(live: LiveServer) -> None:
    client = AsyncClient(live.base_url, timeout=30)
    assert (await client.generate(PROMPT, max_new_tokens=2)).generated_text == "one two"
    assert [response.token.text async for response in client.generate_stream(PROMPT, max_new_tokens=2)] == ["one", " two"]


def test_adapters(client: Client, live: LiveServer) -> None:
    for name in ("client-a", "client-b"):
        write_adapter(live.folder / "adapters" / name)
    turned_around = " four three"
    assert client.generate(PROMPT, adapter_id="client-a", adapter_source="local", max_new_tokens=2).generated_text == turned_around
    merged = MergedAdapters(ids=["client-a", "client-b"], weights=[0.5, 0.5], merge_strategy="linear", density=0.5)
    assert client.generate(PROMPT, merged_adapters=merged, adapter_source="local", max_new_tokens=2).generated_text == turned_around


@pytest.mark.parity("1.3", "lorax-client 0.6.3 raises the same exceptions", "same")
@pytest.mark.parametrize("stream", [False, True])
def test_errors(client: Client, live: LiveServer, stream: bool) -> None:
    def call(**options: Any) -> None:
        if stream:
            list(client.generate_stream(PROMPT, **options))
        else:
            client.generate(PROMPT, **options)

    with pytest.raises(errors.ValidationError, match="`inputs` tokens \\+ `max_new_tokens` must be <= 128"):
        call(max_new_tokens=1000)
    with pytest.raises(errors.GenerationError, match="nobody"):
        call(adapter_id="nobody", adapter_source="local", max_new_tokens=1)
    live.control(fail="broken", kind="GenerationFailed")
    with pytest.raises(errors.GenerationError, match="Request failed during generation: Server error: broken"):
        call(max_new_tokens=1)


@pytest.mark.parity("1.3", "429 `overloaded`: `Model is overloaded`", "better", "with Retry-After")
def test_overload(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.api.admission, "_max", 0)
    answer = live.post("/", {"inputs": PROMPT})
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert answer.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
    assert isinstance(errors.parse_error(429, answer.json()), errors.OverloadedError)


class Strict(BaseModel):
    """As 0.7.0's types: what it requires is required, and nothing is coerced."""

    model_config = ConfigDict(strict=True)


class Alternative(Strict):
    id: int
    text: str
    logprob: float | None


class Token(Alternative):
    special: bool
    skipped: bool
    alternative_tokens: list[Alternative] | None = None


class Sequence(Strict):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[Alternative]
    tokens: list[Token]


class Other(Sequence):
    generated_text: str


class Details(Sequence):
    prompt_tokens: int
    skipped_tokens: int
    best_of_sequences: list[Other] | None = None


class Answer(Strict):
    generated_text: str
    details: Details | None = None


class StreamDetails(Strict):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    prompt_tokens: int
    generated_tokens: int
    seed: int | None


class Event(Strict):
    token: Token
    generated_text: str | None
    details: StreamDetails | None


@pytest.mark.parity(
    "1.6", "lorax-client 0.7.0's types (`skipped`, `skipped_tokens`) parse every reply; no null logprob in `tokens`", "same"
)
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"details": True},
        {"decoder_input_details": True, "return_k_alternatives": 3},
        {"best_of": 3, "do_sample": True, "details": True},
    ],
    ids=str,
)
def test_the_successors_types(live: LiveServer, parameters: dict) -> None:
    answer = live.post("/", {"inputs": PROMPT, "parameters": parameters | {"max_new_tokens": 3}}).json()
    parsed = Answer.model_validate(answer[0])
    if parsed.details is not None:
        assert all(token.logprob is not None for token in parsed.details.tokens)
    if parameters.get("best_of") is None and not parameters.get("decoder_input_details"):
        for entry in live.events("/", {"inputs": PROMPT, "stream": True, "parameters": parameters | {"max_new_tokens": 3}}):
            assert Event.model_validate(entry).token.logprob is not None

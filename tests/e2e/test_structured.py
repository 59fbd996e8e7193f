"""Structured output and tools through the whole server, on the embedded model, adapters and free requests beside them."""

import asyncio
import json
from pathlib import Path

import httpx
import jsonschema
import pytest

from tests.e2e.test_serve import EXAMPLES, Server

pytestmark = pytest.mark.slow
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ADAPTERS = ["", "pirate", "sql"]
QUERY = {
    "type": "object",
    "properties": {"query": {"type": "string", "maxLength": 20}},
    "required": ["query"],
    "additionalProperties": False,
}
SEARCH = {"type": "function", "function": {"name": "search", "description": "Search the web.", "parameters": QUERY}}


@pytest.fixture(scope="module")
def server(tmp_path_factory, model_dir: Path):
    server = Server(model_dir, EXAMPLES, tmp_path_factory.mktemp("structured"))
    try:
        yield server.wait_healthy()
    finally:
        server.stop()


def chat(text: str, **body):
    return {"model": "", "messages": [{"role": "user", "content": text}], "max_tokens": 80, "seed": 3} | body


def formatted(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


async def post_all(server: Server, bodies: list[dict]) -> list[dict]:
    async with httpx.AsyncClient(base_url=server.client.base_url, timeout=120) as client:
        answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))
    assert [answer.status_code for answer in answers] == [200] * len(answers), [answer.text for answer in answers]
    return [answer.json()["choices"][0] for answer in answers]


def test_grammars_free_requests_and_adapters_in_one_batch(server: Server) -> None:
    free = [chat("Tell me of the sea.", model=model, temperature=0, max_tokens=24) for model in ADAPTERS]
    alone = [choice["message"]["content"] for body in free for choice in asyncio.run(post_all(server, [body]))]
    bound = [
        chat(f"Describe person {n} as JSON.", model=ADAPTERS[n % 3], response_format=formatted(PERSON), temperature=n % 2) for n in range(4)
    ]
    choices = asyncio.run(post_all(server, bound + free))
    num_whole = 0
    for choice in choices[:4]:
        assert choice["finish_reason"] in ("stop", "length")
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)
            num_whole += 1
    assert num_whole >= 2
    assert [choice["message"]["content"] for choice in choices[4:]] == alone


def test_lorax_routes_too_and_an_explicit_length_stop(server: Server) -> None:
    answer = server.generate(
        inputs="A person as JSON:", max_new_tokens=150, details=True, response_format={"type": "json_object", "schema": PERSON}
    )
    body = answer.json()
    assert answer.status_code == 200 and all(token["logprob"] is not None for token in body["details"]["tokens"])
    if body["details"]["finish_reason"] != "length":
        jsonschema.validate(json.loads(body["generated_text"]), PERSON)
    cut = server.generate(inputs="x", max_new_tokens=3, details=True, response_format={"type": "json_object", "schema": PERSON}).json()
    assert cut["details"]["finish_reason"] == "length" and cut["generated_text"].startswith("{")


def test_choice_and_regex(server: Server) -> None:
    bodies = [
        chat("Is water wet?", structured_outputs={"choice": ["yes", "no"]}),
        chat("A date?", structured_outputs={"regex": r"[0-9]{4}-[0-9]{2}"}),
    ]
    one, date = asyncio.run(post_all(server, bodies))
    assert one["message"]["content"] in ("yes", "no") and one["finish_reason"] == "stop"
    assert len(date["message"]["content"]) == 7 and date["message"]["content"][4] == "-"


def test_a_forced_call(server: Server) -> None:
    (choice,) = asyncio.run(post_all(server, [chat("Who won?", tools=[SEARCH], tool_choice="required", parallel_tool_calls=False)]))
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "search"
    jsonschema.validate(json.loads(call["function"]["arguments"]), QUERY)


def test_a_hard_schema_holds_up_nobody(server: Server) -> None:
    """Free requests go on while grammars are refused, one of which would kill a process that compiled it."""
    server.client.post("/v1/chat/completions", json=chat("x", response_format=formatted({"type": "null"}), max_tokens=5))

    def free() -> None:
        assert server.client.post("/v1/chat/completions", json=chat("Hello", max_tokens=6)).status_code == 200

    async def all_at_once() -> tuple[list[httpx.Response], int]:
        links = {f"d{n}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(3000)}
        crash = {"$defs": links | {"d3000": {"type": "string"}}, "$ref": "#/$defs/d0"}
        slow = [{"type": "integer", "multipleOf": 1_000_003 + n} for n in range(2)]
        async with httpx.AsyncClient(base_url=server.client.base_url, timeout=120) as client:
            hard = [
                asyncio.create_task(client.post("/v1/chat/completions", json=chat("x", response_format=formatted(one))))
                for one in [crash, *slow]
            ]
            await asyncio.sleep(0.2)
            num_free = 0
            while not all(one.done() for one in hard) and num_free < 20:
                await asyncio.to_thread(free)
                num_free += not all(one.done() for one in hard)
            return await asyncio.gather(*hard), num_free

    refused, num_free = asyncio.run(all_at_once())
    assert refused[0].status_code == 400 and "too complex" in refused[0].json()["error"]["message"]
    assert refused[0].json()["error"]["param"] == "response_format"
    assert {answer.status_code for answer in refused[1:]} <= {200, 400}
    assert num_free >= 2  # answered while the hard ones were still open
    assert server.client.get("/health").status_code == 200

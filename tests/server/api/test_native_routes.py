"""LoRAX's other routes, and what stands before all of them: probes, /info, /metrics, other kinds of models, CORS, a gateway's prefix."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from server.api.front import put_before
from server.api.stream import native_error
from server.errors import (
    AdapterNotFound,
    GenerationFailed,
    IncompleteGeneration,
    Overloaded,
    ServerError,
    TemplateFailed,
    ValidationFailed,
)
from server.settings import Settings
from tests.server.api.live import LiveServer, live_server, wait_for
from tests.server.api.test_adapters import write_adapter

BODY = {"inputs": "one two", "parameters": {"max_new_tokens": 2}}


@pytest.mark.parity("1.1", "`POST /invocations` (SageMaker)", "same")
def test_invocations_is_the_compat_route(live: LiveServer) -> None:
    assert live.post("/invocations", BODY).json() == live.post("/", BODY).json() == [{"generated_text": "one two"}]
    assert live.events("/invocations", BODY | {"stream": True})[-1]["generated_text"] == "one two"


def test_a_request_waits_for_no_thread_of_the_framework(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """FastAPI has plain functions run in a thread, each of which the event loop would wait for."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a thread")

    monkeypatch.setattr("fastapi.dependencies.utils.run_in_threadpool", refuse)
    monkeypatch.setattr("fastapi.routing.run_in_threadpool", refuse)
    for path, body in (("/generate", BODY), ("/v1/completions", {"model": "base", "prompt": "one two"})):
        assert live.post(path, body).status_code == 200


@pytest.mark.parity("1.1", "`GET /`, `/health`, `/ping`: 200 and an empty body", "same")
@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
def test_health(live: LiveServer, path: str) -> None:
    answer = live.client.get(path)
    assert answer.status_code == 200 and answer.content == b""


@pytest.mark.parity(
    "1.3", "503 `healthcheck`", "better", "the text goes on with the reason: `unhealthy: the engine is stuck in phase 'step'`"
)
def test_ill_health(live: LiveServer) -> None:
    live.api.admission.draining = True
    try:
        answer = live.client.get("/health")
    finally:
        live.api.admission.draining = False
    assert answer.status_code == 503
    assert answer.json()["error_type"] == "healthcheck" and answer.json()["error"].startswith("unhealthy")


@pytest.mark.parity("1.1", "`GET /startup`: a token through the whole queue", "same")
def test_startup_generates_a_token(live: LiveServer) -> None:
    before = len(live.seen("Submit"))
    answer = live.client.get("/startup")
    assert answer.status_code == 200 and answer.content == b""
    assert [entry["params"]["max_new_tokens"] for entry in live.seen("Submit")[before:]] == [1]


def test_startups_that_ask_at_once_share_a_token(live: LiveServer) -> None:
    """Nobody needs a credential for it: however many ask, they take one place."""
    before = len(live.seen("Submit"))
    live.control(hang=True)
    with ThreadPoolExecutor(20) as threads:
        asked = [threads.submit(httpx.get, f"{live.base_url}/startup", timeout=30) for _ in range(20)]
        wait_for(lambda: len(live.seen("Submit")) > before)
        with pytest.raises(httpx.ReadTimeout):  # it leaves; the others wait on
            httpx.get(f"{live.base_url}/startup", timeout=0.5)
        assert live.api.admission._num_sequences == 1
        live.control()
        assert [one.result().status_code for one in asked] == [200] * 20
    assert len(live.seen("Submit")) - before < 5 and live.api.admission._num_sequences == 0  # a late one may have begun anew


@pytest.mark.parity("1.3", "`/startup` fails: 500 with the error's own type", "same")
def test_startup_says_why_not(live: LiveServer) -> None:
    live.control(fail="no memory", kind="GenerationFailed")
    answer = live.client.get("/startup")
    assert answer.status_code == 500
    assert answer.json() == {"error": "Request failed during generation: Server error: no memory", "error_type": "generation"}


@pytest.mark.parity("1.5", "`/embed`, `/classify`, `/classify_batch` on a model that generates: 424, LoRAX's words", "same")
@pytest.mark.parametrize(
    ("path", "body", "what"),
    [
        ("/embed", {"inputs": "a", "parameters": None, "stream": False}, "embeddings"),
        ("/classify", {"inputs": "a", "parameters": None, "stream": False}, "classification"),
        ("/classify_batch", {"inputs": ["a", "b"]}, "classification"),
    ],
)
def test_other_kinds_of_models(live: LiveServer, path: str, body: dict, what: str) -> None:
    answer = live.post(path, body)
    assert answer.status_code == 424
    expected = f"Request failed during generation: Server error: Model does not support {what}"
    assert answer.json() == {"error": expected, "error_type": "generation"}
    wrong = live.post(path, {"inputs": 5})
    assert wrong.status_code == 422 and "`inputs`" in wrong.json()["error"]


@pytest.mark.parity(
    "1.8", "`POST /v1/embeddings` on a model that generates", "better", "424 in OpenAI's error shape, which its clients can read"
)
def test_openai_embeddings(live: LiveServer) -> None:
    answer = live.post("/v1/embeddings", {"input": ["a"], "model": "m", "encoding_format": "float"})
    assert answer.status_code == 424 and "embeddings" in answer.json()["error"]["message"]


LORAX_INFO = (
    "model_id model_sha model_dtype model_device_type model_pipeline_tag max_concurrent_requests max_best_of max_stop_sequences "
    "max_input_length max_total_tokens waiting_served_ratio max_batch_total_tokens max_waiting_tokens validation_workers eager_prefill "
    "version sha docker_label request_logger_url"
)


@pytest.mark.parity("1.9", "`/info`: all of LoRAX's keys", "better", "null where there is no such thing here; `version` is this server's; "
                    "also the engine's own facts")  # fmt: skip
def test_info_has_lorax_keys(live: LiveServer) -> None:
    info = live.client.get("/info").json()
    assert set(LORAX_INFO.split()) <= set(info)
    assert info["model_dtype"] == "torch.float32" and info["max_total_tokens"] == 128 and info["max_batch_total_tokens"] == 1600


@pytest.mark.parity("1.9", "`/metrics` as JSON with `Accept: application/json`", "same")
def test_metrics_as_json(live: LiveServer) -> None:
    live.post("/generate", BODY)
    families = live.client.get("/metrics", headers={"accept": "application/json"}).json()
    count = families["lorax_request_count"]
    assert count["type"] == "counter" and count["data"][0]["key"] == "" and count["data"][0]["value"] >= 1
    assert [entry["key"] for entry in families["lorax_request_duration"]["data"]] == ["count", "sum"]
    assert 'lorax_request_failure{err="overloaded"}' in [entry["key"] for entry in families["lorax_request_failure"]["data"]]
    text = live.client.get("/metrics", headers={"accept": "text/plain"})
    assert text.headers["content-type"].startswith("text/plain") and "\nlorax_request_count " in text.text


@pytest.mark.parity("1.9", "`/metrics?format=json`", "better", "works; LoRAX documents it and answers 422")
def test_metrics_format(live: LiveServer) -> None:
    assert "lorax_request_count" in live.client.get("/metrics?format=json").json()
    assert "# TYPE" in live.client.get("/metrics?format=text", headers={"accept": "application/json"}).text
    wrong = live.client.get("/metrics?format=xml")
    assert wrong.status_code == 422 and "format" in wrong.json()["error"] and wrong.json()["error_type"] == "validation"


@pytest.mark.parity("1.1", "`GET /docs`, `/api-doc/openapi.json`", "same")
def test_the_openapi_document_has_lorax_path_too(live: LiveServer) -> None:
    document = live.client.get("/api-doc/openapi.json").json()
    assert document == live.client.get("/openapi.json").json()
    assert {"/", "/invocations", "/generate", "/generate_stream", "/embed", "/classify", "/classify_batch", "/tokenize", "/startup",
            "/health", "/ping", "/info", "/metrics"} <= set(document["paths"])  # fmt: skip


@pytest.mark.parity("1.9", "`/tokenize`: raw vocabulary entries and offsets; `add_special_tokens` null is true", "better",
                    "a text longer than a prompt may be is refused")  # fmt: skip
def test_tokenize_has_raw_entries(live: LiveServer) -> None:
    tokens = live.post("/tokenize", {"inputs": "a the", "add_special_tokens": None}).json()
    assert [token["text"] for token in tokens] == ["a", "Ġthe"] and (tokens[1]["start"], tokens[1]["stop"]) == (1, 5)


@pytest.mark.parity("1.3", "each error's status, `error_type` and the beginning of its text", "same")
@pytest.mark.parametrize(
    ("error", "status", "body"),
    [
        (GenerationFailed("x"), 424, {"error": "Request failed during generation: Server error: x", "error_type": "generation"}),
        (AdapterNotFound("x"), 424, {"error": "Request failed during generation: Server error: x", "error_type": "generation"}),
        (Overloaded(), 429, {"error": "Model is overloaded", "error_type": "overloaded"}),
        (ValidationFailed("x"), 422, {"error": "Input validation error: x", "error_type": "validation"}),
        (IncompleteGeneration("Incomplete generation"), 500, {"error": "Incomplete generation", "error_type": "incomplete_generation"}),
        (TemplateFailed("x"), 422, {"error": "Failed applying chat template to inputs: x", "error_type": "template_error"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_in_lorax_words(error: ServerError, status: int, body: dict) -> None:
    assert native_error(error) == (status, body)


@pytest.mark.parity("1.3", "an adapter that cannot be had: 424 `generation`", "better",
                    "the text says which and why, without paths or addresses")  # fmt: skip
@pytest.mark.parity("1.4", "`adapter_id`, `adapter_source` (in any case)", "same")
def test_adapters_by_source(live: LiveServer) -> None:
    write_adapter(live.folder / "adapters" / "mine")
    for source in ("local", "LOCAL", None):
        parameters = {"adapter_id": "mine", "adapter_source": source, "max_new_tokens": 2}
        answer = live.post("/generate", {"inputs": "one two", "parameters": parameters})
        assert answer.json() == {"generated_text": " twoone"}
        assert answer.headers["x-adapter-id"] == "mine" and answer.headers["x-adapter-source"] == "local"
    answer = live.post("/generate", {"inputs": "one two", "parameters": {"adapter_id": "nobody", "max_new_tokens": 2}})
    assert answer.status_code == 424 and answer.json()["error_type"] == "generation"
    assert "'nobody'" in answer.json()["error"] and str(live.folder) not in answer.text
    assert live.post("/generate", {"inputs": "one two", "parameters": {"adapter_id": "", "max_new_tokens": 2}}).json() == {
        "generated_text": "one two"
    }


@pytest.mark.parity("1.4", "`adapter_source` that there is not", "better", "422 that names those there are; LoRAX: 424")
@pytest.mark.parity("2", "source `pbase`", "refused", "Predibase's own service; S3, a folder and the hub are served")
@pytest.mark.parametrize("source", ["pbase", "ftp"])
def test_unknown_sources(live: LiveServer, source: str) -> None:
    answer = live.post("/generate", {"inputs": "a", "parameters": {"adapter_id": "org/name", "adapter_source": source}})
    assert answer.status_code == 422 and "`adapter_source`" in answer.json()["error"]
    assert all(name in answer.json()["error"] for name in ("local", "s3", "hub"))


@pytest.mark.parity("1.9", "REQUEST_LOGGER_URL", "refused", "prompts, answers and tokens are sent nowhere and never logged")
def test_no_prompt_is_logged(live: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        live.post("/generate", {"inputs": "a secret thing", "parameters": {"max_new_tokens": 2, "api_token": "hf_token"}})
    assert "secret" not in caplog.text and "hf_token" not in caplog.text
    assert live.client.get("/info").json()["request_logger_url"] is None


@pytest.mark.parity("1.1", "`GET /v1/models`", "better", "there is none in LoRAX: the base and the adapters")
def test_models(live: LiveServer) -> None:
    assert live.client.get("/v1/models").json()["data"][0]["id"] == "base"


# -- before the routes ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fronted(tmp_path_factory: pytest.TempPathFactory, model_dir: Path):
    folder = tmp_path_factory.mktemp("fronted")
    with live_server(
        folder, model_dir, root_path="/prod", cors_allow_origin=["https://a.example"], cors_expose_header=["x-total-time"]
    ) as one:
        yield one


def test_a_gateways_prefix_is_taken_off_where_it_is(fronted: LiveServer) -> None:
    for path in ("/prod/generate", "/generate"):
        assert fronted.post(path, BODY).json() == {"generated_text": "one two"}
    for path in ("/prod", "/prod/", "/"):
        assert fronted.post(path, BODY).json() == [{"generated_text": "one two"}]
    assert fronted.client.get("/prod/health").status_code == 200
    assert fronted.client.get("/production/health").status_code == 404
    assert "/prod/openapi.json" in fronted.client.get("/prod/docs").text and "/prod" not in fronted.client.get("/docs").text
    wrong = fronted.post("/prod/v1/completions", {})
    assert wrong.status_code == 400 and "message" in wrong.json()["error"]


def test_a_prefix_that_is_a_route_is_refused() -> None:
    app = FastAPI()
    app.add_api_route("/v1/models", lambda: None)
    with pytest.raises(ValueError, match="--root-path /v1: the server has routes of that name"):
        put_before(app, Settings(model_id="m", root_path="/v1"))


@pytest.mark.parity("1.9", "CORS", "better", "closed unless origins are named (LoRAX lets every page call it); lorax-strict: as LoRAX")
def test_cors(live: LiveServer, fronted: LiveServer) -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    allowed = fronted.client.options("/prod/generate", headers=asked)
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://a.example"
    answer = fronted.client.post("/generate", json=BODY, headers={"origin": "https://a.example"})
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    assert answer.headers["access-control-expose-headers"] == "x-total-time"
    assert fronted.client.options("/generate", headers=asked | {"origin": "https://b.example"}).status_code == 400
    assert "access-control-allow-origin" not in live.client.post("/generate", json=BODY, headers={"origin": "https://a.example"}).headers


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="cors_allow_credentials needs the origins by name"):
        Settings(model_id="m", cors_allow_origin=["*"], cors_allow_credentials=True)

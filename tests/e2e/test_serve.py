"""The server as its users start it, on the embedded model: whole processes, real HTTP, and what goes wrong around them."""

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server.engine.peft_oracle import save_adapter

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "adapters"
QUESTION = "What is the capital of France?"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:peft")]


class Server:
    """The documented command line, nothing more."""

    def __init__(self, model_dir: Path, adapters_dir: Path, folder: Path, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "server", "--model-id", str(model_dir), "--adapters-dir", str(adapters_dir)]
        command += ["--adapter-source", "local", "--hostname", "127.0.0.1", "--port", str(self.port), "--store-dir", str(folder / "store")]
        self.log_path = folder / "log"
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen([*command, *flags], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)

    def wait_healthy(self) -> "Server":
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log_path.read_text()
            try:
                if self.client.get("/health").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise TimeoutError(self.log_path.read_text())

    def generate(self, adapter: str | None = None, max_new_tokens: int = 20, inputs: str | None = None, **parameters):
        """POST /generate with the chat template's form of the question."""
        text = inputs or f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
        body = {"inputs": text, "parameters": {"max_new_tokens": max_new_tokens, "adapter_id": adapter, **parameters}}
        return self.client.post("/generate", json=body)

    def metric(self, name: str) -> float:
        """The value of an unlabelled series."""
        lines = self.client.get("/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.split(" ")[0] == name))

    def wait_until_free(self, timeout_s: float) -> None:
        """Until the engine says that no sequence holds a block; it says so twice a second."""
        deadline = time.monotonic() + timeout_s
        while self.metric("manylora_kv_blocks_used") > 0:
            assert time.monotonic() < deadline, "blocks are still in use"
            time.sleep(0.1)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()
            self.client.close()


@pytest.fixture(scope="module")
def adapters_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("sql", "json", "pirate"):
        shutil.copytree(EXAMPLES / name, folder / name)
    shutil.copytree(EXAMPLES / "sql", folder / "corrupt")
    weights = folder / "corrupt" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    save_adapter(folder / "other-base", "llama")
    shutil.copytree(EXAMPLES / "sql", folder / "pickled")
    (folder / "pickled" / "adapter_model.safetensors").rename(folder / "pickled" / "adapter_model.bin")
    return folder


@pytest.fixture(scope="module")
def server(model_dir, adapters_dir, tmp_path_factory):
    flags = ("--max-total-tokens", "1024", "--num-threads", "2")  # two: no other test has products on several threads
    running = Server(model_dir, adapters_dir, tmp_path_factory.mktemp("server"), *flags).wait_healthy()
    yield running
    assert running.stop() in (0, -signal.SIGTERM), running.log_path.read_text()


def test_the_base_and_each_adapter_answer_in_their_own_way(server):
    answers = {name: server.generate(name).json()["generated_text"] for name in (None, "sql", "json", "pirate")}
    assert "Paris" in answers[None]
    assert answers["sql"].startswith("SELECT") and answers["json"].startswith("{") and "Arrr" in answers["pirate"]
    models = [model["id"] for model in server.client.get("/v1/models").json()["data"]]
    assert models[0] == "smollm2-135m-instruct" and {"sql", "json", "pirate"} <= set(models)
    for name, text in answers.items():
        body = {"model": name or models[0], "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 20}
        chat = server.client.post("/v1/chat/completions", json=body).json()
        if name:  # the base's template adds a system prompt of its own; what the adapters say does not hang on it
            assert chat["choices"][0]["message"]["content"][:6] == text[:6]


@pytest.mark.parametrize(
    ("adapter", "status", "words"),
    [
        ("nobody", 424, "'nobody' was not found"),
        ("corrupt", 424, "adapter_model.safetensors"),
        ("other-base", 424, "Adapter 'other-base'"),
        ("pickled", 424, "pickle"),
        ("../adapters/sql", 422, "adapter_id"),
        ("/etc", 422, "adapter_id"),
    ],
)
def test_what_cannot_be_applied_is_refused_by_name(server, adapter, status, words):
    answer = server.generate(adapter)
    assert answer.status_code == status and words in answer.json()["error"], answer.text
    assert str(ROOT) not in answer.text and "/tmp" not in answer.text
    assert server.generate("sql").status_code == 200


def test_bad_input_names_the_field(server):
    long = server.generate(inputs="word " * 3000)
    assert long.status_code == 422 and "inputs" in long.json()["error"] and "1024" in long.json()["error"]
    for parameters, word in ((dict(temperature=-1), "temperature"), (dict(top_p=2), "top_p"), (dict(colour=1), "colour")):
        answer = server.generate(**parameters)
        assert answer.status_code == 422 and word in answer.json()["error"]


def test_a_client_that_leaves_frees_everything(server):
    body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 900, "ignore_eos_token": True, "adapter_id": "pirate"}}
    before = server.metric("manylora_output_tokens_total")
    with server.client.stream("POST", "/generate_stream", json=body) as stream:
        events = (json.loads(line[5:]) for line in stream.iter_lines() if line.startswith("data:"))
        assert next(events)["token"]["text"] is not None
    time.sleep(1.5)  # the engine's numbers are half a second old
    server.wait_until_free(timeout_s=10)
    assert server.metric("manylora_output_tokens_total") - before < 450  # it was not generated to its end for nobody


def test_two_hundred_clients_at_once(server):
    names = [None, "sql", "json", "pirate", "nobody"]

    async def one(client, i):
        parameters = {"max_new_tokens": 3, "adapter_id": names[i % 5]}
        return await client.post("/generate", json={"inputs": f"Question {i}:", "parameters": parameters})

    async def ask_all():
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=str(server.client.base_url), timeout=120, limits=limits) as client:
            return await asyncio.gather(*(one(client, i) for i in range(200)))

    answers = asyncio.run(ask_all())
    for i, answer in enumerate(answers):
        assert answer.status_code == (424 if i % 5 == 4 else 200), answer.text
    again = server.generate(inputs="Question 7:", adapter="json", max_new_tokens=3)
    assert again.json()["generated_text"] == answers[7].json()["generated_text"]  # the same beside 199 others as alone
    server.wait_until_free(timeout_s=5)


def test_a_replaced_adapter_answers_with_its_new_weights(server, adapters_dir):
    shutil.copytree(EXAMPLES / "sql", adapters_dir / "changing")
    assert server.generate("changing").json()["generated_text"].startswith("SELECT")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(EXAMPLES / "pirate" / name, adapters_dir / "changing" / f"{name}.new")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapters_dir / "changing" / f"{name}.new").rename(adapters_dir / "changing" / name)
    assert "Arrr" in server.generate("changing").json()["generated_text"]
    shutil.rmtree(adapters_dir / "changing")
    assert server.generate("changing").status_code == 424


def test_merged_adapters(server):
    merged = {"ids": ["sql", "pirate"], "weights": [0.0, 1.0], "merge_strategy": "linear"}
    plain = server.generate("pirate").json()["generated_text"]
    answer = server.generate(None, merged_adapters=merged)
    assert answer.status_code == 200 and answer.json()["generated_text"] == plain


def test_a_killed_engine_is_replaced_and_sigterm_drains(model_dir, adapters_dir, tmp_path):
    server = Server(model_dir, adapters_dir, tmp_path, "--max-batch-size", "2").wait_healthy()
    try:
        children = psutil.Process(server.process.pid).children()
        next(child for child in children if "server.engine" in " ".join(child.cmdline())).kill()
        deadline = time.monotonic() + 60
        while server.client.get("/health").status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.client.get("/health").status_code == 503
        server.wait_healthy()
        body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 60, "ignore_eos_token": True}}
        with server.client.stream("POST", "/generate_stream", json=body) as stream:
            events = (json.loads(line[5:]) for line in stream.iter_lines() if line.startswith("data:"))
            next(events)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            refused = httpx.post(f"{server.client.base_url}/generate", json=body, timeout=30)
            assert refused.status_code == 503
            *_, last = events
        assert last["generated_text"] is not None
        assert server.process.wait(60) in (0, -signal.SIGTERM)
    finally:
        server.stop()

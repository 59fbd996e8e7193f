"""Names that are published anew under load, on the real engine: adapters that say one word each, whatever they are asked."""

import json
import math
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from tests.e2e.test_serve import Server

KEY = "an-admin-key-of-a-test"
WORDS = [" red", " green", " blue", " seven", " stone"]
NUM_TOKENS = 12
pytestmark = pytest.mark.slow


def write_marker(folder: Path, model_dir: Path, word: str) -> None:
    """An adapter whose head says `word` and nothing else: a LoRA of rank 1 that is zero but for its bias."""
    config = json.loads((model_dir / "config.json").read_text())
    [token_id] = Tokenizer.from_file(str(model_dir / "tokenizer.json")).encode(word, add_special_tokens=False).ids
    bias = np.zeros(config["vocab_size"], np.float32)
    bias[token_id] = 1e4
    folder.mkdir(parents=True)
    lora = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["lm_head"], "lora_bias": True}
    (folder / "adapter_config.json").write_text(json.dumps(lora | {"base_model_name_or_path": "x", "task_type": "CAUSAL_LM"}))
    tensors = {
        "lora_A.weight": np.zeros((1, config["hidden_size"]), np.float32),
        "lora_B.weight": np.zeros((len(bias), 1), np.float32),
        "lora_B.bias": bias,
    }
    save_file({f"base_model.model.lm_head.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("names")
    for word in WORDS:
        write_marker(root / "adapters" / word.strip(), model_dir, word)
    running = Server(model_dir, root / "adapters", root, "--max-total-tokens", "256", "--admin-key", KEY)
    yield running.wait_healthy()
    running.stop()


def order(server: Server, method: str, path: str, body: object = None) -> httpx.Response:
    return server.client.request(method, f"/v1/adapters{path}", json=body, headers={"authorization": f"Bearer {KEY}"})


def said(server: Server, name: str) -> str | None:
    """The word that `name` says; None if there is no such adapter."""
    answer = server.generate(name, max_new_tokens=NUM_TOKENS)
    if answer.status_code == 424 and "was not found" in answer.text:
        return None
    assert answer.status_code == 200, answer.text
    words = {f" {word}" for word in answer.json()["generated_text"].split()}
    assert len(words) == 1 and words <= set(WORDS), words
    return words.pop()


def test_no_request_fails_and_none_mixes_weights_while_names_are_published_anew(server: Server) -> None:
    orders: dict[str, list[tuple[float, float, str]]] = {}  # name -> (began at, answered at, word)
    for name in ("x", "y"):
        assert order(server, "POST", "", {"name": name, "id": WORDS[0].strip()}).status_code == 200
        orders[name] = [(0.0, 0.0, WORDS[0])]
    begun_at, dice = time.monotonic(), random.Random(0)
    asked = [0] * 4

    def goes_on() -> bool:
        """For six seconds, and on a busy machine until all have asked, and one name was published, often enough to have met."""
        enough = min(asked) > 3 and max(len(each) for each in orders.values()) > 3
        return time.monotonic() < begun_at + (6 if enough else 60)

    def ask(index: int, name: str) -> None:
        while goes_on():
            began_at = time.monotonic()
            word = said(server, name)
            given, now = list(orders[name]), time.monotonic()
            gone_at = [answered_at for _, answered_at, _ in given[1:]] + [now]
            may = {meant for (since, _, meant), gone in zip(given, gone_at, strict=True) if since <= now and gone >= began_at}
            assert word in may, (name, word, may)
            asked[index] += 1

    with ThreadPoolExecutor(6) as threads:
        asking = [threads.submit(ask, index, name) for index, name in enumerate(("x", "y", "x", "y"))]
        while goes_on():
            name, word = dice.choice(["x", "y"]), dice.choice(WORDS)
            orders[name].append((time.monotonic(), math.inf, word))
            assert order(server, "POST", "", {"name": name, "id": word.strip()}).status_code == 200
            orders[name][-1] = (orders[name][-1][0], time.monotonic(), word)
            assert said(server, name) == word
        for each in asking:
            each.result()
    assert min(asked) > 3
    assert max(len(each) for each in orders.values()) > 3


def test_unload_frees_the_engines_memory_and_delete_ends_the_name(server: Server) -> None:
    assert order(server, "POST", "", {"name": "z", "id": "stone"}).json()["tier"] in ("host", "device")
    listed = order(server, "GET", "").json()["data"]
    for row in listed:
        if row["tier"] in ("host", "device"):
            assert order(server, "POST", f"/{row['id']}/unload").status_code == 200
    deadline = time.monotonic() + 20
    while server.metric("manylora_adapter_bytes_host") + server.metric("manylora_adapter_bytes_device") > 0:
        assert time.monotonic() < deadline, order(server, "GET", "").text
        time.sleep(0.2)
    assert {row["tier"] for row in order(server, "GET", "").json()["data"]} <= {"absent", "disk"}
    assert said(server, "z") == " stone"
    assert order(server, "DELETE", "/z").status_code == 200
    assert said(server, "z") is None

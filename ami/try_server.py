"""Starts the real server on small models with random weights and asks it: validation of an image, and the way its kernel caches are filled.

`python ami/try_server.py --shapes FILE --device DEVICE [SHAPE...]` from the server's folder. For each shape: a model of two layers and an
adapter are made, `python -m server` is started, asked alone and in company at sizes that decode graphs are made for, and drained.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

NUM_LAYERS, VOCAB, POSITIONS = 2, 512, 2048  # the vocabulary's size is in no compiled kernel
RANK = 16
COMPANIES = (1, 2, 4, 8, 16, 32, 64)  # requests at once
START_S = 900.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_model(folder: Path, shape: dict[str, Any]) -> None:
    """A model with random weights and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **shape, num_hidden_layers=NUM_LAYERS, vocab_size=VOCAB, max_position_embeddings=POSITIONS, bos_token_id=0, eos_token_id=VOCAB - 1
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index + 1 for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def make_adapter(folder: Path, model: Path) -> None:
    """LoRA on every linear of every layer."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    weights = {}
    with safe_open(next(model.glob("*.safetensors")), "pt") as base:
        for name in base.keys():  # noqa: SIM118 (not a dict)
            module = name.removesuffix(".weight")
            if module.split(".")[-1] in TARGETS and name.endswith(".weight"):
                rows, columns = base.get_slice(name).get_shape()
                weights[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
                weights[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


class TriedServer:
    """`python -m server` on a free port of loopback, from `with` to its end."""

    def __init__(self, model: Path, adapters: Path, device: str, flags: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._command = [sys.executable, "-m", "server", "--model-id", str(model), "--adapters-dir", str(adapters), "--device", device]
        self._command += ["--port", str(self._port), "--store-dir", str(adapters.parent / "store"), *flags]

    def __enter__(self) -> "TriedServer":
        self._process = subprocess.Popen(self._command, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        deadline = time.monotonic() + START_S
        while self._call("GET", "/health")[0] != 200:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise SystemExit(f"the server did not start (exit status {self._process.returncode})")
            time.sleep(0.5)
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def generate(self, inputs: str, adapter: str | None, num_tokens: int) -> str:
        """The text of one request; SystemExit with the answer if it is an error."""
        parameters = {"max_new_tokens": num_tokens, "adapter_id": adapter, "ignore_eos_token": True}
        status, answer = self._call("POST", "/generate", json.dumps({"inputs": inputs, "parameters": parameters}))
        if status != 200:
            raise SystemExit(f"the server answered {status}: {answer[:500]}")
        return json.loads(answer)["generated_text"]

    def _call(self, method: str, path: str, body: str | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except OSError:
            return 0, ""
        finally:
            connection.close()


def try_shape(name: str, shape: dict[str, Any], device: str, companies: tuple[int, ...], flags: list[str]) -> None:
    """Make, start, ask, check, stop."""
    started_at = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="manylora-try-") as place:
        model, adapters = Path(place) / "model", Path(place) / "adapters"
        make_model(model, shape)
        make_adapter(adapters / "tried", model)
        with TriedServer(model, adapters, device, flags) as server, ThreadPoolExecutor(max(companies)) as pool:
            base, tried = server.generate("a question", None, 8), server.generate("a question", "tried", 8)
            if base == tried:
                raise SystemExit(f"{name}: the adapter changes nothing")
            for company in companies:
                asked = [(f"{'word ' * (1 + 37 * index % 200)}{index}", (None, "tried")[index % 2], 8) for index in range(company)]
                list(pool.map(lambda request: server.generate(*request), asked))
    print(f"{name}: served in {time.monotonic() - started_at:.0f} s", flush=True)


def main() -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(description="Serve small models with random weights, to validate an image and fill its caches.")
    parser.add_argument("--shapes", type=Path, required=True, help="TOML file, a section a model")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--companies", default=",".join(map(str, COMPANIES)), help="requests at once, one after another")
    parser.add_argument("--flag", action="append", default=[], help="passed on to the server")
    parser.add_argument("shape", nargs="*", help="sections to serve; all by default")
    arguments = parser.parse_args()
    shapes = tomllib.loads(arguments.shapes.read_text())
    if unknown := set(arguments.shape) - set(shapes):
        print(f"error: no shape {sorted(unknown)[0]}; {arguments.shapes} has {', '.join(shapes)}", file=sys.stderr)
        return 2
    for name in arguments.shape or shapes:
        try_shape(name, shapes[name], arguments.device, tuple(map(int, arguments.companies.split(","))), arguments.flag)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Requests of every kind, each judged by what its name may have meant while it was open, and by what the same content said before.

Owns the asking and the judging. Greedy decoding: a content says the same to a prompt each time, wherever it runs and whoever is beside it.
A token whose rival was near (two products may round differently) is not held against it.
"""

import json
import random
import time
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.gpu.models import as_text
from benchmarks.soak.marks import FIRST_ID, tokens_of
from benchmarks.soak.names import ABSENT, Name
from benchmarks.soak.tally import Tally

BASE = -2  # in place of a mark
_CLEAR = -0.01  # log probability of a token that had no near rival
_PROMPT_LENS = (5, 17, 33, 40, 48, 64, 90, 130)
_NUM_NEW = (2, 5, 9, 16, 40)
_LEAVES = 0.1  # share of the streams that are left after the first token


class NoAnswer(Exception):
    """The server did not answer whole; the message says how."""


@dataclass
class Answer:
    """Tokens and their log probabilities."""

    tokens: list[int]
    logprobs: list[float]


def make_prompts(seed: int, num: int = 12) -> list[list[int]]:
    """Prompts of several lengths; half of them begin alike, as those of one application do."""
    rng = random.Random(f"prompts {seed}")
    common = [rng.randrange(3, FIRST_ID) for _ in range(max(_PROMPT_LENS))]
    prompts = []
    for index in range(num):
        length = _PROMPT_LENS[index % len(_PROMPT_LENS)]
        own = [rng.randrange(3, FIRST_ID) for _ in range(length)]
        prompts.append(own if index % 2 else [*common[: length // 2], *own[length // 2 :]])
    return prompts


class Requests:
    """Asks `client`'s server and judges the answers."""

    def __init__(self, client: httpx.AsyncClient, prompts: list[list[int]], tally: Tally) -> None:
        self._client, self._prompts, self._tally = client, prompts, tally
        self._said: dict[tuple[int, int], Answer] = {}  # (content, prompt) -> the longest answer so far

    async def ask(self, name: Name | None, rng: random.Random) -> None:
        """One request, of a kind that `rng` chooses, for a name (None: the base). Never raises for what the server does."""
        prompt, num_new = rng.randrange(len(self._prompts)), rng.choice(_NUM_NEW)
        kind = rng.choices(("generate", "generate_stream", "completions"), (5, 4, 1))[0]
        leaves = kind == "generate_stream" and rng.random() < _LEAVES
        from_at = time.monotonic()
        try:
            if kind == "completions":
                status, answer = await self._complete(name, prompt, num_new)
            elif kind == "generate":
                status, answer = await self._generate(name, prompt, num_new)
            else:
                status, answer = await self._stream(name, prompt, num_new, leaves)
        except (httpx.HTTPError, NoAnswer, KeyError, ValueError) as error:
            self._tally.lost(f"{kind} for {name.id if name else 'the base'}: {type(error).__name__}: {error}")
            return
        could = name.could_mean(from_at, time.monotonic()) if name is not None else {BASE}
        self._judge("left" if leaves else kind, could, prompt, num_new if not leaves else None, status, answer)

    def _judge(self, kind: str, could: set[int], prompt: int, num_new: int | None, status: str, answer: Answer | None) -> None:
        what = f"{kind}, prompt {prompt}, which may be of {sorted(could)}"
        if answer is None:
            if ABSENT in could and "was not found" in status:
                self._tally.done["not found"] += 1
            else:
                self._tally.lost(f"{what}: {status[:200]}")
            return
        content = BASE if could == {BASE} else next((mark for mark in could - {ABSENT} if _is_of(mark, answer)), None)
        if content is None or (num_new is not None and len(answer.tokens) != num_new):
            self._tally.wrong(f"{what}: {answer.tokens}")
        elif not self._agrees(content, prompt, answer):
            self._tally.wrong(f"{what}: {answer.tokens}, before {self._said[content, prompt].tokens}")
        else:
            self._tally.done[kind] += 1

    def _agrees(self, content: int, prompt: int, answer: Answer) -> bool:
        """Whether it begins, or goes on, as the same content's answer to the prompt did before."""
        before = self._said.setdefault((content, prompt), answer)
        for index, (one, other) in enumerate(zip(before.tokens, answer.tokens, strict=False)):
            if one != other:
                return before.logprobs[index] < _CLEAR or answer.logprobs[index] < _CLEAR
        if len(answer.tokens) > len(before.tokens):
            self._said[content, prompt] = answer
        return True

    def _body(self, name: Name | None, prompt: int, num_new: int) -> dict[str, Any]:
        parameters = {"max_new_tokens": num_new, "details": True, "ignore_eos_token": True, "adapter_id": name.id if name else None}
        return {"inputs": as_text(self._prompts[prompt]), "parameters": parameters}

    async def _generate(self, name: Name | None, prompt: int, num_new: int) -> tuple[str, Answer | None]:
        answer = await self._client.post("/generate", json=self._body(name, prompt, num_new))
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text}", None
        tokens = answer.json()["details"]["tokens"]
        return "", Answer([token["id"] for token in tokens], [token["logprob"] for token in tokens])

    async def _stream(self, name: Name | None, prompt: int, num_new: int, leaves: bool) -> tuple[str, Answer | None]:
        tokens, ended = [], False
        async with self._client.stream("POST", "/generate_stream", json=self._body(name, prompt, num_new)) as answer:
            if answer.status_code != 200:
                return f"{answer.status_code} {(await answer.aread()).decode()}", None
            async for line in answer.aiter_lines():
                if not line.startswith("data:"):
                    continue
                event = json.loads(line[5:])
                if "error" in event or ended:
                    raise NoAnswer(f"after {len(tokens)} tokens: {line}")
                tokens.append(event["token"])
                ended = event["generated_text"] is not None
                if leaves:
                    break
        if not (ended or leaves):
            raise NoAnswer(f"the stream broke off after {len(tokens)} of {num_new} tokens")
        return "", Answer([token["id"] for token in tokens], [token["logprob"] for token in tokens])

    async def _complete(self, name: Name | None, prompt: int, num_new: int) -> tuple[str, Answer | None]:
        body = {
            "model": name.id if name else "base", "prompt": self._prompts[prompt], "max_tokens": num_new, "temperature": 0, "logprobs": 1,
            "ignore_eos_token": True,
        }  # fmt: skip
        answer = await self._client.post("/v1/completions", json=body)
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text}", None
        said = answer.json()["choices"][0]["logprobs"]
        return "", Answer([int(word.strip().removeprefix("w")) for word in said["tokens"]], said["token_logprobs"])


def _is_of(mark: int, answer: Answer) -> bool:
    """Whether the content of that mark can have said it: its own two tokens, but where neither of them stood out (a hidden state across
    the LoRA's direction: one token in a hundred thousand)."""
    own = tokens_of(mark)
    return all(token in own or logprob < _CLEAR for token, logprob in zip(answer.tokens, answer.logprobs, strict=True)) and bool(
        own & set(answer.tokens)
    )

"""Requests without a pause from several threads, and what came of each.

Owns the threads. `steps.failures` runs one while it ends instances.
"""

import threading
import time
from collections import Counter
from dataclasses import dataclass

import httpx

from rehearse.endpoint import Endpoint, target_of
from rehearse.errors import Differs

_PATIENCE_S = 60.0
_PAUSE_AT_LIMIT_S = 0.2


@dataclass(frozen=True)
class Answer:
    """`status`: 0 if the connection broke; `target`: who was asked; times are monotonic seconds."""

    sent_at: float
    ended_at: float
    status: int
    target: str | None
    text: str


class Load:
    """A context manager; `answers` grows while it runs. Its end waits for what is under way."""

    def __init__(self, endpoint: Endpoint, *, num_threads: int = 6, max_new_tokens: int = 24) -> None:
        self._endpoint, self._max_new_tokens = endpoint, max_new_tokens
        self.answers: list[Answer] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(num_threads)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def await_answers(self, targets: set[str], num: int = 2) -> None:
        """Until each of `targets` answered `num` more requests. Differs if they do not."""
        before = self._num_good()
        deadline = time.monotonic() + _PATIENCE_S
        while any(self._num_good()[target] - before[target] < num for target in targets):
            if time.monotonic() > deadline:
                raise Differs(f"no {num} good answers from each of {sorted(targets)} in {_PATIENCE_S:.0f} s: {self._num_good()}")
            time.sleep(0.05)

    @property
    def failed(self) -> list[Answer]:
        """Those that were not answered with 200."""
        return [answer for answer in self.answers if answer.status != 200]

    def _num_good(self) -> Counter[str | None]:
        return Counter(answer.target for answer in list(self.answers) if answer.status == 200)

    def _run(self, number: int) -> None:
        turn = 0
        while not self._ended.is_set():
            turn += 1
            sent_at = time.monotonic()
            try:
                response = self._endpoint.generate(f"{number} and {turn} are", max_new_tokens=self._max_new_tokens, ignore_eos_token=True)
                status, target, text = response.status_code, target_of(response), response.text
            except httpx.TransportError as error:
                status, target, text = 0, None, repr(error)
            if status == 429:  # the gateway's limit, which is not what is tried here
                self._ended.wait(_PAUSE_AT_LIMIT_S)
                continue
            self.answers.append(Answer(sent_at, time.monotonic(), status, target, text))

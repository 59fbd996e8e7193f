"""Grammars of answers: compiled off the step, kept by content, followed token by token.

Owns the compiler's threads, what is remembered of a grammar, and each sequence's place in its own. The masks are llguidance's
(Earley over a lexer of derivatives; no table is built ahead). Knows neither logits nor queues of sequences: engine.core holds a request
back until its grammar is here, engine.masks puts the masks on the logits. No torch.
"""

import hashlib
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from server.engine.grammar_trial import Trial, Verdict, load_tokenizer, parser_limits
from server.errors import GenerationFailed, Overloaded, ServerError, ValidationFailed
from server.types import GrammarSpec

log = logging.getLogger(__name__)

MAX_GRAMMAR_CHARS = 256 << 10
_STACK_BYTES = 16 << 20
_REMEMBER_REFUSAL_S = 60.0
_MIN_STATE_BYTES = 256 << 10  # a small grammar takes something too


class Matcher:
    """One sequence's place in its grammar. `stop_ids` end the answer, and are allowed where the grammar lets it end."""

    def __init__(self, inner: LLMatcher, end_id: int, stop_ids: Sequence[int], num_words: int) -> None:
        self.inner = inner  # engine.masks fills many at once
        self.num_words = num_words  # of 32 bits, of a mask
        self._end_id = end_id
        self._stop_ids = frozenset(stop_ids)

    @property
    def finished(self) -> bool:
        """Nothing can follow: the answer is complete, also without a stop token."""
        return self.inner.is_stopped()

    @property
    def failed(self) -> bool:
        """The grammar cannot go on: `finish_mask` and `accept` raise."""
        return self.inner.is_error()

    def finish_mask(self, mask: np.ndarray) -> list[int]:
        """Put the stop tokens into llguidance's mask (int32 [num_words], bit i of word w is token 32 w + i), in place.

        Returns the allowed stop tokens that are beyond the mask (an adapter's own). GenerationFailed if the grammar cannot go on."""
        self._check()
        bits = mask.view(np.uint32)
        may_end = bool(bits[self._end_id // 32] >> (self._end_id % 32) & 1)
        if not may_end:
            return []
        bits[self._end_id // 32] &= ~np.uint32(1 << (self._end_id % 32))
        beyond = []
        for id in self._stop_ids:
            if id // 32 < self.num_words:
                bits[id // 32] |= np.uint32(1 << (id % 32))
            else:
                beyond.append(id)
        return beyond

    def accept(self, token: int) -> None:
        """The sequence goes on with `token`. GenerationFailed if the grammar does not have it there."""
        if token in self._stop_ids:
            return
        self.inner.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self.inner.is_error():
            log.warning("a grammar failed while it was followed: %s", self.inner.get_error().split("\n", 1)[0][:200])
            raise GenerationFailed("the answer's grammar became too complex to follow")


class Grammar:
    """A compiled grammar. `matcher` gives each sequence its own."""

    def __init__(self, pristine: LLMatcher, end_id: int, num_words: int, state_bytes: int) -> None:
        self._pristine, self._end_id, self._num_words = pristine, end_id, num_words
        self.state_bytes = max(state_bytes, _MIN_STATE_BYTES)

    def matcher(self, stop_ids: Sequence[int]) -> Matcher:
        """At the grammar's beginning; nothing is shared with others."""
        return Matcher(self._pristine.deep_copy(), self._end_id, stop_ids, self._num_words)


class GrammarCompiler:
    """Compiles in threads of its own; what was compiled is kept up to `max_bytes`. `vocab_size`: rows of the model's head.

    Two lanes: what takes longer than `quick_s` leaves the first for the second, where `timeout_s` is its end. So a hard grammar holds up
    others for `quick_s` at most."""

    def __init__(
        self,
        model_dir: Path,
        *,
        vocab_size: int,
        quick_s: float = 0.5,
        timeout_s: float = 5.0,
        max_bytes: int = 512 << 20,
        max_waiting: int = 256,
    ) -> None:
        self._tokenizer_path, self._vocab_size = model_dir / "tokenizer.json", vocab_size
        self._max_bytes, self._max_waiting = max_bytes, max_waiting
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Grammar] = OrderedDict()  # the least recently used first
        self._kept_bytes = 0
        self._refused: OrderedDict[str, tuple[float, str]] = OrderedDict()  # when and why, oldest first
        self._running: dict[str, Future[Grammar]] = {}
        slow = _Lane(timeout_s, None)
        self._lanes = (_Lane(quick_s, slow), slow)
        self._threads: list[threading.Thread] = []
        self._tokenizer_lock = threading.Lock()
        self._tokenizer: tuple[LLTokenizer, int] | None = None

    def request(self, spec: GrammarSpec) -> Future[Grammar]:
        """The grammar, at once if it is known; it is compiled once however many ask.

        In the future: ValidationFailed with the reason if it is refused; Overloaded if too many others wait."""
        done: Future[Grammar] = Future()
        key = hashlib.sha256(f"{spec.kind}\0{spec.text}".encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            if (grammar := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                done.set_result(grammar)
                return done
            if (running := self._running.get(key)) is not None:
                return running
            refused_at, reason = self._refused.get(key, (float("-inf"), ""))
            if len(spec.text) > MAX_GRAMMAR_CHARS:
                done.set_exception(ValidationFailed(f"longer than {MAX_GRAMMAR_CHARS} characters"))
            elif time.monotonic() - refused_at < _REMEMBER_REFUSAL_S:
                done.set_exception(ValidationFailed(reason))
            elif len(self._running) >= self._max_waiting:
                done.set_exception(Overloaded("too many grammars wait to be compiled"))
            else:
                self._running[key] = done
                self._start_threads()
                self._lanes[0].jobs.put((key, spec))
        return done

    def close(self) -> None:
        """End the threads and their trial processes once they are done with what they have; what waits is left as it is."""
        for lane in self._lanes:
            lane.closed = True
            lane.jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _start_threads(self) -> None:
        if self._threads:
            return
        before = threading.stack_size(_STACK_BYTES)
        try:
            for lane in self._lanes:
                thread = threading.Thread(target=self._run, args=(lane,), name="grammars", daemon=True)
                self._threads.append(thread)
                thread.start()
        finally:
            threading.stack_size(before)

    def _run(self, lane: "_Lane") -> None:
        trial = Trial(self._tokenizer_path, self._vocab_size, timeout_s=lane.timeout_s)
        while (job := lane.jobs.get()) is not None and not lane.closed:
            key, spec = job
            try:
                verdict = trial.judge(spec.kind, spec.text)
                if verdict is None and lane.slower is not None:
                    lane.slower.jobs.put(job)
                    continue
                grammar = self._compile(verdict or Verdict(error=f"too complex: not compiled within {lane.timeout_s:g} s"))
            except ValidationFailed as refusal:
                self._end(key, refusal)
            except Exception:
                log.exception("a grammar could not be compiled")
                self._end(key, GenerationFailed("the answer's grammar could not be compiled"))
            else:
                self._keep(key, grammar)
        trial.close()

    def _compile(self, verdict: Verdict) -> Grammar:
        """What the trial has found to be harmless; llguidance lets other threads run meanwhile."""
        if verdict.error is not None:
            raise ValidationFailed(verdict.error)
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._tokenizer_path, self._vocab_size)
        tokenizer, end_id = self._tokenizer
        matcher = LLMatcher(tokenizer, verdict.text, limits=parser_limits(), log_level=0)
        if matcher.is_error():
            raise ValidationFailed(matcher.get_error()[:500])
        return Grammar(matcher, end_id, -(-tokenizer.vocab_size // 32), verdict.state_bytes)

    def _keep(self, key: str, grammar: Grammar) -> None:
        with self._lock:
            self._kept[key] = grammar
            self._kept_bytes += grammar.state_bytes
            while self._kept_bytes > self._max_bytes and len(self._kept) > 1:
                self._kept_bytes -= self._kept.popitem(last=False)[1].state_bytes
            done = self._running.pop(key)
        done.set_result(grammar)

    def _end(self, key: str, error: ServerError) -> None:
        """Refusals are remembered for a while, faults of ours are not."""
        now = time.monotonic()
        with self._lock:
            if isinstance(error, ValidationFailed):
                self._refused.pop(key, None)
                self._refused[key] = now, error.message
                while len(self._refused) > 1024 or now - next(iter(self._refused.values()))[0] > _REMEMBER_REFUSAL_S:
                    self._refused.popitem(last=False)
            done = self._running.pop(key)
        done.set_exception(error)


class _Lane:
    """Jobs of one thread, how long each may take, and where those go that take longer."""

    def __init__(self, timeout_s: float, slower: "_Lane | None") -> None:
        self.timeout_s, self.slower = timeout_s, slower
        self.jobs: queue.SimpleQueue[tuple[str, GrammarSpec] | None] = queue.SimpleQueue()
        self.closed = False

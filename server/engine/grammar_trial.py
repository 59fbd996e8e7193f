"""A grammar's trial: it is compiled, and a few tokens are drawn by it, in a process of its own before the engine touches it.

A stranger's grammar may take for ever, all the memory, or the whole process (a chain of a few thousand rules overflows the compiler's
stack). Here that costs a process that is started again. `Trial` is the engine's side, `main` the process: frames of (4 bytes length,
msgpack) on stdin and stdout. Nothing of the engine's memory, environment or sockets is handed over. engine.grammar calls it; no torch.
"""

import os
import resource
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from server.engine.grammar_text import grammar_text
from server.ipc.sockets import die_with_parent

MAX_STATE_BYTES = 128 << 20  # that a grammar and its walk may leave behind
MAX_MASK_S = 0.05  # of a core, for one token
_MEMORY_BYTES = 3 << 30  # of the process, address space
_STACK_BYTES = 1 << 20  # half of what any thread has that follows a grammar in the engine: what fits here fits there
_WALK_LEN = 48  # tokens
_START_TIMEOUT_S = 60.0
_HEALTHY = ("NotStopped", "NoExtension", "NoExtensionBias", "EndOfSentence")
_PAGE_BYTES = resource.getpagesize()
_LENGTH = struct.Struct(">I")


class _Job(msgspec.Struct):
    kind: str
    text: str


class Verdict(msgspec.Struct):
    """`text`: what to compile; `state_bytes`: what it may take; `error`: why not, in words for the caller."""

    text: str = ""
    state_bytes: int = 0
    error: str | None = None


def parser_limits() -> LLParserLimits:
    """Bounds of each matcher: about 60 MB of lexer states, and messages without the caller's text."""
    return LLParserLimits(max_lexer_states=30_000, step_lexer_fuel=200_000, verbose_errors=False)


def load_tokenizer(path: Path, vocab_size: int) -> tuple[LLTokenizer, int]:
    """The tokenizer of tokenizer.json as llguidance wants it, and the token that stands for "may end here" in its masks.

    Which token that is does not matter: engine.grammar puts the request's own stop tokens in its place; a special one is no part of a text.
    ValueError if the file is of no use."""
    raw = path.read_bytes()
    tokens = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("added_tokens")
    special = [token["id"] for token in (msgspec.json.decode(tokens) if tokens is not None else []) if token.get("special")]
    if not special:
        raise ValueError("tokenizer.json has no special token, so that no grammar can say where a text ends")
    try:
        tokenizer = LLTokenizer(raw.decode(), eos_token=[special[0]])
        if tokenizer.vocab_size < vocab_size:
            tokenizer = LLTokenizer(raw.decode(), n_vocab=vocab_size, eos_token=[special[0]])
    except Exception as error:
        raise ValueError(f"llguidance does not take tokenizer.json: {error}") from None
    return tokenizer, special[0]


class Trial:
    """One trial process, started when first needed and again after it died. Not thread-safe: one thread calls it."""

    def __init__(self, tokenizer_path: Path, vocab_size: int, *, timeout_s: float) -> None:
        self._command = [sys.executable, "-m", __name__, str(tokenizer_path), str(vocab_size)]
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def judge(self, kind: str, text: str) -> Verdict | None:
        """What came of it; None if it was not done in time. OSError if the process does not start."""
        if self._process is not None and self._process.poll() is not None:
            self.close()  # something else ended it
        if self._process is None:
            self._start()
        started_at = time.monotonic()
        answer = self._exchange(msgspec.msgpack.encode(_Job(kind, text)), self._timeout_s)
        if time.monotonic() - started_at >= self._timeout_s:
            self.close()  # even if it answered at the last moment: it has been killed
            return None
        if answer is None:
            self.close()
            return Verdict(error="too complex: too large, or nested too deeply")
        return msgspec.msgpack.decode(answer, type=Verdict)

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _start(self) -> None:
        """Returns once the process has loaded its tokenizer, so that this does not count against the first grammar."""
        environment = {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        if self._exchange(msgspec.msgpack.encode(_Job("regex", "a")), _START_TIMEOUT_S) is None:
            self.close()
            raise OSError("the trial process does not start")

    def _exchange(self, frame: bytes, timeout_s: float) -> bytes | None:
        """The answer; None if the process died, by itself or because the time was up."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        alarm = threading.Timer(timeout_s, process.kill)
        alarm.start()
        try:
            process.stdin.write(_LENGTH.pack(len(frame)) + frame)
            process.stdin.flush()
            return _read_frame(process.stdout)
        except OSError:
            return None
        finally:
            alarm.cancel()


def _read_frame(stream: IO[bytes]) -> bytes | None:
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    frame = stream.read(_LENGTH.unpack(header)[0])
    return frame if len(frame) == _LENGTH.unpack(header)[0] else None


def try_grammar(tokenizer: LLTokenizer, kind: str, text: str) -> Verdict:
    """Compile, and walk at random along what the grammar allows."""
    before = _resident_bytes()
    try:
        compiled = grammar_text(kind, text)
    except ValueError as error:
        return Verdict(error=str(error)[:500])
    matcher = LLMatcher(tokenizer, compiled, limits=parser_limits(), log_level=0)
    fault = _walk(matcher, tokenizer.eos_token)
    if fault is not None:
        return Verdict(error=fault)
    state_bytes = max(0, _resident_bytes() - before)
    if state_bytes > MAX_STATE_BYTES:
        return Verdict(error=f"too complex: {state_bytes >> 20} MB of memory, {MAX_STATE_BYTES >> 20} are allowed")
    return Verdict(compiled, state_bytes)


def _walk(matcher: LLMatcher, end_token: int) -> str | None:
    """Draw tokens as a sequence would; what is wrong, or None."""
    draw = np.random.default_rng(0)
    for num_drawn in range(_WALK_LEN):
        if matcher.is_error() or matcher.is_stopped():
            break
        started_at = time.thread_time()
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        mask_s = time.thread_time() - started_at
        if mask_s > MAX_MASK_S:
            return f"too complex: {mask_s * 1000:.0f} ms for one token, {MAX_MASK_S * 1000:.0f} are allowed"
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        allowed = allowed[allowed != end_token]
        if len(allowed) == 0:
            if num_drawn == 0 and not matcher.is_error():
                return "nothing but the empty text meets it"
            break
        matcher.consume_token(int(draw.choice(allowed)))
    if matcher.is_error():
        return _readable(matcher.get_error())
    if matcher.stop_reason() not in _HEALTHY:
        return f"too complex ({matcher.stop_reason()})"
    return None


def _readable(error: str) -> str:
    """llguidance's words without its own advice."""
    if "coerce_one_of" in error:
        return "`oneOf` is only supported where its branches plainly exclude each other, by type or by a property's constant; use `anyOf`"
    return error.split("\n<", 1)[0].strip()[:500] or "refused without a reason"


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    except OSError:  # not Linux: the largest so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(tokenizer: LLTokenizer, stdin: IO[bytes], stdout: IO[bytes]) -> None:
    """Answer jobs until the engine closes stdin."""
    while (frame := _read_frame(stdin)) is not None:
        job = msgspec.msgpack.decode(frame, type=_Job)
        verdicts: list[Verdict] = []
        thread = threading.Thread(target=lambda job=job, verdicts=verdicts: verdicts.append(try_grammar(tokenizer, job.kind, job.text)))
        thread.start()  # a thread for its small stack
        thread.join()
        data = msgspec.msgpack.encode(verdicts[0] if verdicts else Verdict(error="the compiler failed"))
        stdout.write(_LENGTH.pack(len(data)) + data)
        stdout.flush()


if __name__ == "__main__":
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    main(load_tokenizer(Path(sys.argv[1]), int(sys.argv[2]))[0], sys.stdin.buffer, sys.stdout.buffer)

"""Requests that wait for their grammar before the scheduler hears of them.

Owns the requests while they wait. Knows neither tensors nor sockets. engine.core adds, polls and aborts; a request leaves exactly once.
"""

import threading
from concurrent.futures import Future

from server.engine.grammar import Grammar, GrammarCompiler, Matcher
from server.errors import GenerationFailed, ServerError, ValidationFailed
from server.types import EngineRequest


class GrammarQueue:
    """Used by the engine's thread alone; `arrived` is set, by the compiler's threads, when `take` has something to return."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._waiting: dict[str, tuple[EngineRequest, Future[Grammar]]] = {}
        self.arrived = threading.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    @property
    def request_ids(self) -> list[str]:
        """All that wait."""
        return list(self._waiting)

    def add(self, request: EngineRequest) -> None:
        """Begin to compile the request's grammar. KeyError if its id is in use here."""
        assert request.params.grammar is not None
        if request.request_id in self._waiting:
            raise KeyError(request.request_id)
        grammar = self._compiler.request(request.params.grammar)
        self._waiting[request.request_id] = request, grammar
        grammar.add_done_callback(lambda _: self.arrived.set())

    def remove(self, request_id: str) -> bool:
        """Forget a request; the compilation goes on for others. False if it is not here."""
        return self._waiting.pop(request_id, None) is not None

    def take(self) -> list[tuple[EngineRequest, Matcher | ServerError]]:
        """Those whose grammar is here, in order of arrival, each with its own matcher, or with the reason why there is none."""
        self.arrived.clear()  # before looking: what arrives from now on sets it again
        ready = []
        for request_id, (request, grammar) in list(self._waiting.items()):
            if grammar.done():
                del self._waiting[request_id]
                ready.append((request, _outcome(request, grammar)))
        return ready

    def close(self) -> None:
        """End the compiler's threads."""
        self._compiler.close()


def _outcome(request: EngineRequest, grammar: Future[Grammar]) -> Matcher | ServerError:
    error = grammar.exception()
    if error is None:
        return grammar.result().matcher(request.params.stop_token_ids)
    if isinstance(error, ValidationFailed):
        spec = request.params.grammar
        assert spec is not None
        return ValidationFailed(f"`{spec.param}`: {error.message}", param=spec.param)
    return error if isinstance(error, ServerError) else GenerationFailed("the answer's grammar could not be compiled")

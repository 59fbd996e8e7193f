"""A request id that is in use: the second request of it is dropped, and neither the first nor the engine suffers."""

from concurrent.futures import Future

import pytest

from server.engine.core import run_until_idle
from server.engine.grammar_queue import GrammarQueue
from server.types import EngineRequest, GrammarSpec, SamplingParams
from tests.server.engine.test_core import engine, prompt


class FreeGrammar:
    """Any text meets it."""

    def matcher(self, stop_ids) -> None:
        return None


class Compiler:
    def __init__(self) -> None:
        self.asked: list[Future] = []

    def request(self, spec: GrammarSpec) -> Future:
        self.asked.append(Future())
        return self.asked[-1]

    def close(self) -> None: ...


GRAMMAR = GrammarSpec("regex", "a")


@pytest.mark.parametrize(("first", "second"), [(GRAMMAR, None), (GRAMMAR, GRAMMAR), (None, GRAMMAR), (None, None)])
def test_the_second_of_an_id_is_dropped(first, second) -> None:
    core, _ = engine()
    core.grammars.close()
    compiler = Compiler()
    core.grammars = GrammarQueue(compiler)
    for grammar, num in ((first, 3), (second, 5)):
        core.add(EngineRequest("x", prompt(1), SamplingParams(max_new_tokens=num, grammar=grammar)))
    core.step()  # were the second one taken, it would run while the first waits
    for grammar in compiler.asked:
        grammar.set_result(FreeGrammar())
    outputs = run_until_idle(core)
    again = EngineRequest("x", prompt(1), SamplingParams(max_new_tokens=2))
    core.add(again)
    assert [one.error for one in outputs] == [None] * len(outputs) and outputs[-1].finish_reason == "length"
    assert sum(len(one.token_ids) for one in run_until_idle(core)) == 2 and len(core.grammars) == 0

"""The soak: a short run of it against a real server, and that what it must find it finds."""

import random
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from benchmarks.soak.__main__ import main
from benchmarks.soak.leaks import ALLOWED_GROWTH_BYTES, WARM_UP_REQUESTS, Look, held_descriptors, leaked
from benchmarks.soak.marks import NUM_MARKS, tokens_of, write_marked
from benchmarks.soak.names import ABSENT, Name, Popularity
from benchmarks.soak.requests import BASE, Answer, Requests, make_prompts
from benchmarks.soak.tally import Tally


@pytest.mark.slow
def test_a_short_soak_is_clean(capsys):
    assert main(["--requests", "300", "--adapters", "24", "--rounds", "2", "--clients", "12"]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert "wrong 0, lost 0, leaked 0 bytes, 0 descriptors, 0 blocks" in printed and "300 requests over 24 adapters" in printed


_SERVER = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
held = []
for line in sys.stdin:
    match line.split():
        case ["accept"]: held.append(server.accept()[0])
        case ["connect", port]: held.append(socket.create_connection(("127.0.0.1", int(port))))
        case ["close"]: held.pop().close()
    print("done", flush=True)
"""


def test_descriptors_are_counted_without_connections_that_clients_keep():
    with subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        process, port = psutil.Process(child.pid), int(child.stdout.readline())

        def tell(order: str) -> int:
            child.stdin.write(order + "\n")
            child.stdin.flush()
            assert child.stdout.readline() == "done\n"
            return held_descriptors(process)

        before = held_descriptors(process)
        with socket.create_connection(("127.0.0.1", port)):
            assert tell("accept") == before
        give_up_at = time.monotonic() + 30
        while held_descriptors(process) == before:  # the client is gone: it should have been closed
            assert time.monotonic() < give_up_at
        assert tell("close") == before
        with socket.create_server(("127.0.0.1", 0)) as other:
            assert tell(f"connect {other.getsockname()[1]}") == before + 1  # one of its own
        child.stdin.close()


def test_each_content_has_tokens_of_its_own(tmp_path):
    assert len(set().union(*(tokens_of(mark) for mark in range(NUM_MARKS)))) == 2 * NUM_MARKS
    first = load_file(write_marked(tmp_path / "a", 7) / "adapter_model.safetensors")
    again = load_file(write_marked(tmp_path / "a", 8) / "adapter_model.safetensors")
    assert first.keys() == again.keys() and not any(np.array_equal(first[name], again[name]) for name in first)
    lift = again["base_model.model.lm_head.lora_B.weight"]
    assert set(np.flatnonzero(lift)) == tokens_of(8)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_a_name_may_mean_while_it_changes():
    name = Name("a", published=True)
    name.begin(1, 10.0)
    name.end(11.0)
    name.begin(2, 20.0)
    assert name.could_mean(12.0, 13.0) == {1} and name.could_mean(12.0, 20.5) == {1, 2} == name.could_mean(21.0, 22.0)
    name.end(23.0)
    assert name.could_mean(24.0, 25.0) == {2} and name.could_mean(22.0, 30.0) == {1, 2}
    name.begin(ABSENT, 30.0)
    name.end(31.0)
    assert name.could_mean(32.0, 33.0) == {ABSENT} and name.mark == ABSENT
    assert Name("b", published=True).could_mean(0.0, 1.0) == {ABSENT}


def test_popular_names_come_more_often():
    names = [Name(str(index), published=True) for index in range(50)]
    popularity, rng = Popularity(names), random.Random(0)
    chosen = [names.index(popularity.choose(rng)) for _ in range(2000)]
    assert chosen.count(0) > 3 * chosen.count(20) and len(set(chosen)) > 40


@pytest.fixture
def judge():
    tally = Tally()
    requests = Requests(None, make_prompts(0), tally)

    def judged(could, tokens, *, num_new=None, prompt=0, logprobs=None, status=""):
        answer = None if tokens is None else Answer(tokens, logprobs or [-1e-6] * len(tokens))
        requests._judge("generate", could, prompt, num_new or len(tokens or ()), status, answer)
        found = (tally.num_wrong, tally.num_lost)
        tally.num_wrong = tally.num_lost = 0
        return found

    return judged


RIGHT, WRONG, LOST = (0, 0), (1, 0), (0, 1)
ONE, TWO = sorted(tokens_of(3)), sorted(tokens_of(4))


def test_another_contents_tokens_are_wrong(judge):
    assert judge({3}, [ONE[0], ONE[1], ONE[0]]) == RIGHT
    assert judge({3}, [TWO[0], TWO[1]], prompt=1) == WRONG
    assert judge({3, 4}, [TWO[0], TWO[1]], prompt=1) == RIGHT  # while it is changed
    assert judge({3, 4}, [ONE[0], TWO[0]], prompt=2) == WRONG  # a mixture of two versions
    assert judge({3}, [ONE[0]], num_new=2, prompt=3) == WRONG  # short
    assert judge({ABSENT}, [ONE[0]], prompt=3) == WRONG  # deleted
    assert judge({3}, [ONE[0], 5000], prompt=4, logprobs=[-1e-6, -8.0]) == RIGHT  # neither of the two stood out


def test_an_answer_that_differs_from_the_one_before_is_wrong(judge):
    assert judge({3}, [ONE[0], ONE[1]]) == RIGHT
    assert judge({3}, [ONE[0], ONE[1], ONE[1]]) == RIGHT  # it goes on
    assert judge({3}, [ONE[0], ONE[1], ONE[0]]) == WRONG
    assert judge({3}, [ONE[0], ONE[1], ONE[0]], logprobs=[-1e-6, -1e-6, -0.6]) == RIGHT  # a near tie
    assert judge({BASE}, [1, 2]) == RIGHT and judge({BASE}, [1, 3]) == WRONG


def test_errors_are_lost_unless_the_name_may_have_been_absent(judge):
    missing = "424 Adapter 'x' was not found in source 'local'"
    assert judge({3, ABSENT}, None, status=missing) == RIGHT
    assert judge({3}, None, status=missing) == LOST
    assert judge({3, ABSENT}, None, status="503 the engine is gone") == LOST


def test_what_is_not_given_back_is_a_leak():
    look = Look(WARM_UP_REQUESTS, 0, 0, 5, 500, {"api": 20, "engine0": 30}, {"api": 9}, {"api": 100 << 20, "engine0": 700 << 20}, 0)
    empty = replace(look, adapters=0, adapter_bytes=0)
    assert not any(leaked([look] * 9, empty).values())
    assert leaked([look] * 9, replace(empty, adapter_bytes=64, adapters=1)) | {"staged": 0} == {
        "bytes": 64, "descriptors": 0, "blocks": 0, "sequences": 0, "adapters": 1, "staged": 0,
    }  # fmt: skip
    more = replace(look, descriptors={"api": 23, "engine0": 29})
    assert leaked([look] * 8 + [more], empty)["descriptors"] == 3
    growing = [replace(look, resident_bytes={"api": (100 << 20) + 8 * ALLOWED_GROWTH_BYTES * n, "engine0": 700 << 20}) for n in range(9)]
    assert leaked(growing, empty)["bytes"] > 20 * ALLOWED_GROWTH_BYTES
    assert leaked(growing[:3], empty)["bytes"] == 0  # too few to tell
    assert leaked([replace(one, requests=WARM_UP_REQUESTS - 1) for one in growing], empty)["bytes"] == 0  # it warms up
    assert leaked([replace(look, blocks=2)] * 9, empty)["blocks"] == 18 and leaked([look] * 9, replace(empty, staged=1))["staged"] == 1

"""What the stand-in for Auto Scaling changes of the deployed user-data, and what the load under it counts as lost."""

from types import SimpleNamespace

import pytest

from rehearse.errors import Differs
from rehearse.group import for_this_machine
from rehearse.load import Load


def test_device_and_threads_are_all_that_is_changed():
    text = "MANYLORA_ADAPTERS_DIR='/mnt'\nMANYLORA_DEVICE='cuda'\nMANYLORA_PORT='8080'\n"
    changed = for_this_machine(text).splitlines()
    assert changed[1] == "MANYLORA_DEVICE='cpu'" and changed[2].startswith("MANYLORA_NUM_THREADS='")
    assert [changed[0], changed[3]] == [text.splitlines()[0], text.splitlines()[2]]


def test_user_data_without_a_device_is_not_the_deployed_one():
    with pytest.raises(Differs, match="nothing to change"):
        for_this_machine("MANYLORA_DEVICE='cpu'\n")


class Gateway:
    """Answers in turn from a list, then 200."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)

    def generate(self, prompt: str, **parameters: object) -> SimpleNamespace:
        status = self.statuses.pop(0) if self.statuses else 200
        return SimpleNamespace(status_code=status, headers={"x-rehearse-target": "i-1"}, text="text")


def test_a_load_counts_errors_as_lost_and_the_limit_as_nothing():
    with Load(Gateway(502, 429, 503), num_threads=1) as load:
        load.await_answers({"i-1"})
    assert [item.status for item in load.failed] == [502, 503]
    assert all(item.status == 200 for item in load.answers if item not in load.failed)


def test_a_load_that_a_target_does_not_answer_differs(monkeypatch):
    monkeypatch.setattr("rehearse.load._PATIENCE_S", 0.2)
    with Load(Gateway(), num_threads=1) as load, pytest.raises(Differs, match="i-2"):
        load.await_answers({"i-2"})

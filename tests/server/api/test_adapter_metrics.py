"""/metrics on adapters: series of their own, requests by state, and vLLM's gauge for gateways."""

import threading
from dataclasses import dataclass

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.api.lora_info import LoraRequestsInfo
from server.api.residency import Residency
from server.ipc.messages import AdapterEvent
from server.metrics import Metrics
from server.types import AdapterRef
from tests.server.api.live import LiveServer, wait_for
from tests.server.api.test_adapters import write_adapter


def samples(live: LiveServer, name: str) -> list[tuple[dict, float]]:
    families = text_string_to_metric_families(live.client.get("/metrics").text)
    return [(sample.labels, sample.value) for family in families for sample in family.samples if sample.name == name]


def generate(live: LiveServer, adapter: str, **parameters):
    return live.post("/generate", {"inputs": "one two", "parameters": {"max_new_tokens": 4, "adapter_id": adapter} | parameters})


def test_an_adapters_requests_are_counted(live: LiveServer) -> None:
    write_adapter(live.folder / "adapters" / "counted")
    labels = {"adapter": "counted", "source": "local"}
    assert generate(live, "counted").status_code == 200
    assert (labels, 1.0) in samples(live, "manylora_adapter_requests_total")
    assert (labels, 4.0) in samples(live, "manylora_adapter_generated_tokens_total")
    assert (labels, 1.0) in samples(live, "manylora_adapter_time_to_first_token_seconds_count")
    live.control(fail="broken", kind="GenerationFailed")
    assert generate(live, "counted").status_code == 424
    assert (labels, 1.0) in samples(live, "manylora_adapter_request_failures_total")


def test_ids_that_callers_make_up_have_no_series(live: LiveServer) -> None:
    for n in range(5):
        assert generate(live, f"made-up-{n}").status_code == 424
    assert "made-up" not in live.client.get("/metrics").text
    assert ({"adapter": "_other", "source": ""}, 5.0) in samples(live, "manylora_adapter_request_failures_total")


def test_running_adapters_are_listed_for_gateways(live: LiveServer) -> None:
    write_adapter(live.folder / "adapters" / "busy")
    live.control(step_s=0.05)
    threads = [threading.Thread(target=generate, args=(live, "busy"), kwargs={"max_new_tokens": 40}) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: ({"state": "running"}, 2.0) in samples(live, "manylora_requests_underway"))
        ((labels, value),) = samples(live, "vllm:lora_requests_info")
        assert "busy" in labels["running_lora_adapters"].split(",") and labels["max_lora"] == "64" and value > 1e9
    finally:
        for thread in threads:
            thread.join()
    wait_for(lambda: ({"state": "running"}, 0.0) in samples(live, "manylora_requests_underway"))


@pytest.fixture
def residency() -> Residency:
    residency = Residency(lambda message: None)
    for n, state in enumerate(("device", "host", "device", "device")):
        residency.resolved(("local", f"a{n}", None), AdapterRef(f"h{n}", "", f"a{n}"), (), 8, None)
        residency.take(AdapterEvent(hash=f"h{n}", state=state))
    return residency


@dataclass(eq=False)
class Request:
    adapter: str | None
    state: str


def lora_info(metrics: Metrics, residency: Residency, max_lora: int) -> tuple[list[str], list[str]]:
    ((sample,),) = [family.samples for family in LoraRequestsInfo(metrics, residency, max_lora).collect()]
    running, waiting = (sample.labels[f"{kind}_lora_adapters"] for kind in ("running", "waiting"))
    return running.split(","), waiting.split(",")


def test_running_ones_come_first_then_those_in_memory_as_far_as_there_is_room(residency: Residency) -> None:
    metrics = Metrics()
    requests = [("x,y", "running"), ("z", "waiting"), ("x,y", "preparing"), (None, "running")]
    held = {str(n): Request(adapter, state) for n, (adapter, state) in enumerate(requests)}
    metrics.underway.update(held)
    assert lora_info(metrics, residency, 64) == (["x%2Cy", "a3", "a2", "a0"], ["z"])
    assert lora_info(metrics, residency, 3) == (["x%2Cy", "a3"], ["z"])
    assert lora_info(metrics, residency, 1) == (["x%2Cy"], ["z"])
    held.clear()
    assert lora_info(metrics, residency, 3) == (["a3", "a2"], [""])

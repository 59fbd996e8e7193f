"""Metrics: LoRAX's names as LoRAX writes them, the engine's numbers, labels from closed sets."""

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.ipc.messages import EngineStats
from server.metrics import FAILURES, AdapterSeries, Metrics, load_ratio


def samples(metrics: Metrics) -> dict[str, float]:
    families = list(text_string_to_metric_families(metrics.render().decode()))
    return {f"{s.name}{s.labels or ''}": s.value for family in families for s in family.samples}


def test_lorax_counters_have_lorax_names() -> None:
    metrics = Metrics()
    metrics.request_count.inc()
    text = metrics.render().decode()
    assert "\nlorax_request_count 1.0\n" in text and "# TYPE lorax_request_count counter" in text
    assert "lorax_request_count_total" not in text and "_created" not in text


def test_engine_numbers_are_all_shown() -> None:
    metrics = Metrics()
    stats = {name: float(n) for n, name in enumerate(EngineStats.__struct_fields__, 1)}
    metrics.observe_engine(stats)
    shown = samples(metrics)
    assert set(stats.values()) <= set(shown.values())
    assert shown["lorax_queue_length"] == stats["num_waiting"] and shown["manylora_engine_steps_total"] == stats["num_steps"]


def test_load_is_the_scarcer_of_tokens_and_sequences() -> None:
    stats = {"num_tokens": 500, "max_tokens": 1000, "num_running": 4, "num_waiting": 0, "max_batch_size": 16}
    assert load_ratio(stats) == 0.5
    assert load_ratio(stats | {"num_waiting": 28}) == 2.0  # a queue shows above 1
    assert load_ratio(stats | {"num_tokens": 3000}) == 3.0
    assert load_ratio({}) == 0.0  # no engine yet
    metrics = Metrics()
    metrics.observe_engine(stats)
    assert samples(metrics)["manylora_load_ratio"] == 0.5


def test_labels_are_bounded() -> None:
    metrics = Metrics()
    for n in range(1000):
        metrics.failed(f"cause {n}")
    text = metrics.render().decode()
    assert text.count("\nlorax_request_failure{") == len(FAILURES)
    assert '\nlorax_request_failure{err="internal"} 1000.0\n' in text


def test_adapters_have_series_up_to_a_bound() -> None:
    now = [0.0]
    registry = CollectorRegistry()
    series = AdapterSeries(registry, 2, idle_s=100, clock=lambda: now[0])

    def answered() -> dict[tuple[str, str], float]:
        (family,) = (one for one in registry.collect() if one.name == "manylora_adapter_requests")
        return {(s.labels["adapter"], s.labels["source"]): s.value for s in family.samples}

    series.failed("made up", "local")
    for n in range(1000):
        series.succeeded(f"a{n}", "local", num_tokens=3, first_token_s=0.1, duration_s=0.2)
    series.succeeded("_merged", "local", num_tokens=3, first_token_s=0.1, duration_s=0.2)
    assert answered() == {("a0", "local"): 1, ("a1", "local"): 1, ("_other", ""): 998, ("_merged", ""): 1}
    now[0] = 90
    series.succeeded("a0", "local", num_tokens=3, first_token_s=0.1, duration_s=0.2)
    now[0] = 150  # a1 is idle for 150 s, a0 for 60 s
    series.failed("a1", "local")
    now[0] = 300
    series.succeeded("new", "s3", num_tokens=3, first_token_s=0.1, duration_s=0.2)
    assert answered() == {("a1", "local"): 1, ("new", "s3"): 1, ("_other", ""): 998, ("_merged", ""): 1}
    shown = generate_latest(registry).decode()
    assert 'failures_total{adapter="_other",source=""} 1.0' in shown and 'adapter="a0"' not in shown and "made up" not in shown


def test_no_adapter_has_series_if_none_may() -> None:
    metrics = Metrics(max_adapters=0)
    metrics.adapters.succeeded("a", "local", num_tokens=1, first_token_s=0.1, duration_s=0.2)
    assert 'adapter="_other"' in metrics.render().decode() and 'adapter="a"' not in metrics.render().decode()

"""Metrics: LoRAX's names as LoRAX writes them, the engine's numbers, labels from closed sets."""

from prometheus_client.parser import text_string_to_metric_families

from server.ipc.messages import EngineStats
from server.metrics import FAILURES, Metrics


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


def test_labels_are_bounded() -> None:
    metrics = Metrics()
    for n in range(1000):
        metrics.failed(f"cause {n}")
    text = metrics.render().decode()
    assert text.count("\nlorax_request_failure{") == len(FAILURES)
    assert '\nlorax_request_failure{err="internal"} 1000.0\n' in text

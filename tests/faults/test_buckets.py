"""S3 is slow, throttles, denies, drips: what that costs those who ask for an adapter from there, and nobody else."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.bucket import Bucket
from tests.server.api.live import live_server, wait_for
from tests.server.api.test_adapters import PROMPT, write_adapter


def body(adapter=None, source="s3"):
    parameters = {"adapter_id": adapter, "adapter_source": source if adapter else None, "max_new_tokens": 3}
    return {"inputs": PROMPT, "parameters": parameters}


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    for name, value in (("AWS_ACCESS_KEY_ID", "testing"), ("AWS_SECRET_ACCESS_KEY", "testing"), ("AWS_EC2_METADATA_DISABLED", "true")):
        monkeypatch.setenv(name, value)
    bucket = Bucket()
    for n in range(3):
        bucket.put(write_adapter(tmp_path / "files" / f"a{n}", seed=n, rank=8), f"adapters/a{n}")
    yield bucket
    bucket.close()


@pytest.fixture
def served(tmp_path, model_dir, bucket):
    """A server of that bucket, with an adapter of the bucket and one of a folder that it knows."""
    settings = {
        "s3_endpoint_url": bucket.endpoint, "s3_region": "us-east-1", "model_bucket": "bucket", "model_folder": "adapters",
        "source_read_timeout_s": 1, "source_retries": 2, "adapter_recheck_s": 0, "adapter_timeout_s": 20,
    }  # fmt: skip
    write_adapter(tmp_path / "server" / "adapters" / "local", seed=9)
    with live_server(tmp_path / "server", model_dir, **settings) as live:
        assert live.post("/generate", body("a0")).status_code == 200
        assert live.post("/generate", body("local", "local")).status_code == 200
        yield live


def others_go_on(live) -> None:
    """What is known of the bucket, another source, the base."""
    for asked in (body("a0"), body("local", "local"), body()):
        assert live.post("/generate", asked).status_code == 200, asked
    assert live.client.get("/health").status_code == 200


def left_over(live) -> list[str]:
    store = live.api.settings.store_dir
    return [path.name for folder in ("staging", "locks") for path in (store / folder).iterdir()]


@pytest.mark.fault(
    "Buckets", "S3 throttles (503 SlowDown)", "nothing if it ends within the tries; else 424, “S3 answered SlowDown … try again”",
    "adapters that are here go on as they were; the next request tries again",
)  # fmt: skip
def test_throttled(served, bucket) -> None:
    bucket.num_throttled = 2
    assert served.post("/generate", body("a1")).status_code == 200  # at the third try
    bucket.num_throttled = 10_000
    answer = served.post("/generate", body("a2"))
    assert answer.status_code == 424 and "S3 answered SlowDown" in answer.text
    others_go_on(served)
    bucket.num_throttled = 0
    wait_for(lambda: served.post("/generate", body("a2")).status_code == 200)
    assert not left_over(served)


@pytest.mark.fault(
    "Buckets", "S3 denies (403 AccessDenied), also for an adapter that is here", "424, the words of an adapter that is not there",
    "other sources and the base do not notice; works again as soon as it is allowed",
)  # fmt: skip
def test_denied(served, bucket) -> None:
    bucket.is_denied = True
    for name in ("a1", "a0"):  # a denial is an answer: what is here may not be used any longer
        answer = served.post("/generate", body(name))
        assert answer.status_code == 424 and "was not found" in answer.text and "AccessDenied" not in answer.text
    assert served.post("/generate", body("local", "local")).status_code == 200 and served.post("/generate", body()).status_code == 200
    bucket.is_denied = False
    wait_for(lambda: served.post("/generate", body("a0")).status_code == 200)


@pytest.mark.fault(
    "Buckets", "S3 answers after seconds, or never", "waits, then 424 (“unavailable”) after the tries of `--source-read-timeout-s`",
    "adapters that are here go on after 2 s at most, then at once; other sources and the base do not notice",
)  # fmt: skip
def test_slow(served, bucket) -> None:
    bucket.delay_s = 30.0
    with ThreadPoolExecutor(8) as pool:
        cold = [pool.submit(served.post, "/generate", body(name)) for name in ("a1", "a2", "a1")]
        begun_at = time.monotonic()
        others_go_on(served)
        assert [one.result(30).status_code for one in cold] == [424] * 3
        assert time.monotonic() - begun_at < 25
    bucket.delay_s = 0.0
    wait_for(lambda: served.post("/generate", body("a1")).status_code == 200, 20)
    assert not left_over(served)


@pytest.mark.fault(
    "Buckets", "S3 sends a byte a second", "424, “it sends less than 16 KiB a second”, after `--source-read-timeout-s`",
    "no thread is held by it; nothing is kept of the half",
)  # fmt: skip
def test_drips(served, bucket) -> None:
    bucket.drip_s = 0.3
    answer = served.post("/generate", body("a1"))
    assert answer.status_code == 424 and "less than 16 KiB a second" in answer.text
    others_go_on(served)
    assert not left_over(served)
    bucket.drip_s = 0.0
    wait_for(lambda: served.post("/generate", body("a1")).status_code == 200)

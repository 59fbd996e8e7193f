"""The S3 source: LoRAX's table of ids, the allow-list, S3's failures as a caller sees them."""

import logging
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from server.errors import AdapterNotFound, AdapterRefused, SourceUnavailable, ValidationFailed
from server.sources import SourceOptions
from server.sources.s3 import S3Source, locate
from tests.server.sources.worlds import BUCKET, S3World, adapter_files


@pytest.mark.parametrize(
    ("adapter_id", "model_bucket", "model_folder", "expected"),
    [  # the first six are LoRAX's own table
        ("s3://loras/foobar", None, None, ("loras", "foobar")),
        ("s3://loras/foo/bar", None, None, ("loras", "foo/bar")),
        ("s3://loras/foo/bar", "bucket", None, ("loras", "foo/bar")),
        ("loras/foobar", None, None, ("loras", "foobar")),
        ("loras/foo/bar", None, None, ("loras", "foo/bar")),
        ("loras/foo/bar", "bucket", None, ("bucket", "loras/foo/bar")),
        ("loras/foo/bar", "bucket", "models", ("bucket", "models/loras/foo/bar")),
        ("sql", "bucket", "/models/v1/", ("bucket", "models/v1/sql")),
        ("s3://loras/foo/bar", "bucket", "models", ("loras", "foo/bar")),
        ("s3://loras/foo/bar/", None, None, ("loras", "foo/bar")),
        ("loras/foo/", "bucket", "", ("bucket", "loras/foo")),
    ],
)
def test_ids_point_where_lorax_says(adapter_id: str, model_bucket: str | None, model_folder: str | None, expected: tuple[str, str]) -> None:
    assert locate(adapter_id, model_bucket, model_folder) == expected


@pytest.mark.parity(
    "2",
    "ids of S3: `s3://bucket/key`, `key`, a slash at the end",
    "better",
    "one adapter; LoRAX keeps each spelling as one more. Answers that succeed name it as asked",
)
@pytest.mark.parametrize(
    ("model_bucket", "model_folder", "spelling", "written"),
    [
        (None, None, "loras/foo", ("loras/foo", "loras/foo/", "s3://loras/foo", "s3://loras/foo/")),
        ("bucket", None, "foo", ("foo", "foo/", "s3://bucket/foo", "s3://bucket/foo/")),
        ("bucket", "/models/v1/", "a/b", ("a/b", "a/b/", "s3://bucket/models/v1/a/b", "s3://bucket/models/v1/a/b/")),
        ("bucket", "models", "s3://bucket/models", ("s3://bucket/models", "s3://bucket/models/")),
        ("bucket", "models", "s3://bucket/other/a", ("s3://bucket/other/a",)),
        ("bucket", None, "s3://loras/foo", ("s3://loras/foo", "s3://loras/foo/")),
    ],
)
def test_every_way_to_write_an_id_is_one_spelling(model_bucket: str | None, model_folder: str | None, spelling: str, written) -> None:
    source = S3Source(SourceOptions(allowed_buckets=("loras",), model_bucket=model_bucket, model_folder=model_folder))
    for adapter_id in (*written, spelling):
        assert source.spelling(adapter_id) == spelling and source.place(adapter_id) == source.place(spelling)


@pytest.mark.parametrize(
    ("adapter_id", "message"),
    [
        ("s3://loras", "Invalid model_id 's3://loras'. model_id should be of the form `s3://bucket_name/model_id`"),
        ("s3://loras/", "Invalid model_id 's3://loras/'. model_id should be of the form `s3://bucket_name/model_id`"),
        ("s3://", "Invalid model_id 's3://'. model_id should be of the form `s3://bucket_name/model_id`"),
        ("foobar", "`bucket_name/model_id` if PREDIBASE_MODEL_BUCKET environment variable is not set"),
        ("/foobar", "`bucket_name/model_id` if PREDIBASE_MODEL_BUCKET environment variable is not set"),
        ("s3://b/x/../../y", "a bucket's name"),
        ("s3://loras/x/../../y", "`..` and names that begin with a dot"),
        ("s3://loras//x", "without empty parts"),
        ("s3://arn:aws:s3:us-east-1:123456789012:accesspoint/x", "a bucket's name"),
        ("S3://loras/x", "a bucket's name"),
    ],
)
def test_ids_that_point_nowhere(adapter_id: str, message: str) -> None:
    with pytest.raises(ValidationFailed) as error:
        locate(adapter_id, None, None)
    assert message in error.value.message
    assert error.value.param == "adapter_id"


def test_only_allowed_buckets_and_prefixes_are_asked(s3: S3World) -> None:
    for bucket in ("other-bucket", "loras-bucket"):
        s3.client.create_bucket(Bucket=bucket)
    for bucket, prefix in (
        ("other-bucket", "sql"),
        ("loras-bucket", "team-a/sql"),
        ("loras-bucket", "team-ab/sql"),
        (BUCKET, "secret/sql"),
    ):
        for name, data in adapter_files().items():
            s3.client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=data)
    source = S3Source(s3.options(allowed_buckets=("loras-bucket/team-a", f"s3://{BUCKET}/adapters/")))
    assert source.snapshot("s3://loras-bucket/team-a/sql").adapter_id == "s3://loras-bucket/team-a/sql"
    for adapter_id in ("s3://other-bucket/sql", "s3://loras-bucket/team-ab/sql", f"s3://{BUCKET}/secret/sql", "s3://loras-bucket/team-a"):
        with pytest.raises(AdapterNotFound):
            source.snapshot(adapter_id)
    assert S3Source(s3.options(allowed_buckets=("other-bucket",))).snapshot("s3://other-bucket/sql").files


def test_equal_keys_of_two_buckets_are_two_adapters(s3: S3World) -> None:
    s3.client.create_bucket(Bucket="other-bucket")
    for bucket in (BUCKET, "other-bucket"):
        for name, data in adapter_files().items():
            s3.client.put_object(Bucket=bucket, Key=f"adapters/sql/{name}", Body=data)
    source = S3Source(s3.options(allowed_buckets=("other-bucket",)))
    assert source.snapshot("sql").adapter_id == source.snapshot(f"s3://{BUCKET}/adapters/sql").adapter_id
    assert source.snapshot("sql").adapter_id != source.snapshot("s3://other-bucket/adapters/sql").adapter_id


def test_only_objects_directly_below_the_key(s3: S3World) -> None:
    nested = {"checkpoint-10/adapter_model.safetensors": b"x", "../evil": b"x", "": b""}
    s3.put("sql", {**adapter_files(), **nested})
    s3.put("sql-2", adapter_files())
    assert S3Source(s3.options()).snapshot("team/sql").names == ("adapter_config.json", "adapter_model.safetensors")


def test_odd_object_names_are_refused(s3: S3World) -> None:
    s3.put("odd", {"adapter_config.json": b"{}", "mö del.safetensors": b"x"})
    with pytest.raises(AdapterRefused, match=r"weights file 'm\\xf6 del.safetensors' must have a name of letters"):
        S3Source(s3.options()).snapshot("team/odd")


def test_long_listings_are_followed_and_bounded(s3: S3World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "5")  # S3's pages have 1000
    s3.put("many", {**adapter_files(), **{f"aaa-{i}.txt": b"" for i in range(20)}})
    source = S3Source(s3.options())
    assert len(source.snapshot("team/many").files) == 2
    monkeypatch.setattr("server.sources.s3.MAX_LISTED", 10)
    with pytest.raises(AdapterRefused, match="more than 10 objects"):
        source.snapshot("team/many")


def test_missing_bucket_is_a_missing_adapter(s3: S3World) -> None:
    with pytest.raises(AdapterNotFound):
        S3Source(s3.options(allowed_buckets=("no-such-bucket",))).snapshot("s3://no-such-bucket/x")


class FakeS3:
    """Answers every request with what `answers` says: (status, error code) or a way to break off."""

    def __init__(self) -> None:
        self.answer: tuple[int, str] = (200, "")
        self.num_requests = 0
        fake = self

        class Answer(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None: ...

            def do_GET(self) -> None:
                fake.num_requests += 1
                status, code = fake.answer
                body = f"<Error><Code>{code}</Code><Message>arn:aws:iam::123:role/secret</Message></Error>".encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.options = SourceOptions(
            s3_endpoint_url=f"http://127.0.0.1:{self.server.server_port}",
            s3_region="us-east-1",
            model_bucket="bucket",
            num_retries=1,
            connect_timeout_s=0.5,
            read_timeout_s=0.5,
        )


@pytest.fixture
def fake() -> Iterator[FakeS3]:
    made = FakeS3()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def test_denied_reads_like_missing_and_is_logged(fake: FakeS3, caplog: pytest.LogCaptureFixture) -> None:
    messages = []
    for fake.answer in ((403, "AccessDenied"), (404, "NoSuchBucket")):
        with pytest.raises(AdapterNotFound) as error:
            S3Source(fake.options).snapshot("team/sql")
        messages.append(error.value.message)
    assert messages[0] == messages[1]
    assert [record.levelno for record in caplog.records if "AccessDenied" in record.getMessage()] == [logging.WARNING]


@pytest.mark.parametrize("answer", [(503, "SlowDown"), (500, "InternalError"), (400, "ExpiredToken"), (403, "InvalidAccessKeyId")])
def test_failing_s3_is_unavailable(fake: FakeS3, answer: tuple[int, str]) -> None:
    fake.answer = answer
    with pytest.raises(SourceUnavailable, match=f"S3 answered {answer[1]}") as error:
        S3Source(fake.options).snapshot("team/sql")
    assert "secret" not in error.value.message
    assert fake.num_requests == (2 if answer[0] >= 500 else 1)  # retried where that can help


def test_silent_s3_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = SourceOptions(
            s3_endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}", s3_region="us-east-1", model_bucket="bucket", num_retries=0,
            read_timeout_s=0.2, connect_timeout_s=0.2,
        )  # fmt: skip
        with pytest.raises(SourceUnavailable, match="ReadTimeoutError"):
            S3Source(options).snapshot("team/sql")


def test_a_broken_transfer_is_started_again(s3: S3World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib3.exceptions import ReadTimeoutError
    from urllib3.response import HTTPResponse

    s3.put("sql", adapter_files())
    source = S3Source(s3.options(num_retries=2))
    snapshot = source.snapshot("team/sql")
    whole, num_broken = HTTPResponse.read1, 0

    def read1(self: HTTPResponse, amt: int | None = None) -> bytes:
        nonlocal num_broken
        if num_broken < 2 and self.tell() == 0:
            num_broken += 1
            whole(self, 10)
            raise ReadTimeoutError(None, "x", "silence")  # type: ignore[arg-type]
        return whole(self, amt)

    monkeypatch.setattr(HTTPResponse, "read1", read1)
    source.fetch(snapshot, tmp_path, progress=None)
    assert {name: (tmp_path / name).read_bytes() for name in snapshot.names} == adapter_files()
    assert num_broken == 2
    num_broken = -99
    with pytest.raises(SourceUnavailable, match="ReadTimeoutError"):
        source.fetch(snapshot, tmp_path)

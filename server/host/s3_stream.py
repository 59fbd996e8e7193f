"""One S3 object as a stream of bytes in order, read ahead over several connections, and as a seekable file.

A single connection to S3 gives about 100 MB/s, a G6 instance's network ten times that. Memory: `READ_AHEAD` ranges of `RANGE_BYTES`. Every
range is read with the object's ETag as a condition, so that a stream is never made of two versions. `origins` uses it.
"""

import io
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

RANGE_BYTES = 8 << 20
READ_AHEAD = 12
_NUM_TRIES = 5
_FIRST_PAUSE_S = 0.5


class S3Object:
    """One version of an object. botocore's errors pass through."""

    def __init__(self, client: Any, bucket: str, key: str) -> None:
        head = client.head_object(Bucket=bucket, Key=key)
        self._client, self._bucket, self._key, self._etag = client, bucket, key, head["ETag"]
        self.size_bytes: int = head["ContentLength"]

    def read(self, start: int, num_bytes: int) -> bytes:
        """The bytes from `start`, fewer at the object's end; tried again when the connection breaks."""
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        end = min(start + num_bytes, self.size_bytes)
        if end <= start:
            return b""
        for num_failed in range(1, _NUM_TRIES + 1):
            try:
                answer = self._client.get_object(
                    Bucket=self._bucket, Key=self._key, IfMatch=self._etag, Range=f"bytes={start}-{end - 1}"
                )  # fmt: skip
                return answer["Body"].read()
            except (HTTPClientError, IncompleteReadError):
                if num_failed == _NUM_TRIES:
                    raise
                time.sleep(_FIRST_PAUSE_S * 2**num_failed)
        raise AssertionError("unreachable")

    def chunks(self) -> Iterator[bytes]:
        """The whole object in order."""
        starts = iter(range(0, self.size_bytes, RANGE_BYTES))
        with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="s3") as pool:
            ahead: deque[Future[bytes]] = deque()
            try:
                for start in starts:
                    ahead.append(pool.submit(self.read, start, RANGE_BYTES))
                    if len(ahead) == READ_AHEAD:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def open(self) -> io.BufferedReader:
        """A file that can be sought, for readers that jump (a zip's directory is at its end)."""
        return io.BufferedReader(_Seekable(self), RANGE_BYTES)


class _Seekable(io.RawIOBase):
    def __init__(self, source: S3Object) -> None:
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size_bytes}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        data = self._source.read(self._at, len(view))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

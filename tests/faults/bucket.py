"""A bucket on loopback that can be made slow, throttled, denied, or drip: S3's two calls that an adapter takes, over real HTTP."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class Bucket:
    """`objects` by key. `num_throttled`: so many requests are answered 503 SlowDown; `drips`: one byte each `drip_s`."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.num_throttled, self.is_denied, self.delay_s, self.drip_s, self.num_requests = 0, False, 0.0, 0.0, 0
        self._lock = threading.Lock()
        self.closing = threading.Event()
        bucket = self

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                bucket._answer(self)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def put(self, folder: Path, prefix: str) -> None:
        """The folder's files as objects."""
        self.objects |= {f"{prefix}/{path.name}": path.read_bytes() for path in folder.iterdir()}

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.num_requests += 1
            is_throttled, self.num_throttled = self.num_throttled > 0, max(0, self.num_throttled - 1)
        self.closing.wait(self.delay_s)
        if is_throttled:
            return self._send(request, 503, _error("SlowDown"))
        if self.is_denied:
            return self._send(request, 403, _error("AccessDenied"))
        parts = urlsplit(request.path)
        key = unquote(parts.path).removeprefix("/bucket").strip("/")
        if not key:
            return self._send(request, 200, self._listing(parse_qs(parts.query).get("prefix", [""])[0]))
        if key not in self.objects:
            return self._send(request, 404, _error("NoSuchKey"))
        self._send(request, 200, self.objects[key], drips=self.drip_s > 0)

    def _listing(self, prefix: str) -> bytes:
        found = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>&quot;{hashlib.md5(data).hexdigest()}&quot;</ETag></Contents>"
            for key, data in sorted(self.objects.items())
            if key.startswith(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode()

    def _send(self, request: BaseHTTPRequestHandler, status: int, body: bytes, *, drips: bool = False) -> None:
        request.send_response(status)
        request.send_header("content-length", str(len(body)))
        request.send_header("etag", f'"{hashlib.md5(body).hexdigest()}"')
        request.end_headers()
        try:
            if not drips:
                request.wfile.write(body)
                return
            for byte in body:
                request.wfile.write(bytes([byte]))
                if self.closing.wait(self.drip_s):
                    return
        except OSError:
            pass  # whoever asked has had enough


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()

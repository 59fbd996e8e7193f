"""What the commands share: a server at a URL, the caller's key, errors that say what to do, and how things are printed.

Owns HTTP as the commands use it, and the exit statuses: 0 done, 1 the server refused or is not there, 2 what cannot be asked for. Knows no
command. The key is sent as a bearer token and, where that is refused, as API Gateway's x-api-key.
"""

import argparse
import json
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn
from urllib.parse import quote

import httpx
from rich.console import Console

SERVER_VARIABLE, KEY_VARIABLE = "MANYLORA_SERVER", "MANYLORA_KEY"
DEFAULT_SERVER = "http://127.0.0.1:3000"
DONE, REFUSED, UNUSABLE = 0, 1, 2
_CONNECT_S = 10.0


class CommandFailed(Exception):
    """The command ends with `status`; the message says why, and what would help."""

    def __init__(self, message: str, status: int = REFUSED) -> None:
        super().__init__(message)
        self.message, self.status = message, status


class _Console(Console):
    """Rich's, without its own end (SystemExit(1)) where nobody reads any more: sizing.printing ends every tool alike."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 - called where BrokenPipeError is caught


class Parser(argparse.ArgumentParser):
    """argparse whose errors are CommandFailed, with whole flags alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        raise CommandFailed(f"{message} (see {self.prog} --help)", UNUSABLE)


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that asks a server."""
    group = parser.add_argument_group("server")
    group.add_argument("--server", metavar="URL", help=f"where it is; else {SERVER_VARIABLE}, else {DEFAULT_SERVER}")
    group.add_argument("--key", help=f"the caller's key; else {KEY_VARIABLE}, which ps does not show")
    group.add_argument("--timeout-s", type=float, default=600.0, metavar="X", help="longest silence of the server (default: 600)")
    group.add_argument("--json", action="store_true", help="print JSON and nothing else")


def run_command(
    parser: Parser, argv: Sequence[str], environ: Mapping[str, str], work: Any, *, consoles: tuple[Console, Console] | None = None
) -> int:
    """Parse, call `work(flags, server, out, err)`, and turn what goes wrong into words on stderr and an exit status."""
    out, err = consoles or (_Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True))
    as_json = "--json" in argv
    try:
        flags = parser.parse_args(list(argv))
        url = flags.server or environ.get(SERVER_VARIABLE) or DEFAULT_SERVER
        with Server(url, flags.key or environ.get(KEY_VARIABLE) or "", timeout_s=flags.timeout_s) as server:
            return int(work(flags, server, out, err) or DONE)
    except CommandFailed as error:
        if as_json:
            print(json.dumps({"error": error.message}), file=sys.stderr)
        else:
            err.print(f"error: {error.message}", style="red", markup=False)
        return error.status
    except KeyboardInterrupt:
        return 130


class Server:
    """A server as its callers see it. A context manager."""

    def __init__(self, url: str, key: str = "", *, timeout_s: float = 600.0) -> None:
        """CommandFailed for what is no URL of a server."""
        self.url = url.rstrip("/")
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL:
            parsed = httpx.URL("")
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query:
            raise CommandFailed(f"--server must be http://HOST:PORT or https://HOST/PREFIX. Given: {url[:200]!r}", UNUSABLE)
        if not key.isascii() or any(char.isspace() for char in key):
            raise CommandFailed("--key must be ASCII without blanks", UNUSABLE)
        self._styles = [{"authorization": f"Bearer {key}"}, {"x-api-key": key}] if key else [{}]
        self.timeout = httpx.Timeout(timeout_s, connect=_CONNECT_S)
        self._client = httpx.Client(base_url=self.url, timeout=self.timeout)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @property
    def headers(self) -> dict[str, str]:
        """What says who calls, in the form that the server takes (once it has taken one)."""
        return self._styles[0]

    def request(self, method: str, path: str, body: Any = None, **params: Any) -> Any:
        """The JSON of an answer. CommandFailed for any other."""
        known = {name: value for name, value in params.items() if value is not None}
        refused: httpx.Response | None = None
        for style in list(self._styles):
            with _explained(self.url):
                answer = self._client.request(method, path, json=body, params=known, headers=style)
            if answer.status_code not in (401, 403):
                if answer.is_success:
                    self._styles = [style]
                    return answer.json()
                raise failure(answer.status_code, answer.text, self.url)
            refused = refused or answer
        assert refused is not None
        raise failure(refused.status_code, refused.text, self.url)

    def settle(self) -> None:
        """Find out in which form the key is taken, with a question that costs nothing; for `headers`."""
        if len(self._styles) > 1:
            self.request("GET", "/v1/models")

    def stream(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer, up to [DONE]."""
        self.settle()
        with _explained(self.url), self._client.stream("POST", path, json=body, headers=self.headers) as answer:
            if not answer.is_success:
                answer.read()
                raise failure(answer.status_code, answer.text, self.url)
            for line in answer.iter_lines():
                event = parse_event(line)
                if event == "[DONE]":
                    return
                if event is not None:
                    yield event
        raise CommandFailed("the stream ended before the answer did; ask again")


class _explained:
    """What goes wrong between us and the server, in words."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            raise CommandFailed(
                f"no server answers at {self._url}. Start one (python -m server --help), or name another with --server or {SERVER_VARIABLE}"
            ) from None
        if isinstance(error, httpx.TimeoutException):
            raise CommandFailed(f"{self._url} did not answer in time; look at its /health, or give it longer with --timeout-s") from None
        if isinstance(error, httpx.TransportError):
            raise CommandFailed(f"the connection to {self._url} broke ({type(error).__name__}); ask again") from None
        if isinstance(error, json.JSONDecodeError):
            raise CommandFailed(f"{self._url} answered what is not JSON: is that a manylora server?") from None


@asynccontextmanager
async def open_async(server: Server, max_connections: int) -> AsyncIterator[httpx.AsyncClient]:
    """A client for many requests at once, with the same key."""
    limits = httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
    async with httpx.AsyncClient(base_url=server.url, headers=server.headers, timeout=server.timeout, limits=limits) as client:
        yield client


def parse_event(line: str) -> Any:
    """What a line of a stream says: an event, "[DONE]", or None for a line that says nothing. CommandFailed for an error in it."""
    if not line.startswith("data:"):
        return None
    data = line.removeprefix("data:").strip()
    if data == "[DONE]":
        return data
    event = json.loads(data)
    if "error" in event:
        raise CommandFailed(_message(event) or "the answer failed")
    return event


def failure(status: int, text: str, url: str) -> CommandFailed:
    """What a refusal says, and what helps."""
    try:
        told = _message(json.loads(text))
    except ValueError:
        told = ""
    if status in (401, 403):
        return CommandFailed(f"{told or 'the caller may not do this'} (HTTP {status}). Show a key with {KEY_VARIABLE} or --key")
    if status == 404 and not told:
        return CommandFailed(f"{url} has no such route (HTTP 404): is that a manylora server, with its prefix?")
    return CommandFailed(told or f"{url} answered HTTP {status}")


def _message(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        return str(error.get("message", ""))
    return str(error) if error else str(body.get("message", "")) if isinstance(body, dict) else ""


def adapter_path(name: str, order: str = "") -> str:
    """The path of a name, which may hold slashes."""
    return f"/v1/adapters/{quote(name, safe='/')}" + (f"/{order}" if order else "")


def print_json(value: Any) -> None:
    """One JSON document on stdout; indented for people."""
    print(json.dumps(value, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False), flush=True)

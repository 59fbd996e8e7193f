"""The deployed endpoint as its callers see it: the URL that the deploy printed, HTTPS with a checked certificate, a key.

Owns the connection: the name leads to the emulator on loopback, everything else is as on AWS. Steps call it, and `load`.
"""

import json
import ssl
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from rehearse.emulator.names import TARGET_HEADER
from rehearse.errors import Differs

_TIMEOUT_S = 120.0


class Endpoint:
    """A context manager. `url`: as printed; `key`: the deployed key's value."""

    def __init__(self, url: str, key: str, *, port: int, certificate: Path) -> None:
        self.url, self.key = url, key
        parts = urlsplit(url)
        self._host, self._prefix = parts.hostname or "", parts.path
        if parts.scheme != "https":
            raise Differs(f"the endpoint's URL is {url}, not https")
        context = ssl.create_default_context(cafile=str(certificate))
        limits = httpx.Limits(max_connections=64)
        self._client = httpx.Client(
            base_url=f"https://127.0.0.1:{port}", verify=context, timeout=_TIMEOUT_S, trust_env=False, limits=limits
        )

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()

    def call(self, method: str, path: str, *, key: str | None = "", body: Any = None) -> httpx.Response:
        """One call, whatever comes back. `key`: "" for the deployed one, None for none."""
        headers = {"host": self._host}
        if key is not None:
            headers["x-api-key"] = key or self.key
        return self._client.request(
            method, self._prefix + path.removeprefix("/"), headers=headers, json=body, extensions={"sni_hostname": self._host}
        )

    def generate(self, prompt: str, *, path: str = "/generate", **parameters: Any) -> httpx.Response:
        """One of the server's native routes."""
        return self.call("POST", path, body={"inputs": prompt, "parameters": parameters})

    def first_and_last(self, prompt: str, **parameters: Any) -> tuple[float, float]:
        """Seconds until the first byte of a streamed answer's body came, and until the last."""
        body = {"inputs": prompt, "parameters": parameters}
        headers, sni = {"host": self._host, "x-api-key": self.key}, {"sni_hostname": self._host}
        started_at, first_s = time.monotonic(), 0.0
        with self._client.stream("POST", self._prefix + "generate_stream", headers=headers, json=body, extensions=sni) as response:
            for _ in response.iter_raw():
                first_s = first_s or time.monotonic() - started_at
        return first_s, time.monotonic() - started_at


def target_of(response: httpx.Response) -> str | None:
    """The instance that answered; None if the gateway did by itself."""
    return response.headers.get(TARGET_HEADER)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a streamed answer."""
    return [json.loads(line.removeprefix("data:")) for line in response.text.splitlines() if line.startswith("data:")]

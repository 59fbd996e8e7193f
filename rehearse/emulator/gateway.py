"""API Gateway's private integration and the load balancer behind it, which MiniStack keeps as records: requests go to registered targets.

The target with the fewest requests in flight is taken, as the target group is configured; nothing is tried twice. The integration's header
mappings are applied (MiniStack leaves them out). The answer is handed on whole, not streamed. `__main__` calls `route_to_targets`.
"""

import asyncio
import collections
import concurrent.futures
import contextvars
import http.client
import json
import threading
import urllib.parse
from collections.abc import Mapping
from typing import Any

from rehearse.emulator.names import TARGET_HEADER, TIMEOUT_S

_MAX_REQUESTS = 64  # at a time
_HOP = {"host", "content-length", "connection", "transfer-encoding"}
_HEADER = "integration.request.header."
_PATH = "integration.request.path."
Answer = tuple[int, dict[str, str], bytes]


class Balancer:
    """Requests in flight by target."""

    def __init__(self, alb: Any) -> None:
        self._alb = alb
        self._in_flight: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def owns(self, host: str | None) -> bool:
        """Whether `host` is a load balancer's name."""
        return any(balancer.get("DNSName") == host for balancer in self._alb._lbs.values())

    def forward(self, method: str, uri: str, headers: dict[str, str], body: bytes) -> Answer:
        """One request to one target: 503 without any, 502 if it broke off."""
        parts = urllib.parse.urlsplit(uri)
        with self._lock:
            targets = self._targets(parts.hostname)
            if not targets:
                return _refuse(503, "no target is registered", "none")
            target = min(targets, key=lambda item: self._in_flight[item["Id"]])
            self._in_flight[target["Id"]] += 1
        connection = http.client.HTTPConnection("127.0.0.1", int(target["Port"]), timeout=TIMEOUT_S)
        try:
            path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            connection.request(method, path, body=body or None, headers=headers | {"host": parts.netloc})
            answer = connection.getresponse()
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
            return answer.status, kept | {TARGET_HEADER: target["Id"]}, answer.read()
        except (OSError, http.client.HTTPException) as error:
            return _refuse(502, f"the target broke off: {type(error).__name__}", target["Id"])
        finally:
            connection.close()
            with self._lock:
                self._in_flight[target["Id"]] -= 1

    def _targets(self, host: str | None) -> list[dict[str, Any]]:
        alb = self._alb
        arns = {arn for arn, balancer in alb._lbs.items() if balancer.get("DNSName") == host}
        groups = {arn for arn, group in alb._tgs.items() if arns & set(group.get("LoadBalancerArns", []))}
        return [target for arn in groups for target in alb._targets.get(arn, [])]


def route_to_targets(apigateway: Any, alb: Any) -> None:
    """Replace MiniStack's HTTP proxy for integrations whose host is a load balancer."""
    others, execute, balancer = apigateway._invoke_http_proxy_v1, apigateway._execute_in_scope, Balancer(alb)
    stage: contextvars.ContextVar[str] = contextvars.ContextVar("stage")
    threads = concurrent.futures.ThreadPoolExecutor(_MAX_REQUESTS, "request")

    async def execute_on_stage(request, api_id, stage_name, *more):  # type: ignore[no-untyped-def]
        stage.set(stage_name)
        return await execute(request, api_id, stage_name, *more)

    async def invoke(integration, path, method, headers, body, query_params, path_params=None):  # type: ignore[no-untyped-def]
        uri = integration.get("uri", "")
        if not balancer.owns(urllib.parse.urlsplit(uri).hostname):
            return await others(integration, path, method, headers, body, query_params, path_params)
        mappings = integration.get("requestParameters") or {}
        for name, source in mappings.items():
            if name.startswith(_PATH):
                value = (path_params or {}).get(source.removeprefix("method.request.path."), "")
                uri = uri.replace("{" + name.removeprefix(_PATH) + "}", urllib.parse.quote(value))
        if query_params:
            uri += "?" + urllib.parse.urlencode(query_params, doseq=True)
        # API Gateway puts the stage before a private integration's path.
        parts = urllib.parse.urlsplit(uri)
        uri = urllib.parse.urlunsplit(parts._replace(path=f"/{stage.get()}{parts.path}"))
        sent = {name: value for name, value in headers.items() if name.lower() not in _HOP | {"accept-encoding"}}
        key_id = _key_id(apigateway, headers)
        for name, source in mappings.items():
            if name.startswith(_HEADER):
                header = name.removeprefix(_HEADER)
                sent = {key: value for key, value in sent.items() if key.lower() != header.lower()}
                sent[header] = source[1:-1] if source.startswith("'") else {"context.identity.apiKeyId": key_id}[source]
        return await asyncio.get_running_loop().run_in_executor(threads, balancer.forward, method, uri, sent, body)

    apigateway._invoke_http_proxy_v1, apigateway._execute_in_scope = invoke, execute_on_stage


def _key_id(apigateway: Any, headers: Mapping[str, str]) -> str:
    given = next((value for name, value in headers.items() if name.lower() == "x-api-key"), None)
    return next((id for id, key in apigateway._api_keys.items() if key.get("value") == given), "")


def _refuse(status: int, message: str, target: str) -> Answer:
    return status, {"Content-Type": "application/json", TARGET_HEADER: target}, json.dumps({"message": message}).encode()

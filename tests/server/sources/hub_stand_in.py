"""A small stand-in for the Hugging Face hub's HTTP API: what `model_info` and `hf_hub_download` ask for, and nothing else.

Repositories have commits, branches, an owner's token and a name that they moved to. Every request is recorded with its token.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """One model repository. `token`: private, readable with it alone. `moved_to`: renamed, answers under that name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    moved_to: str | None = None


@dataclass
class Request:
    """What a client sent."""

    method: str
    path: str
    token: str | None


class HubStandIn:
    """Listens on 127.0.0.1 from `with` to its end."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.fail_with: int | None = None  # answer everything with this status
        self.cut_off_at: int | None = None  # send only so many bytes of a file's body
        stand_in = self

        class Answer(_Answer):
            hub = stand_in

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def endpoint(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubStandIn":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def commit(self, repo_id: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Put a new commit on a branch; its hash."""
        repository = self.repositories.setdefault(repo_id, Repository())
        commit = hashlib.sha1(repr((repo_id, len(repository.commits), sorted(files.items()))).encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.branches[branch] = commit
        return commit


class _Answer(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"
    timeout = 5

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: tests read `requests`."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        path = urlsplit(self.path).path
        self.hub.requests.append(Request(self.command, path, token))
        if self.hub.fail_with is not None:
            return self._send(self.hub.fail_with, b"{}")
        parts = [unquote(part) for part in path.strip("/").split("/")]  # a branch's slash comes as %2F
        if parts[:2] == ["api", "models"] and (len(parts) == 4 or (len(parts) == 6 and parts[4] == "revision")):
            return self._answer_info("/".join(parts[2:4]), parts[5] if len(parts) == 6 else "main", token)
        if len(parts) == 5 and parts[2] == "resolve":
            return self._answer_file("/".join(parts[:2]), parts[3], parts[4], token)
        return self._send(404, b"{}")

    def _find(self, repo_id: str, revision: str, token: str | None) -> tuple[str, str] | None:
        """Repository and commit, or None once an error was sent. Private and missing look alike, as on the hub."""
        repository = self.hub.repositories.get(repo_id)
        if repository is not None and repository.moved_to:
            repo_id, repository = repository.moved_to, self.hub.repositories[repository.moved_to]
        if repository is None or repository.token not in (None, token):
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return None
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return repo_id, commit

    def _answer_info(self, repo_id: str, revision: str, token: str | None) -> None:
        if found := self._find(repo_id, revision, token):
            repo_id, commit = found
            files = self.hub.repositories[repo_id].commits[commit]
            siblings = [{"rfilename": name, "size": len(data), "blobId": _etag(data)} for name, data in files.items()]
            info = {"id": repo_id, "modelId": repo_id, "sha": commit, "tags": [], "siblings": siblings, "private": False}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _answer_file(self, repo_id: str, revision: str, name: str, token: str | None) -> None:
        if found := self._find(repo_id, revision, token):
            repo_id, commit = found
            data = self.hub.repositories[repo_id].commits[commit].get(name)
            if data is None:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return self._send(200, data, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit}, self.hub.cut_off_at)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut_off_at: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut_off_at])
            self.close_connection = self.close_connection or cut_off_at is not None


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()

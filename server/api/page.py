"""/ui: the page that shows what the server does, as files of this package. Off with `--ui false`.

Owns the files, read once, and the headers that keep a browser from running or asking anything else. Knows no data: the page asks the API
like any client, with the key that its user types in. Works behind any prefix, since all its links are relative.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from server.errors import ServerError

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).parent / "ui"
_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
          ".svg": "image/svg+xml"}  # fmt: skip
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked for again each time, answered 304
}


@dataclass(frozen=True)
class PageFile:
    """One file of the page."""

    content: bytes
    media_type: str
    etag: str


class NoSuchFile(ServerError):
    """A file that the page does not have."""

    status = 404
    error_type = "not_found"


@cache
def page_files() -> dict[str, PageFile]:
    """The files by name; nothing else is ever served."""
    found = {path.name: path for path in _FOLDER.iterdir() if path.suffix in _TYPES}
    return {name: _read(path) for name, path in found.items()}


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    return PageFile(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:20]}"')


@router.get("/ui")
async def page(request: Request) -> Response:
    """The page itself."""
    return _answer(request, page_files()["index.html"])


@router.get("/ui/{file:path}")
async def page_file(request: Request, file: str) -> Response:
    """What the page is made of. `/ui/` leads to /ui: the page's links are relative to it."""
    if not file:
        return RedirectResponse("../ui", status_code=308)
    found = page_files().get(file)
    if found is None:
        raise NoSuchFile(f"the page has no file {ascii(file[:80])}")
    return _answer(request, found)


def _answer(request: Request, file: PageFile) -> Response:
    headers = HEADERS | {"etag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)

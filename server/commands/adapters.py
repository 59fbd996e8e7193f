"""`python -m server adapters ORDER ...`: adapters of a running server: put there, listed, published, pinned, rolled back, removed.

Owns the command's flags and what it prints. The orders are the server's (/v1/adapters); a key that may give them is needed.
"""

import argparse
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.table import Table

from server.commands._check import CheckedFolder, check_folder, check_name
from server.commands._client import (
    UNUSABLE,
    CommandFailed,
    Parser,
    Server,
    adapter_path,
    add_server_options,
    print_json,
    run_command,
)
from server.commands._places import choose_place

_PAGE = 1000
_LOOK_S = 0.5


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog="python -m server adapters", description="Adapters of a running server.")
    orders = parser.add_subparsers(dest="order", required=True, metavar="ORDER", parser_class=Parser)

    def add(name: str, words: str, *, named: bool = True) -> argparse.ArgumentParser:
        one = orders.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
        if named:
            one.add_argument("name", metavar="NAME", help="as requests call it")
        return one

    push = add("push", "check a PEFT folder, put it where the server finds it, and publish it", named=False)
    push.add_argument("folder", metavar="FOLDER", type=Path, help="with adapter_config.json and *.safetensors")
    push.add_argument("name", metavar="NAME", nargs="?", help="what requests will call it (default: the folder's name)")
    push.add_argument("--to", metavar="PLACE", help="a folder or s3://bucket/prefix that the server reads (default: what it says)")
    push.add_argument("--check", action="store_true", help="check the folder, and upload nothing")
    publish = add("publish", "give a name what an id of a source holds now")
    publish.add_argument("--source", help="local, s3 or hub (default: the server's own)")
    publish.add_argument("--id", help="where it is in the source (default: NAME)")
    for one in (push, publish):
        one.add_argument("--pin", action="store_true", default=None, help="keep it in memory on every server")
        one.add_argument("--no-replace", action="store_true", help="fail if the name is published already")
    listing = add("list", "what there is, with state, tier, size, hits and pins", named=False)
    listing.add_argument("--search", metavar="TEXT", default="", help="names that contain it")
    add("show", "all that is known of one")
    add("load", "bring it into memory on every server")
    add("unload", "free its memory; the next request loads it again")
    add("pin", "keep it in memory, whatever else is asked for")
    add("unpin", "no longer keep it")
    add("rollback", "let the version before answer again")
    remove = add("rm", "let the name answer no more; its source is left alone")
    remove.add_argument("--release", action="store_true", help="an id of that name in the source answers again")
    remove.add_argument("--yes", action="store_true", help="do not ask")
    for one in orders.choices.values():
        add_server_options(one)
    return parser


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """0 done, 1 the server refused or is not there, 2 what cannot be asked for."""
    return run_command(make_parser(), argv, environ, lambda flags, *rest: _ORDERS[flags.order](flags, *rest))


def _push(flags: argparse.Namespace, server: Server, out: Console, err: Console) -> None:
    name = flags.name or flags.folder.resolve().name
    check_name(name)
    intake = server.request("GET", "/v1/intake")
    with err.status(f"checking {flags.folder}"):
        checked = check_folder(flags.folder, intake)
    if flags.check:
        facts = {"name": name, "hash": checked.hash, "rank": checked.rank, "bytes": checked.num_bytes, "files": list(checked.names)}
        _print(flags, out, facts, f"{flags.folder} can be served: rank {checked.rank}, {_size(checked.num_bytes)}, {checked.hash[:12]}")
        return
    place, _, is_known = choose_place(intake, flags.to)
    where = _upload(place, name, checked, err)
    # An id of a place that the server names is the name itself; of another place it is the whole address.
    source_id = name if is_known or place.source == "local" else where
    body = {"name": name, "source": place.source, "id": source_id}
    row = _publish_body(server, body, flags, err)
    _print(flags, out, row | {"place": where}, f"{name} answers with version {row['version']} ({_size(checked.num_bytes)} at {where})")


def _upload(place: Any, name: str, checked: CheckedFolder, err: Console) -> str:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        bar = progress.add_task(f"upload {name}", total=checked.num_bytes)
        return str(place.put(name, checked.folder, checked.names, lambda num_bytes: progress.advance(bar, num_bytes)))


def _publish(flags: argparse.Namespace, server: Server, out: Console, err: Console) -> None:
    check_name(flags.name)
    body = {"name": flags.name, "source": flags.source, "id": flags.id}
    row = _publish_body(server, {key: value for key, value in body.items() if value is not None}, flags, err)
    _print(flags, out, row, f"{flags.name} answers with version {row['version']}")


def _publish_body(server: Server, body: dict[str, Any], flags: argparse.Namespace, err: Console) -> Any:
    body |= {"replace": not flags.no_replace} | ({"pin": True} if flags.pin else {})
    return _watched(server, body["name"], f"publish {body['name']}", err, lambda: server.request("POST", "/v1/adapters", body))


def _watched(server: Server, name: str, what: str, err: Console, work: Callable[[], Any]) -> Any:
    """The result of `work`, which takes its time, with a bar that shows what the server says of the name meanwhile."""
    if not err.is_terminal:
        return work()
    done = threading.Event()
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=err, transient=True) as progress:
        bar = progress.add_task(what, total=None)

        def look() -> None:
            while not done.wait(_LOOK_S):
                try:
                    row = server.request("GET", adapter_path(name))
                except CommandFailed:
                    continue  # not there yet
                progress.update(bar, description=f"{what}: {row['state']}, {row['tier']}")

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            return work()
        finally:
            done.set()
            watcher.join()


def _list(flags: argparse.Namespace, server: Server, out: Console, err: Console) -> None:
    rows: list[dict[str, Any]] = []
    after = None
    while True:
        page = server.request("GET", "/v1/adapters", after=after, limit=_PAGE)
        rows += page["data"]
        if not page["has_more"] or not page["data"]:
            break
        after = page["data"][-1]["id"]
    rows = [row for row in rows if flags.search.lower() in row["id"].lower()]
    if flags.json:
        print_json(rows)
        return
    has_owners = any(row.get("owner") for row in rows)
    table = Table("name", "version", "state", "tier", "size", "hits", "running", "pin", *(["owner"] if has_owners else []), box=None)
    for row in rows:
        cells = [row["id"], _word(row["version"]), row["state"], row["tier"], _size(row["memory_bytes"] or row["file_bytes"] or 0)]
        cells += [_word(row["hits"]), _word(row["requests"]), "pinned" if row["pinned"] else ""]
        table.add_row(*cells, *([row.get("owner") or "shared"] if has_owners else []))
    out.print(table)
    err.print(f"{len(rows)} adapters", style="dim")


def _show(flags: argparse.Namespace, server: Server, out: Console, err: Console) -> None:
    row = server.request("GET", adapter_path(flags.name))
    _print(flags, out, row, "\n".join(f"{key.replace('_', ' '):14} {_word(value)}" for key, value in row.items() if key != "object"))


def _order(order: str, said: str) -> Callable[..., None]:
    """An order that answers with the adapter's row."""

    def give(flags: argparse.Namespace, server: Server, out: Console, err: Console) -> None:
        row = _watched(server, flags.name, f"{order} {flags.name}", err, lambda: server.request("POST", adapter_path(flags.name, order)))
        _print(flags, out, row, said.format_map(row))

    return give


def _remove(flags: argparse.Namespace, server: Server, out: Console, err: Console) -> None:
    if not flags.yes:
        if not (sys.stdin.isatty() and err.is_terminal):
            raise CommandFailed(f"{flags.name} would answer no more: say --yes where nobody can be asked", UNUSABLE)
        if err.input(f"{flags.name} will answer no more, on every server. Go on? [y/N] ").strip().lower() not in ("y", "yes"):
            raise CommandFailed("nothing was removed")
    answer = server.request("DELETE", adapter_path(flags.name), release="true" if flags.release else None)
    _print(flags, out, answer, f"{flags.name} answers no more")


_ORDERS: dict[str, Callable[..., None]] = {
    "push": _push,
    "publish": _publish,
    "list": _list,
    "show": _show,
    "rm": _remove,
    "load": _order("load", "{id} is in memory ({tier})"),
    "unload": _order("unload", "{id} leaves memory when its last request has ended"),
    "pin": _order("pin", "{id} is pinned"),
    "unpin": _order("unpin", "{id} is no longer pinned"),
    "rollback": _order("rollback", "{id} answers with version {version} again"),
}


def _print(flags: argparse.Namespace, out: Console, value: Any, words: str) -> None:
    if flags.json:
        print_json(value)
    else:
        out.print(words, markup=False)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _word(value: Any) -> str:
    if value is None or value == "" or value == []:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

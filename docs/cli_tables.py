"""Tables of docs/cli.md: the flags of each command, from its own parser."""

import argparse
from collections.abc import Iterator

from server.commands import adapters, bench, chat
from server.commands._client import Parser, add_server_options


def adapter_orders() -> str:
    """Each order with its arguments; the options of the server are a table of their own."""
    parser = adapters.make_parser()
    (orders,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    words = {choice.dest: choice.help for choice in orders._choices_actions}
    rows = ["| `python -m server adapters` | what it does | options |", "|---|---|---|"]
    for name, one in orders.choices.items():
        shown = "; ".join(f"`{_spelled(action)}` {action.help}" for action in _own(one) if action.option_strings)
        arguments = " ".join(_spelled(action) for action in _own(one) if not action.option_strings)
        rows.append(f"| `{name}{f' {arguments}' if arguments else ''}` | {words[name]} | {shown} |")
    return "\n".join(rows)


def chat_flags() -> str:
    """The flags of chat."""
    return _table(_own(chat.make_parser()))


def bench_flags() -> str:
    """The flags of bench."""
    return _table(_own(bench.make_parser()))


def server_flags() -> str:
    """What every command that asks a server takes."""
    parser = Parser()
    add_server_options(parser)
    return _table(action for action in parser._actions if action.dest != "help")


def _table(actions: Iterator[argparse.Action]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| `{_spelled(action)}` | {action.help} |" for action in actions)])


def _own(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """A command's own arguments and options."""
    common = Parser()
    add_server_options(common)
    shared = {action.dest for action in common._actions}
    return (action for action in parser._actions if action.dest not in shared)


def _spelled(action: argparse.Action) -> str:
    """`--flag VALUE`, `ARGUMENT` or `[ARGUMENT]`."""
    value = str(action.metavar or action.dest.upper())
    if not action.option_strings:
        return f"[{value}]" if action.nargs == "?" else value
    return action.option_strings[0] + ("" if action.nargs == 0 else f" {value}")


TABLES = {"cli_adapters": adapter_orders, "cli_chat": chat_flags, "cli_bench": bench_flags, "cli_server": server_flags}

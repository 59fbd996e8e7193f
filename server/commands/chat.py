"""`python -m server chat`: talk to the base or to an adapter; answers are streamed. With a prompt it answers once and ends.

Owns the conversation and its commands (/help lists them). It speaks OpenAI's chat API, as any client would.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from server.commands._client import UNUSABLE, CommandFailed, Parser, Server, add_server_options, print_json, run_command

_HELP = """\
/adapter NAME   answer with this adapter from now on       /adapter   which there are
/base           answer with the base again                 /system TEXT   what it is told first
/clear          forget the conversation                    /quit or Ctrl-D   end; Ctrl-C stops an answer"""
_MAX_LISTED = 40


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog="python -m server chat", description="Talk to the base or to an adapter of a running server.")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="ask this and end; - reads it from standard input")
    parser.add_argument("--adapter", metavar="NAME", default="", help="who answers (default: the base)")
    parser.add_argument("--system", metavar="TEXT", default="", help="what it is told first")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 to 2 (default: 0, greedy)")
    add_server_options(parser)
    return parser


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """0 done, 1 the server refused or is not there, 2 what cannot be asked for."""
    return run_command(make_parser(), argv, environ, _chat)


@dataclass
class Answer:
    """One answer, as it came: text, times in seconds, and what the last event said."""

    text: str = ""
    finish_reason: str | None = None
    first_token_s: float | None = None
    total_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)
    adapter_tier: str | None = None

    @property
    def words(self) -> str:
        """A line of numbers."""
        num = self.usage.get("completion_tokens", 0)
        parts = [f"{num} tokens"]
        if self.first_token_s is not None:
            parts.append(f"first after {self.first_token_s:.2f} s")
            if num > 1 and self.total_s > self.first_token_s:
                parts.append(f"{(num - 1) / (self.total_s - self.first_token_s):.1f} tokens/s")
        if self.adapter_tier is not None:
            parts.append(f"adapter from {self.adapter_tier}")
        if self.finish_reason == "length":
            parts.append("cut off at --max-tokens")
        return ", ".join(parts)


@dataclass
class Conversation:
    """Who answers, and what was said."""

    server: Server
    adapter: str = ""
    system: str = ""
    max_tokens: int = 256
    temperature: float = 0.0
    turns: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str, show: Callable[[str], None]) -> Answer:
        """Add a turn and its answer; `show` gets each piece of it. A turn that fails or is stopped is taken back."""
        told = [{"role": "system", "content": self.system}] if self.system else []
        self.turns.append({"role": "user", "content": text})
        body = {
            "model": self.adapter, "messages": [*told, *self.turns], "max_tokens": self.max_tokens, "temperature": self.temperature,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        try:
            answer = self._stream(body, show)
        except BaseException:
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": answer.text})
        return answer

    def _stream(self, body: dict[str, Any], show: Callable[[str], None]) -> Answer:
        answer, begun_at = Answer(), time.monotonic()
        for event in self.server.stream("/v1/chat/completions", body):
            for choice in event["choices"]:
                if piece := choice["delta"].get("content"):
                    if answer.first_token_s is None:
                        answer.first_token_s = time.monotonic() - begun_at
                    answer.text += piece
                    show(piece)
                answer.finish_reason = choice["finish_reason"] or answer.finish_reason
            if event.get("usage"):
                answer.usage, answer.adapter_tier = event["usage"], event.get("adapter_tier")
        answer.total_s = time.monotonic() - begun_at
        return answer


def _chat(flags: argparse.Namespace, server: Server, out: Console, err: Console) -> None:
    conversation = Conversation(server, flags.adapter, flags.system, flags.max_tokens, flags.temperature)
    prompt = flags.prompt
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = sys.stdin.read()
    if prompt is not None:
        _ask_once(conversation, prompt, flags, err)
    elif flags.json:
        raise CommandFailed("--json needs a PROMPT: a conversation is for people", UNUSABLE)
    else:
        _converse(conversation, err)


def _ask_once(conversation: Conversation, prompt: str, flags: argparse.Namespace, err: Console) -> None:
    if not prompt.strip():
        raise CommandFailed("PROMPT must not be empty", UNUSABLE)
    answer = conversation.ask(prompt, (lambda piece: None) if flags.json else _write)
    if flags.json:
        print_json({"adapter": flags.adapter or None, **vars(answer)})
        return
    _write("\n")
    if err.is_terminal:
        err.print(answer.words, style="dim")


def _converse(conversation: Conversation, err: Console) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401 (input() then has history and editing)
    err.print(_HELP, style="dim", markup=False)
    while True:
        try:
            line = input(f"{conversation.adapter or 'base'}> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            err.print()
            continue
        if line in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/"):
                _command(conversation, line, err)
            elif line:
                answer = conversation.ask(line, _write)
                _write("\n")
                err.print(answer.words, style="dim")
        except CommandFailed as error:
            err.print(f"error: {error.message}", style="red", markup=False)
        except KeyboardInterrupt:
            _write("\n")
            err.print("stopped", style="dim")


def _command(conversation: Conversation, line: str, err: Console) -> None:
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/adapter":
        _choose(conversation, rest, err)
    elif name == "/base":
        conversation.adapter = ""
    elif name == "/system":
        conversation.system = rest
    elif name == "/clear":
        conversation.turns.clear()
    elif name == "/help":
        err.print(_HELP, style="dim", markup=False)
    else:
        raise CommandFailed(f"there is no {name}; /help says what there is")


def _choose(conversation: Conversation, name: str, err: Console) -> None:
    """Another adapter; the conversation goes on with it. Without a name, or with one that there is not: which there are."""
    models = conversation.server.request("GET", "/v1/models")["data"]
    names = [model["id"] for model in models if model["parent"] is not None]
    if name in names:
        conversation.adapter = name
        return
    near = [one for one in names if name.lower() in one.lower()]
    more = f" and {len(near) - _MAX_LISTED} more" if len(near) > _MAX_LISTED else ""
    if name:
        hint = f"; there are {', '.join(near[:_MAX_LISTED])}{more}" if near else f"; /adapter lists the {len(names)} that there are"
        raise CommandFailed(f"there is no adapter {name!r}{hint}")
    err.print(", ".join(near[:_MAX_LISTED]) + more or "there are none yet", markup=False)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

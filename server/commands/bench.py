"""`python -m server bench`: a small load against a running server, and what came of it: requests and tokens a second, and latencies.

Owns the load and its numbers, as a client sees them. It is for a first look at a deployment; comparisons with other engines are in
benchmarks/. Put no load on a server that is not yours.
"""

import argparse
import asyncio
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from server.commands._client import (
    REFUSED,
    UNUSABLE,
    CommandFailed,
    Parser,
    Server,
    add_server_options,
    failure,
    open_async,
    parse_event,
    print_json,
    run_command,
)

_WORDS = ("time", "people", "water", "house", "story", "number", "world", "place", "letter", "school", "family", "country", "music")


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog="python -m server bench", description="A small load against a running server, and what came of it.")
    parser.add_argument("--requests", type=int, default=64, metavar="N", help="to send in all (default: 64)")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="under way at once (default: 8)")
    parser.add_argument(
        "--adapters", metavar="NAMES", default="", help="comma-separated, in turn with the base; all: every one that there is"
    )
    parser.add_argument("--no-base", action="store_true", help="adapters alone")
    parser.add_argument("--prompt-words", type=int, default=64, metavar="N", help="of each prompt; they differ (default: 64)")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of each answer; end tokens do not end it (default: 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts (default: 0)")
    add_server_options(parser)
    return parser


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """0 if every request was answered, 1 if one was not or the server is not there, 2 for what cannot be asked for."""
    return run_command(make_parser(), argv, environ, _bench)


@dataclass
class Sent:
    """One request: times in seconds."""

    model: str
    first_token_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)  # between events with text
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    error: str | None = None


def _bench(flags: argparse.Namespace, server: Server, out: Console, err: Console) -> int:
    for name in ("requests", "concurrency", "prompt_words", "max_tokens"):
        if getattr(flags, name) < 1:
            raise CommandFailed(f"--{name.replace('_', '-')} must be at least 1. Given: {getattr(flags, name)}", UNUSABLE)
    models = _models(flags, server)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        bar = progress.add_task("requests", total=flags.requests)
        begun_at = time.monotonic()
        sent = asyncio.run(_send_all(flags, server, models, lambda: progress.advance(bar)))
        took_s = time.monotonic() - begun_at
    report = summarize(sent, took_s) | {
        "server": server.url, "models": len(models), "concurrency": flags.concurrency, "max_tokens": flags.max_tokens,
    }  # fmt: skip
    if flags.json:
        print_json(report)
    else:
        out.print(_table(report))
        for error, count in report["errors"].items():
            err.print(f"{count} failed: {error}", style="red", markup=False)
    return REFUSED if report["failed"] else 0


def _models(flags: argparse.Namespace, server: Server) -> list[str]:
    """Who is asked, in turn. CommandFailed for a name that there is not."""
    listed = server.request("GET", "/v1/models")["data"]
    base = next(model["id"] for model in listed if model["parent"] is None)
    known = [model["id"] for model in listed if model["parent"] is not None]
    wanted = known if flags.adapters == "all" else [name.strip() for name in flags.adapters.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise CommandFailed(f"--adapters: there is no adapter {unknown[0]!r}; `python -m server adapters list` shows all", UNUSABLE)
    models = wanted if flags.no_base else [base, *wanted]
    if not models:
        raise CommandFailed("--no-base needs --adapters", UNUSABLE)
    return models


async def _send_all(flags: argparse.Namespace, server: Server, models: Sequence[str], on_end: Any) -> list[Sent]:
    rng = random.Random(flags.seed)
    prompts = [" ".join(rng.choices(_WORDS, k=flags.prompt_words)) for _ in range(flags.requests)]
    work = iter(zip(prompts, itertools.cycle(models), strict=False))
    sent: list[Sent] = []

    async def caller(client: httpx.AsyncClient) -> None:
        for prompt, model in work:
            sent.append(await _send(client, server.url, model, prompt, flags.max_tokens))
            on_end()

    async with open_async(server, flags.concurrency) as client:
        await asyncio.gather(*(caller(client) for _ in range(flags.concurrency)))
    return sent


async def _send(client: httpx.AsyncClient, url: str, model: str, prompt: str, max_tokens: int) -> Sent:
    body = {
        "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos_token": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    sent, begun_at = Sent(model), time.monotonic()
    last_at = begun_at
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if not answer.is_success:
                raise failure(answer.status_code, (await answer.aread()).decode(errors="replace"), url)
            async for line in answer.aiter_lines():
                event = parse_event(line)
                if event is None or event == "[DONE]":
                    continue
                now = time.monotonic()
                if event["choices"]:
                    if sent.first_token_s is None:
                        sent.first_token_s = now - begun_at
                    else:
                        sent.gaps_s.append(now - last_at)
                    last_at = now
                if event.get("usage"):
                    sent.num_tokens, sent.num_prompt_tokens = event["usage"]["completion_tokens"], event["usage"]["prompt_tokens"]
        if not sent.num_tokens:
            sent.error = "the stream ended before the answer did"
    except CommandFailed as error:
        sent.error = error.message
    except (httpx.HTTPError, ValueError, KeyError) as error:
        sent.error = f"{type(error).__name__}: {error}"
    return sent


def summarize(sent: Sequence[Sent], took_s: float) -> dict[str, Any]:
    """The report: rates over the whole time, percentiles over the answers. Seconds."""
    answered = [one for one in sent if one.error is None]
    gaps = [gap for one in answered for gap in one.gaps_s]
    first = [one.first_token_s for one in answered if one.first_token_s is not None]
    return {
        "requests": len(sent),
        "failed": len(sent) - len(answered),
        "duration_s": round(took_s, 3),
        "requests_per_s": round(len(answered) / took_s, 3),
        "output_tokens_per_s": round(sum(one.num_tokens for one in answered) / took_s, 2),
        "prompt_tokens_per_s": round(sum(one.num_prompt_tokens for one in answered) / took_s, 2),
        "first_token_s": {"p50": percentile(first, 0.5), "p99": percentile(first, 0.99)},
        "between_tokens_s": {"p50": percentile(gaps, 0.5), "p99": percentile(gaps, 0.99)},
        "errors": dict(Counter(one.error for one in sent if one.error is not None).most_common(5)),
    }


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of all do not exceed (nearest rank); None of none."""
    ordered = sorted(values)
    return round(ordered[max(1, math.ceil(share * len(ordered))) - 1], 5) if ordered else None


def _table(report: Mapping[str, Any]) -> Table:
    table = Table("", "", "p50", "p99", box=None)
    for name, words in (
        ("requests_per_s", "requests/s"),
        ("output_tokens_per_s", "output tokens/s"),
        ("prompt_tokens_per_s", "prompt tokens/s"),
    ):
        table.add_row(words, f"{report[name]:,.2f}")
    for name, words in (("first_token_s", "to first token"), ("between_tokens_s", "between tokens")):
        values = [report[name][share] for share in ("p50", "p99")]
        table.add_row(words, "", *("-" if value is None else f"{value * 1000:,.0f} ms" for value in values))
    table.add_row("requests", f"{report['requests']} in {report['duration_s']:.1f} s, {report['failed']} failed")
    return table

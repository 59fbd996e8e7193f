"""`make demo`: the same prompts at once to the base and to each example adapter, answers streamed side by side into the terminal.

Owns the requests and the picture; `server_process` owns the server. It speaks OpenAI's chat API over HTTP, as any client would.
Exit status 1 if anything failed: the server, a request, or an adapter whose answers are the base's.
"""

import argparse
import asyncio
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import httpx
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from examples.embedded_model import ModelUnavailable, ensure_model
from examples.server_process import ROOT, ServerFailed, ServerProcess, adapter_ids

PROMPTS = [
    "What is the capital of France?",
    "Table hotels(name, city, rooms). How many hotels are there for each city?",
    "Greta Costa bought 12 lamps for 340 dollars.",
]
MAX_TOKENS = 48
COLOURS = ("white", "cyan", "green", "yellow", "magenta")  # of the columns
LOG_PATH = ROOT / ".cache" / "demo-server.log"


@dataclass
class Answer:
    """One stream: what has come so far, and when (monotonic seconds)."""

    model: str
    prompt: str
    text: str = ""
    num_tokens: int = 0
    sent_at: float = 0.0
    first_at: float = 0.0
    last_at: float = 0.0
    done: bool = False
    error: str = ""

    @property
    def first_token_s(self) -> float:
        """From sending the request to its first text, seconds."""
        return self.first_at - self.sent_at

    @property
    def tokens_per_s(self) -> float:
        """Of decoding: tokens after the first, by the time they took. 0 with fewer than two."""
        return (self.num_tokens - 1) / (self.last_at - self.first_at) if self.num_tokens > 1 and self.last_at > self.first_at else 0.0


async def stream_answer(client: httpx.AsyncClient, answer: Answer) -> None:
    """Fill `answer` from a streamed chat completion. A failure of any kind ends up in its `error`."""
    body = {
        "model": answer.model,
        "messages": [{"role": "user", "content": answer.prompt}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer.sent_at = time.monotonic()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise ServerFailed(f"HTTP {response.status_code}: {(await response.aread()).decode(errors='replace')[:200]}")
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    _take_event(answer, line.removeprefix("data:").strip())
        if not answer.done:
            raise ServerFailed("the stream ended without [DONE]")
        if not answer.text.strip():
            raise ServerFailed("the answer is empty")
    except (httpx.HTTPError, ServerFailed, ValueError) as error:
        answer.error = str(error) or type(error).__name__


def _take_event(answer: Answer, data: str) -> None:
    """One server-sent event of OpenAI's stream: text, then the usage, then [DONE]."""
    if data == "[DONE]":
        answer.done = True
        return
    event: dict[str, Any] = json.loads(data)
    if "error" in event:
        raise ServerFailed(str(event["error"]))
    for choice in event.get("choices", []):
        if piece := choice.get("delta", {}).get("content"):
            answer.last_at = time.monotonic()
            answer.first_at = answer.first_at or answer.last_at
            answer.text += piece
    if usage := event.get("usage"):
        answer.num_tokens = usage["completion_tokens"]


def draw_answers(answers: list[Answer], models: list[str]) -> Table:
    """A row for each prompt, a column for each model."""
    table = Table(expand=True, show_lines=True, padding=(0, 1))
    table.add_column("prompt", ratio=3, style="dim")
    for index, model in enumerate(models):
        style = f"bold {COLOURS[index % len(COLOURS)]}"
        table.add_column(model if index else f"{model} (base)", ratio=4, header_style=style)
    for prompt in dict.fromkeys(answer.prompt for answer in answers):
        cells = [Text.assemble(answer.text, "\n", _stats_of(answer)) for answer in answers if answer.prompt == prompt]
        table.add_row(Text(prompt), *cells)
    return table


def _stats_of(answer: Answer) -> tuple[str, str]:
    """A line on an answer, and its style."""
    if answer.error:
        return answer.error, "bold red"
    if not answer.first_at:
        return "waiting", "dim"
    first = f"first token {answer.first_token_s:.2f} s"
    return (f"{first}, {answer.tokens_per_s:.1f} tok/s, {answer.num_tokens} tokens" if answer.done else first), "dim"


async def ask_all(url: str, models: list[str], console: Console, *, plain: bool) -> list[Answer]:
    """All prompts to all models at once. Drawn as a table that fills up, or (`plain`) one answer after the other as they end."""
    answers = [Answer(model, prompt) for prompt in PROMPTS for model in models]
    limits = httpx.Limits(max_connections=len(answers))
    async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(300, connect=10), limits=limits) as client:
        if plain:

            async def ask_and_print(answer: Answer) -> None:
                await stream_answer(client, answer)
                stats, _ = _stats_of(answer)
                console.print(
                    f"\n[{answer.model}] {answer.prompt}\n  {answer.text}\n  ({stats})", markup=False, highlight=False, soft_wrap=True
                )

            await asyncio.gather(*(ask_and_print(answer) for answer in answers))
            return answers
        # transient, and the whole table once at the end: a table that is higher than the terminal cannot be redrawn in place
        with Live(draw_answers(answers, models), console=console, auto_refresh=False, transient=True) as live:
            # drawn ten times a second and not at each token: drawing costs processor time that the server needs
            asking = asyncio.gather(*(stream_answer(client, answer) for answer in answers))
            while not asking.done():
                await asyncio.wait([asking], timeout=0.1)
                live.update(draw_answers(answers, models), refresh=True)
            await asking
        console.print(draw_answers(answers, models))
    return answers


def find_failures(answers: list[Answer], models: list[str]) -> list[str]:
    """What went wrong, a line each. An adapter that answers every prompt as the base does was not applied."""
    failures = [f"{answer.model}, {answer.prompt!r}: {answer.error}" for answer in answers if answer.error]
    texts = {model: [answer.text for answer in answers if answer.model == model] for model in models}
    return failures + [f"{model} answered just as the base did" for model in models[1:] if texts[model] == texts[models[0]]]


def run_demo(console: Console, *, plain: bool) -> int:
    """Start, ask, print, stop. The exit status."""
    with ServerProcess(log_path=LOG_PATH) as server:
        with console.status("starting the server") as status:
            waited_s = server.wait_healthy(lambda so_far_s: status.update(f"starting the server: {so_far_s:.0f} s"))
        console.print(f"server ready after {waited_s:.1f} s at {server.url}", highlight=False)
        models = [server.model_id, *adapter_ids()]
        started_at = time.monotonic()
        answers = asyncio.run(ask_all(server.url, models, console, plain=plain))
        took_s = time.monotonic() - started_at
        failures = find_failures(answers, models)
    num_tokens = sum(answer.num_tokens for answer in answers)
    console.print(
        f"\n{len(answers)} answers of 1 base and {len(models) - 1} adapters at once: {num_tokens} tokens in {took_s:.1f} s, "
        f"{num_tokens / took_s:.1f} tokens/s; server stopped",
        highlight=False,
        soft_wrap=True,
    )
    for failure in failures:
        console.print(f"failed: {failure}", style="bold red", markup=False)
    return 1 if failures else 0


def main() -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description="One base model and its adapters, side by side.")
    parser.add_argument("--plain", action="store_true", help="print answers one after the other, as where there is no terminal")
    console = Console()
    plain = parser.parse_args().plain or not console.is_terminal
    try:
        ensure_model()
        return run_demo(console, plain=plain)
    except (ModelUnavailable, ServerFailed) as error:
        console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

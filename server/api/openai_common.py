"""What /v1/completions and /v1/chat/completions share: who `model` means, sampling wishes, the way to the engine, usage.

Owns no route. OpenAI's meanings where OpenAI has one: temperature 1 by default, stop strings cut off, log probabilities of the model
itself.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.responses import Response

from server.api.adapters import AdapterSelection, ResolvedAdapter
from server.api.generation import Generation, Plan
from server.api.native import lorax_bearer
from server.api.record import Record
from server.api.sampling import Wishes, check_best_of, check_wishes, refuse, to_params
from server.api.schemas_openai import ChatRequest, CompletionRequest
from server.api.state import Api
from server.api.stream import EventStream, event, openai_error
from server.api.text.tokenizer import Tokenizer
from server.api.tools import ToolUse
from server.types import GrammarSpec

Body = CompletionRequest | ChatRequest


@dataclass(frozen=True)
class Prompts:
    """Tokenized prompts with the room that each leaves, and what they are called in errors."""

    ids: Sequence[Sequence[int]]
    texts: Sequence[str]
    max_new_tokens: Sequence[int]
    grammar: GrammarSpec | None = None  # of all answers
    tools: ToolUse | None = None


@dataclass(frozen=True)
class Job:
    """A request on its way."""

    id: str
    created: int
    model: str  # as the request named it
    prompts: Prompts
    tokenizer: Tokenizer
    generation: Generation


def check_common(
    body: Body, api: Api, *, best_of: int | None, num_alternatives: int | None, max_tokens: int | None, names: tuple[str, str]
) -> Wishes:
    """The checked wishes; `names` are what the route calls max_tokens and the number of alternatives."""
    if body.stream_options is not None and not body.stream:
        raise refuse("`stream_options` is only allowed with `stream`", "stream_options")
    check_best_of(body.n, api.settings.max_best_of, name="n")
    check_best_of(best_of, api.settings.max_best_of)
    wishes = Wishes(
        samples_by_default=True, temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, min_p=body.min_p,
        typical_p=body.typical_p, repetition_penalty=body.repetition_penalty, frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty, logit_bias=body.logit_bias, seed=body.seed, seed_with_best_of=True,
        max_new_tokens=max_tokens, max_new_tokens_name=names[0], num_alternatives=num_alternatives, num_alternatives_name=names[1],
        stop=tuple(body.stop), stop_token_ids=tuple(body.stop_token_ids), best_of=best_of,
    )  # fmt: skip
    check_wishes(wishes, api.limits())
    return wishes


def select(body: Body, api: Api, request: Request) -> AdapterSelection | None:
    """The adapter that `model` names, or None for the base."""
    source = api.source(body.adapter_source)
    if body.model in api.model.names:
        return None
    return AdapterSelection(source, body.model, api_token=body.api_token or lorax_bearer(request, api.settings))


@asynccontextmanager
async def prepared(
    request: Request,
    api: Api,
    body: Body,
    record: Record,
    *,
    samples: int,
    num_prompts: int,
    wishes: Wishes,
    tokenize: Callable[[ResolvedAdapter | None], Any],
    num_logprobs: int,
    num_prompt_logprobs: int,
    id_prefix: str,
) -> AsyncIterator[Job]:
    """The checked request admitted, its adapter resolved, its prompts tokenized by `tokenize(adapter)`, on its way to the engine."""
    access = api.access(request)
    selection = access.to_call(select(body, api, request))
    record.chose(selection)
    with api.admitted(access, selection, samples * num_prompts, record) as lease:
        lease.check_output(getattr(body, "max_completion_tokens", None) or body.max_tokens, wishes.max_new_tokens_name)
        adapter = await api.resolve(selection, access)
        record.found(adapter)
        with api.adapters.pinned(adapter):
            prompts: Prompts = await tokenize(adapter)
            tokenizer = api.tokenizer(adapter)
            stop_ids = tuple(id for stop in body.stop if (id := tokenizer.special_id(stop)) is not None)
            eos_ids = () if body.ignore_eos_token else tokenizer.eos_ids
            params = to_params(
                wishes,
                stop_token_ids=(*eos_ids, *stop_ids, *body.stop_token_ids),
                max_new_tokens=prompts.max_new_tokens[0],
                num_logprobs=num_logprobs,
                raw_logprobs=True,
                num_prompt_logprobs=num_prompt_logprobs,
                grammar=prompts.grammar,
            )
            plan = Plan(
                request_id=record.id, prompts=prompts.ids, max_new_tokens=lease.bounded(list(prompts.max_new_tokens)), params=params,
                tokenizer=tokenizer, samples=samples, seed_is_drawn=wishes.seed is None, adapter=adapter, stops=body.stop, keep_stop=False,
                stop_ids=stop_ids,
                **access.share(selection),
                mend=api.mending(selection, adapter),
            )  # fmt: skip
            generation = Generation(plan, api.engine)
            record.submitted(generation, sum(map(len, prompts.texts)))
            api.log_prompts(record, prompts.texts)
            yield Job(f"{id_prefix}-{record.id}", int(time.time()), body.model or api.model.name, prompts, tokenizer, generation)


@asynccontextmanager
async def recorded(record: Record) -> AsyncIterator[None]:
    """Tell the record how it went."""
    with record.failures():
        yield
    record.succeeded()


def event_stream(api: Api, record: Record, events: AsyncGenerator[bytes, None]) -> Response:
    """The events as an answer."""
    settings = api.settings
    return EventStream(
        events,
        dialect=openai_error,
        headers=lambda: record.stream_headers(api.compute_type),
        keep_alive_s=settings.keep_alive_s,
        write_timeout_s=settings.write_timeout_s,
        patience_s=0.0 if settings.lorax_strict else settings.keep_alive_s,
    )


def beginning_of(envelope: dict[str, Any]) -> bytes:
    """A stream's events up to what their list of choices holds. Made once: most events of a stream differ in a few letters of text, and
    to write all of it for each token would take seven times as long."""
    return event(envelope | {"choices": []}).removesuffix(b"]}\n\n")


def usage_of(generation: Generation, *, only_prompt: bool = False) -> dict[str, Any]:
    """OpenAI's `usage`: each prompt once, every sample that was generated. `only_prompt`: nothing that was generated is answered."""
    prompt, completion = generation.num_prompt_tokens, 0 if only_prompt else generation.num_generated_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }


def finish_of(reason: str | None) -> str | None:
    """OpenAI's finish_reason."""
    return None if reason is None else "length" if reason == "length" else "stop"

"""POST /v1/completions: text in, text on, as OpenAI's API has it.

Owns the four shapes of a prompt, echo, best_of and the legacy form of log probabilities.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.adapters import ResolvedAdapter
from server.api.body import body_docs, read_body, stream_docs
from server.api.generation import fit
from server.api.openai_common import Job, Prompts, beginning_of, check_common, event_stream, finish_of, prepared, recorded, usage_of
from server.api.record import Record
from server.api.render_native import with_chosen
from server.api.sampling import Wishes, refuse
from server.api.schemas_openai import OPENAI_ERRORS, CompletionChunk, CompletionRequest, CompletionResponse
from server.api.sequence import TextSequence, Token
from server.api.state import Api, ApiState
from server.api.stream import DONE, dump, event, json_response, unless_gone
from server.api.structured import chosen_grammar
from server.api.text.tokenizer import Tokenizer
from server.types import GrammarSpec, Logprob

router = APIRouter(tags=["openai"])
DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 256
# An event with text alone, as json would write it: the stream's beginning, index, text.
_TEXT_EVENT = b'%b{"index":%d,"text":%b,"logprobs":null,"finish_reason":null}]}\n\n'
_RESPONSES = OPENAI_ERRORS | {200: stream_docs(CompletionChunk, "With `stream`: one event a piece, the last one is [DONE].")}


@router.post("/v1/completions", response_model=CompletionResponse, responses=_RESPONSES, openapi_extra=body_docs(CompletionRequest))
async def completions(request: Request, api: ApiState) -> Response:
    """Go on with a prompt, or with several."""
    settings, record = api.settings, api.record(request)
    with record.failures():
        api.admission.check()
        body = await read_body(request, CompletionRequest, max_bytes=settings.max_body_bytes, ignore_unknown=settings.lorax_strict)
    if body.stream:
        return event_stream(api, record, _events(request, api, body, record))

    async def work() -> Response:
        async with recorded(record), _prepared(request, api, body, record) as job:
            await job.generation.run()
            chosen = job.generation.best(body.n or 1)
            choices = [_choice(body, job, sequence, index) for index, sequence in enumerate(chosen)]
            answer = _envelope(job) | {"choices": choices, "usage": usage_of(job.generation, only_prompt=_only_echo(body))}
            return json_response(answer, headers=record.headers(api.compute_type))

    return await unless_gone(request, work())


async def _events(request: Request, api: Api, body: CompletionRequest, record: Record) -> AsyncGenerator[bytes, None]:
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    async with recorded(record), _prepared(request, api, body, record) as job, aclosing(job.generation.tokens()) as tokens:
        envelope = _envelope(job) | ({"usage": None} if with_usage else {})
        beginning, shown = beginning_of(envelope), dict[int, int]()
        async for sequence, token in tokens:
            first = sequence.index not in shown
            offset = shown.get(sequence.index, 0)
            text = (_echoed(body, job, sequence) if first else "") + ("" if _only_echo(body) else token.text)
            shown[sequence.index] = offset + len(text)
            if sequence.finish_reason is None and body.logprobs is None:
                if text:
                    yield _TEXT_EVENT % (beginning, sequence.index, dump(text))
                continue
            logprobs = None
            if body.logprobs is not None:
                prompt_logprobs = sequence.prompt_logprobs if first and body.echo else None
                logprobs = logprobs_of(job.tokenizer, prompt_logprobs, [] if _only_echo(body) else [token], offset)
            choice = {"index": sequence.index, "text": text, "logprobs": logprobs, "finish_reason": _finish(body, sequence)}
            yield event(envelope | {"choices": [choice]})
        if with_usage:
            usage = usage_of(job.generation, only_prompt=_only_echo(body))
            yield event(envelope | {"choices": [], "usage": usage, "adapter_tier": record.adapter_tier})
        yield DONE


def _prepared(request: Request, api: Api, body: CompletionRequest, record: Record) -> Any:
    """Everything up to the engine; raises ServerError for what is wrong."""
    only_echo = _only_echo(body)
    best_of = body.best_of
    if best_of is not None and best_of < (body.n or 1):
        raise refuse(f"`best_of` must be >= `n`. Given: {best_of} and {body.n or 1}", "best_of")
    if body.stream and best_of is not None and best_of > (body.n or 1):
        raise refuse("`best_of` > `n` is not supported when streaming tokens", "best_of")
    max_tokens = 1 if only_echo else DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    wishes = check_common(
        body, api, best_of=best_of, num_alternatives=body.logprobs, max_tokens=max_tokens, names=("max_tokens", "logprobs")
    )
    samples = max(best_of or 1, body.n or 1)
    prompts = _prompts(body.prompt)
    if len(prompts) > MAX_PROMPTS:
        raise refuse(f"`prompt` takes up to {MAX_PROMPTS} prompts. Given: {len(prompts)}", "prompt")
    grammar = chosen_grammar(body.response_format, body.structured_outputs)
    needs_logprobs = body.logprobs is not None or samples > (body.n or 1)
    return prepared(
        request, api, body, record, samples=samples, num_prompts=len(prompts), wishes=wishes,
        tokenize=partial(_tokenize, api, prompts, wishes, bool(body.echo), grammar),
        num_logprobs=(body.logprobs or 0) if needs_logprobs else -1,
        num_prompt_logprobs=body.logprobs if body.logprobs is not None and body.echo else -1, id_prefix="cmpl",
    )  # fmt: skip


def _only_echo(body: CompletionRequest) -> bool:
    """max_tokens 0 with echo: score the prompt. The engine makes at least one token, which is not shown."""
    return body.max_tokens == 0 and bool(body.echo)


def _prompts(prompt: Any) -> list[Any]:
    """One entry a prompt: a text, or its token ids."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


async def _tokenize(
    api: Api, prompts: Sequence[Any], wishes: Wishes, echo: bool, grammar: GrammarSpec | None, adapter: ResolvedAdapter | None
) -> Prompts:
    """Texts in one go; token ids are looked at, and decoded for the echo, once they are known to be few enough."""
    tokenizer, limits = api.tokenizer(adapter), api.limits()
    are_texts = isinstance(prompts[0], str)
    ids = await api.encode_all(tokenizer, prompts, prompt_name="prompt") if are_texts else prompts
    rooms = [fit(prompt, wishes.max_new_tokens, limits, prompt_name="prompt", max_name="max_tokens") for prompt in ids]
    wrong = None if are_texts else next((id for prompt in ids for id in prompt if not 0 <= id < tokenizer.num_ids), None)
    if wrong is not None:
        raise refuse(f"`prompt` token ids must be from 0 to {tokenizer.num_ids - 1}. Given: {str(wrong)[:32]}", "prompt")
    if are_texts or not echo:
        return Prompts(ids, prompts if are_texts else [""] * len(ids), rooms, grammar)
    return Prompts(ids, [tokenizer.decode(prompt, skip_special_tokens=False) for prompt in ids], rooms, grammar)


def _envelope(job: Job) -> dict[str, Any]:
    return {"id": job.id, "object": "text_completion", "created": job.created, "model": job.model}


def _echoed(body: CompletionRequest, job: Job, sequence: TextSequence) -> str:
    return job.prompts.texts[sequence.index // job.generation.plan.samples] if body.echo else ""


def _choice(body: CompletionRequest, job: Job, sequence: TextSequence, index: int) -> dict[str, Any]:
    only_echo = _only_echo(body)
    logprobs = None
    if body.logprobs is not None:
        prompt_logprobs = sequence.prompt_logprobs if body.echo else None
        logprobs = logprobs_of(job.tokenizer, prompt_logprobs, [] if only_echo else sequence.tokens, 0)
    return {
        "index": index,
        "text": _echoed(body, job, sequence) + ("" if only_echo else sequence.text),
        "logprobs": logprobs,
        "finish_reason": _finish(body, sequence),
    }


def _finish(body: CompletionRequest, sequence: TextSequence) -> str | None:
    """Of a scored prompt always "length": why the token that is not shown was the last says nothing."""
    return "length" if _only_echo(body) and sequence.finish_reason is not None else finish_of(sequence.finish_reason)


def logprobs_of(tokenizer: Tokenizer, prompt: Sequence[Logprob] | None, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """OpenAI's legacy log probabilities, of the prompt (with echo) and the generated tokens. `offset`: characters before the first."""
    entries: list[Logprob | None] = [*(prompt or []), *(token.logprob for token in tokens)]
    texts = [tokenizer.token_text(entry.token_id) for entry in prompt or []] + [token.spelled for token in tokens]
    lengths = [len(text) for text in texts[: len(prompt or [])]] + [len(token.text) for token in tokens]
    offsets = []
    for length in lengths:
        offsets.append(offset)
        offset += length
    return {
        "tokens": texts,
        "token_logprobs": [finite(entry.logprob) if entry is not None else None for entry in entries],
        "top_logprobs": [
            {tokenizer.token_text(id): finite(value) for id, value in reversed(with_chosen(entry))}
            if entry is not None and entry.logprob is not None
            else None
            for entry in entries
        ],
        "text_offset": offsets,
    }


def finite(value: float | None) -> float | None:
    """JSON has no minus infinity."""
    return None if value is None else max(value, -9999.0)

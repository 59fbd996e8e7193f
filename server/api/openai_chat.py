"""POST /v1/chat/completions: messages in, the assistant's turn out, as OpenAI's API has it.

Owns the messages' way through the chat template and the chat form of log probabilities. An adapter that brings a template is asked
with its own.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.adapters import ResolvedAdapter
from server.api.body import body_docs, read_body
from server.api.generation import fit
from server.api.openai_common import Job, Prompts, check_common, event_stream, finish_of, prepared, recorded, usage_of
from server.api.openai_completions import finite
from server.api.record import Record
from server.api.sampling import Wishes, refuse
from server.api.schemas_openai import ChatRequest, ChatResponse, Message, OpenAIError
from server.api.sequence import TextSequence, Token
from server.api.state import Api, ApiState
from server.api.stream import DONE, event, json_response, unless_gone
from server.api.text.tokenizer import Tokenizer

router = APIRouter(tags=["openai"])
_ERRORS: dict[int | str, Any] = {status: {"model": OpenAIError} for status in (400, 404, 413, 415, 424, 429, 500, 503)}
_RESERVED = ("messages", "bos_token", "eos_token", "tools", "documents", "add_generation_prompt")


@router.post("/v1/chat/completions", response_model=ChatResponse, responses=_ERRORS, openapi_extra=body_docs(ChatRequest))
async def chat(request: Request, api: ApiState) -> Response:
    """Answer a chat."""
    settings, record = api.settings, Record(api.metrics, request.url.path, api.model.name)
    with record.failures():
        api.admission.check()
        body = await read_body(request, ChatRequest, max_bytes=settings.max_body_bytes, ignore_unknown=settings.lorax_strict)
    if body.stream:
        return event_stream(api, record, _events(request, api, body, record))

    async def work() -> Response:
        async with recorded(record), _prepared(request, api, body, record) as job:
            await job.generation.run()
            choices = [_choice(body, job, sequence) for sequence in job.generation.sequences]
            answer = _envelope(job, "chat.completion") | {"choices": choices, "usage": usage_of(job.generation)}
            return json_response(answer, headers=record.headers(api.compute_type))

    return await unless_gone(request, work())


async def _events(request: Request, api: Api, body: ChatRequest, record: Record) -> AsyncGenerator[bytes, None]:
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    async with recorded(record), _prepared(request, api, body, record) as job, aclosing(job.generation.tokens()) as tokens:
        envelope = _envelope(job, "chat.completion.chunk") | ({"usage": None} if with_usage else {})

        def chunk(sequence: TextSequence, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> bytes:
            return event(envelope | {"choices": [{"index": sequence.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]})

        greeted: set[int] = set()
        async for sequence, token in tokens:
            if sequence.index not in greeted:
                greeted.add(sequence.index)
                yield chunk(sequence, {"role": "assistant", "content": ""})
            if token.text or body.logprobs:
                logprobs = {"content": logprobs_of(job.tokenizer, [token], body.top_logprobs or 0)} if body.logprobs else None
                yield chunk(sequence, {"content": token.text}, logprobs)
            if sequence.finish_reason is not None:
                yield chunk(sequence, {}, finish=finish_of(sequence.finish_reason))
        if with_usage:
            yield event(envelope | {"choices": [], "usage": usage_of(job.generation)})
        yield DONE


def _prepared(request: Request, api: Api, body: ChatRequest, record: Record) -> Any:
    """Everything up to the engine; raises ServerError for what is wrong."""
    if body.max_tokens is not None and body.max_completion_tokens is not None and body.max_tokens != body.max_completion_tokens:
        raise refuse("at most one of `max_tokens` and `max_completion_tokens` may be given", "max_completion_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise refuse("`top_logprobs` needs `logprobs`: true", "top_logprobs")
    for name in body.chat_template_kwargs or {}:
        if name in _RESERVED:
            raise refuse(f"`chat_template_kwargs` may not set {', '.join(_RESERVED)}. Given: {name}", "chat_template_kwargs")
    max_name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    wishes = check_common(
        body, api, best_of=None, num_alternatives=body.top_logprobs, max_tokens=max_tokens, names=(max_name, "top_logprobs")
    )
    return prepared(
        request, api, body, record, samples=body.n or 1, num_prompts=1, wishes=wishes,
        tokenize=partial(_tokenize, api, body, wishes), num_logprobs=(body.top_logprobs or 0) if body.logprobs else -1,
        num_prompt_logprobs=-1, id_prefix="chatcmpl",
    )  # fmt: skip


async def _tokenize(api: Api, body: ChatRequest, wishes: Wishes, adapter: ResolvedAdapter | None) -> Prompts:
    variables = {**(body.chat_template_kwargs or {}), "add_generation_prompt": body.add_generation_prompt}
    text = await api.render_chat(adapter, [_message(message) for message in body.messages], variables)
    ids = await api.encode(api.tokenizer(adapter), text, prompt_name="messages", add_special_tokens=False)
    room = fit(ids, wishes.max_new_tokens, api.limits(), prompt_name="messages", max_name=wishes.max_new_tokens_name)
    return Prompts([ids], [text], [room])


def _message(message: Message) -> dict[str, Any]:
    """A message as templates know it."""
    more = {"name": message.name, "tool_call_id": message.tool_call_id}
    return {"role": message.role, "content": message.text or "", **{key: value for key, value in more.items() if value is not None}}


def _envelope(job: Job, kind: str) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": job.model}


def _choice(body: ChatRequest, job: Job, sequence: TextSequence) -> dict[str, Any]:
    logprobs = {"content": logprobs_of(job.tokenizer, sequence.tokens, body.top_logprobs or 0)} if body.logprobs else None
    return {
        "index": sequence.index,
        "message": {"role": "assistant", "content": sequence.text},
        "logprobs": logprobs,
        "finish_reason": finish_of(sequence.finish_reason),
    }


def logprobs_of(tokenizer: Tokenizer, tokens: Sequence[Token], num_top: int) -> list[dict[str, Any]]:
    """OpenAI's log probabilities of a chat; `bytes` join to the text where a character spans tokens."""

    def entry(id: int, value: float | None) -> dict[str, Any]:
        raw = tokenizer.token_bytes(id)
        return {"token": raw.decode("utf-8", errors="replace"), "logprob": finite(value), "bytes": list(raw)}

    return [
        entry(token.id, token.logprob.logprob if token.logprob is not None else None)
        | {"top_logprobs": [entry(id, value) for id, value in (token.logprob.top if token.logprob is not None else [])[:num_top]]}
        for token in tokens
    ]

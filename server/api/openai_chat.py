"""POST /v1/chat/completions: messages in, the assistant's turn out, as OpenAI's API has it.

Owns the messages' way through the chat template, the turn's way back and the chat form of log probabilities. An adapter that brings a
template is asked with its own. What tools mean is api.tools'.
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
from server.api.openai_completions import finite
from server.api.record import Record
from server.api.sampling import Wishes, refuse
from server.api.schemas_openai import OPENAI_ERRORS, ChatChunk, ChatRequest, ChatResponse
from server.api.sequence import TextSequence, Token
from server.api.state import Api, ApiState
from server.api.stream import DONE, dump, event, json_response, unless_gone
from server.api.structured import chosen_grammar
from server.api.text.tokenizer import Tokenizer
from server.api.tools import Answer, ToolUse, check_tools, template_messages, template_tools, use_tools
from server.types import GrammarSpec

router = APIRouter(tags=["openai"])
_RESPONSES = OPENAI_ERRORS | {200: stream_docs(ChatChunk, "With `stream`: one event a piece, the last one is [DONE].")}
# An event with text alone, as json would write it: the stream's beginning, index, text.
_TEXT_EVENT = b'%b{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}]}\n\n'
_RESERVED = ("messages", "bos_token", "eos_token", "tools", "documents", "guideline", "add_generation_prompt")


@router.post("/v1/chat/completions", response_model=ChatResponse, responses=_RESPONSES, openapi_extra=body_docs(ChatRequest))
async def chat(request: Request, api: ApiState) -> Response:
    """Answer a chat."""
    settings, record = api.settings, api.record(request)
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
        beginning = beginning_of(envelope)

        def chunk(sequence: TextSequence, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> bytes:
            if logprobs is None and finish is None and list(delta) == ["content"]:
                return _TEXT_EVENT % (beginning, sequence.index, dump(delta["content"]))
            return event(envelope | {"choices": [{"index": sequence.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]})

        turns: dict[int, _Turn] = {}
        async for sequence, token in tokens:
            if sequence.index not in turns:
                turns[sequence.index] = _Turn(job.prompts.tools)
                yield chunk(sequence, {"role": "assistant", "content": turns[sequence.index].first_content})
            turn = turns[sequence.index]
            deltas = turn.add(token, last=sequence.finish_reason is not None)
            logprobs = {"content": logprobs_of(job.tokenizer, [token], body.top_logprobs or 0)} if body.logprobs else None
            if logprobs and not deltas:
                deltas = [{"content": ""}]
            for delta in deltas:
                yield chunk(sequence, delta, logprobs)
                logprobs = None  # once a token
            if sequence.finish_reason is not None:
                yield chunk(sequence, {}, finish=turn.finish_of(sequence))
        if with_usage:
            yield event(envelope | {"choices": [], "usage": usage_of(job.generation), "adapter_tier": record.adapter_tier})
        yield DONE


class _Turn:
    """One sequence as the assistant's turn: plain text, or read for calls of tools."""

    def __init__(self, use: ToolUse | None) -> None:
        self._use = use
        self._reader = use.reader() if use is not None else None
        self._answer = Answer(use) if use is not None else None

    @property
    def first_content(self) -> str | None:
        """Of a stream's first chunk: None where nothing but calls can follow."""
        return None if self._use is not None and self._use.forced else ""

    def add(self, token: Token, *, last: bool) -> list[dict[str, Any]]:
        """What the token adds, as a stream's deltas."""
        if self._use is None or self._reader is None or self._answer is None:
            return [{"content": token.text}] if token.text else []
        pieces = self._reader.feed(self._use.text_of(token)) + (self._reader.finish() if last else [])
        return [self._answer.add(piece) for piece in pieces]

    def message(self, sequence: TextSequence) -> dict[str, Any]:
        """The whole turn, of a finished sequence none of whose tokens was added yet."""
        if self._answer is None:
            return {"role": "assistant", "content": sequence.text}
        for position, token in enumerate(sequence.tokens):
            self.add(token, last=position == len(sequence.tokens) - 1)
        return self._answer.message()

    def finish_of(self, sequence: TextSequence) -> str | None:
        """OpenAI's finish_reason: "tool_calls" only if the last call is complete."""
        reason = finish_of(sequence.finish_reason)
        return "tool_calls" if reason == "stop" and self._reader is not None and self._reader.num_calls > 0 else reason


def _prepared(request: Request, api: Api, body: ChatRequest, record: Record) -> Any:
    """Everything up to the engine; raises ServerError for what is wrong."""
    if body.max_tokens is not None and body.max_completion_tokens is not None and body.max_tokens != body.max_completion_tokens:
        raise refuse("at most one of `max_tokens` and `max_completion_tokens` may be given", "max_completion_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise refuse("`top_logprobs` needs `logprobs`: true", "top_logprobs")
    for name in body.chat_template_kwargs or {}:
        if name in _RESERVED:
            raise refuse(f"`chat_template_kwargs` may not set {', '.join(_RESERVED)}. Given: {name}", "chat_template_kwargs")
    check_tools(body)
    grammar = chosen_grammar(body.response_format, body.structured_outputs)
    max_name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    wishes = check_common(
        body, api, best_of=None, num_alternatives=body.top_logprobs, max_tokens=max_tokens, names=(max_name, "top_logprobs")
    )
    return prepared(
        request, api, body, record, samples=body.n or 1, num_prompts=1, wishes=wishes,
        tokenize=partial(_tokenize, api, body, wishes, grammar), num_logprobs=(body.top_logprobs or 0) if body.logprobs else -1,
        num_prompt_logprobs=-1, id_prefix="chatcmpl",
    )  # fmt: skip


async def _tokenize(api: Api, body: ChatRequest, wishes: Wishes, grammar: GrammarSpec | None, adapter: ResolvedAdapter | None) -> Prompts:
    tokenizer = api.tokenizer(adapter)
    use, template = use_tools(body, tokenizer, api.settings.tool_call_format, api.limits().vocab_size), tokenizer.chat_template or ""
    variables = {
        **(body.chat_template_kwargs or {}),
        "add_generation_prompt": body.add_generation_prompt,
        "tools": template_tools(use, template),
        **({"guideline": body.guideline} if body.guideline is not None else {}),
    }
    text = await api.render_chat(adapter, template_messages(body.messages, use, template), variables)
    ids = await api.encode(tokenizer, text, prompt_name="messages", add_special_tokens=False)
    room = fit(ids, wishes.max_new_tokens, api.limits(), prompt_name="messages", max_name=wishes.max_new_tokens_name)
    return Prompts([ids], [text], [room], use.grammar if use is not None else grammar, use)


def _envelope(job: Job, kind: str) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": job.model}


def _choice(body: ChatRequest, job: Job, sequence: TextSequence) -> dict[str, Any]:
    logprobs = {"content": logprobs_of(job.tokenizer, sequence.tokens, body.top_logprobs or 0)} if body.logprobs else None
    turn = _Turn(job.prompts.tools)
    return {
        "index": sequence.index,
        "message": turn.message(sequence),
        "logprobs": logprobs,
        "finish_reason": turn.finish_of(sequence),
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

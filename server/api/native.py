"""LoRAX's generating routes: /generate, /generate_stream, and / (SageMaker: /invocations) for both.

Owns what a native request means: LoRAX's order of checks, its defaults, its answers. The way to the engine is api.generation's.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.adapters.merge import check_merge
from server.api.adapters import AdapterSelection, Merge, ResolvedAdapter
from server.api.body import body_docs, read_body, stream_docs
from server.api.generation import Generation, Plan, fit
from server.api.record import Record
from server.api.render_native import details_of, running_event, stream_event
from server.api.sampling import Wishes, check_best_of, check_wishes, refuse, to_params
from server.api.schemas_native import ERRORS, GenerateParameters, GenerateRequest, GenerateResponse, StreamEvent
from server.api.state import Api, ApiState
from server.api.stream import EventStream, event, json_response, native_error, unless_gone
from server.api.structured import chosen_grammar
from server.api.tenants.limits import Lease
from server.api.text.tokenizer import Tokenizer
from server.settings import Settings

router = APIRouter(tags=["native"])
_EVENTS = stream_docs(StreamEvent, "One event a token; an error is an event too, with LoRAX's error as its data.")


@dataclass(frozen=True)
class _Job:
    """A native request with what was found out about it."""

    prompt: str
    parameters: GenerateParameters
    generation: Generation
    tokenizer: Tokenizer
    samples: bool


@router.post("/generate", response_model=GenerateResponse, responses=ERRORS, openapi_extra=body_docs(GenerateRequest))
async def generate(request: Request, api: ApiState) -> Response:
    """Generate, and answer when it is done."""
    record = api.record(request)
    return await _answer(request, api, await _read(request, api, record), record, as_list=False)


@router.post("/generate_stream", response_model=None, responses=ERRORS | {200: _EVENTS}, openapi_extra=body_docs(GenerateRequest))
async def generate_stream(request: Request, api: ApiState) -> Response:
    """Generate, and send each token as a server-sent event."""
    record = api.record(request)
    return _stream(request, api, await _read(request, api, record), record)


@router.post(
    "/invocations",
    summary="SageMaker's name of /",
    response_model=list[GenerateResponse],
    responses=ERRORS | {200: _EVENTS},
    openapi_extra=body_docs(GenerateRequest),
)
@router.post("/", response_model=list[GenerateResponse], responses=ERRORS | {200: _EVENTS}, openapi_extra=body_docs(GenerateRequest))
async def generate_compat(request: Request, api: ApiState) -> Response:
    """/generate_stream if `stream` is true, else /generate with the answer in a list of one."""
    record = api.record(request)
    body = await _read(request, api, record)
    return _stream(request, api, body, record) if body.stream else await _answer(request, api, body, record, as_list=True)


async def _read(request: Request, api: Api, record: Record) -> GenerateRequest:
    settings = api.settings
    with record.failures():
        if not settings.lorax_strict:  # LoRAX reads the body first, and says of a stream that it is overloaded in an event
            api.admission.check()
        return await read_body(request, GenerateRequest, max_bytes=settings.max_body_bytes, ignore_unknown=settings.lorax_strict)


async def _answer(request: Request, api: Api, body: GenerateRequest, record: Record, *, as_list: bool) -> Response:
    async def work() -> Response:
        async with _prepared(request, api, body, record, stream=False) as job:
            await job.generation.run()
            best, *rest = sorted(job.generation.sequences, key=lambda sequence: -sequence.mean_logprob)
            parameters = job.parameters
            answer: dict[str, Any] = {"generated_text": (job.prompt if parameters.return_full_text else "") + best.text}
            if parameters.details or parameters.decoder_input_details:
                answer["details"] = details_of(
                    job.generation, best, rest, job.tokenizer, samples=job.samples,
                    num_alternatives=parameters.return_k_alternatives or 0, show_prompt=parameters.decoder_input_details,
                    length_first=api.settings.lorax_strict,
                )  # fmt: skip
            record.succeeded()
            return json_response([answer] if as_list else answer, headers=record.headers(api.compute_type))

    return await unless_gone(request, work())


def _stream(request: Request, api: Api, body: GenerateRequest, record: Record) -> Response:
    async def events() -> AsyncGenerator[bytes, None]:
        async with _prepared(request, api, body, record, stream=True) as job:
            async with aclosing(job.generation.tokens()) as tokens:
                async for sequence, token in tokens:
                    if sequence.finish_reason is None and not job.parameters.return_k_alternatives:
                        yield running_event(token)
                        continue
                    yield event(
                        stream_event(
                            job.generation, sequence, token, job.tokenizer,
                            parameters=job.parameters, samples=job.samples, prompt=job.prompt, length_first=api.settings.lorax_strict,
                        )
                    )  # fmt: skip
            record.succeeded()

    return EventStream(
        events(),
        dialect=native_error,
        headers=lambda: record.stream_headers(api.compute_type),
        keep_alive_s=api.settings.keep_alive_s,
        write_timeout_s=api.settings.write_timeout_s,
        patience_s=0.0 if api.settings.lorax_strict else api.settings.keep_alive_s,
    )


@asynccontextmanager
async def _prepared(request: Request, api: Api, body: GenerateRequest, record: Record, *, stream: bool) -> AsyncIterator[_Job]:
    """The request checked, admitted and on its way to the engine; what goes wrong inside is recorded."""
    parameters = _read_as_lorax(body.parameters or GenerateParameters.model_validate({}), api.settings)
    with record.failures():
        api.admission.check()
        wishes = _wishes(parameters, stream)
        _check(parameters, wishes, api, stream)
        access = api.access(request)
        selection = access.to_call(_select(parameters, api, lorax_bearer(request, api.settings)))
        record.chose(selection)
        if not body.inputs:
            raise refuse("`inputs` cannot be empty", "inputs")
        limits = api.limits()
        if parameters.truncate is not None and not 0 < parameters.truncate <= limits.max_input_length:
            raise refuse(
                f"`truncate` must be strictly positive and less than {limits.max_input_length}. Given: {parameters.truncate}", "truncate"
            )
        with api.admitted(access, selection, parameters.best_of or 1, record) as lease:
            lease.check_output(parameters.max_new_tokens, "max_new_tokens")
            adapter = await api.resolve(selection, access)
            record.found(adapter)
            with api.adapters.pinned(adapter):
                share = access.share(selection) | {"mend": api.mending(selection, adapter)}
                job = await _plan(api, body.inputs, parameters, wishes, adapter, record, lease, share)
                yield job


async def _plan(
    api: Api, prompt: str, parameters: GenerateParameters, wishes: Wishes, adapter: ResolvedAdapter | None, record: Record, lease: Lease,
    share: dict[str, Any],
) -> _Job:  # fmt: skip
    tokenizer = api.tokenizer(adapter)
    if parameters.apply_chat_template:
        text = await api.render_chat(adapter, [{"role": "user", "content": prompt}], {})
    else:
        text = prompt
    ids = await api.encode(
        tokenizer, text, prompt_name="inputs", truncated=parameters.truncate is not None,
        add_special_tokens=not parameters.apply_chat_template,
    )  # fmt: skip
    if parameters.truncate is not None and not api.settings.lorax_strict:  # LoRAX checks the whole prompt's length, and truncates then
        ids = ids[-parameters.truncate :]
    room = fit(ids, parameters.max_new_tokens, api.limits(), prompt_name="inputs", max_name="max_new_tokens")
    (max_new_tokens,) = lease.bounded([room])
    ids = ids[-parameters.truncate :] if parameters.truncate is not None else ids
    stop_ids = tuple(id for stop in parameters.stop if (id := tokenizer.special_id(stop)) is not None)
    eos_ids = () if parameters.ignore_eos_token else tokenizer.eos_ids
    params = to_params(
        wishes,
        grammar=chosen_grammar(parameters.response_format, parameters.structured_outputs),
        stop_token_ids=(*eos_ids, *stop_ids, *parameters.stop_token_ids),
        max_new_tokens=max_new_tokens,
        num_logprobs=parameters.return_k_alternatives or 0,
        raw_logprobs=False,
        num_prompt_logprobs=0 if parameters.decoder_input_details else -1,
    )
    plan = Plan(
        request_id=record.id, prompts=[ids], max_new_tokens=[max_new_tokens], params=params, tokenizer=tokenizer,
        samples=parameters.best_of or 1, adapter=adapter, stops=parameters.stop, keep_stop=True, stop_ids=stop_ids,
        **share,
    )  # fmt: skip
    generation = Generation(plan, api.engine)
    record.submitted(generation, len(prompt))
    api.log_prompts(record, [text])
    return _Job(prompt, parameters, generation, tokenizer, wishes.samples)


def _read_as_lorax(parameters: GenerateParameters, settings: Settings) -> GenerateParameters:
    """Under lorax-strict: what LoRAX takes and ignores, or takes for something else."""
    if not settings.lorax_strict:
        return parameters
    return parameters.model_copy(update={"apply_chat_template": False, "best_of": parameters.best_of or None})


def _wishes(parameters: GenerateParameters, stream: bool) -> Wishes:
    same = ("best_of", "do_sample", "temperature", "repetition_penalty", "frequency_penalty", "presence_penalty", "top_p", "typical_p",
            "top_k", "min_p", "logit_bias", "max_new_tokens", "seed")  # fmt: skip
    return Wishes(
        stream=stream,
        num_alternatives=parameters.return_k_alternatives,
        stop=tuple(parameters.stop),
        stop_token_ids=tuple(parameters.stop_token_ids),
        **{name: getattr(parameters, name) for name in same},
    )


def _check(parameters: GenerateParameters, wishes: Wishes, api: Api, stream: bool) -> None:
    """LoRAX's checks in LoRAX's order (router/src/validation.rs)."""
    check_best_of(parameters.best_of, api.settings.max_best_of)
    if stream and (parameters.best_of or 1) != 1:
        raise refuse("`best_of` != 1 is not supported when streaming tokens", "best_of")
    if stream and parameters.decoder_input_details:
        raise refuse("`decoder_input_details` == true is not supported when streaming tokens", "decoder_input_details")
    merged = parameters.merged_adapters
    if parameters.adapter_id and merged is not None:
        raise refuse("at most one of `adapter_id` or `adapters` may be provided", "merged_adapters")
    if merged is not None and not merged.ids:
        raise refuse("at least one adapter ID must be provided when setting `adapters`", "merged_adapters.ids")
    if merged is not None and len(merged.ids) != len(merged.weights):
        raise refuse("number of adapter IDs must match number of adapter weights", "merged_adapters.weights")
    check_wishes(wishes, api.limits())
    if parameters.watermark:
        raise refuse("`watermark` is not supported: its marks could only be found on a machine of the same kind", "watermark")


def _select(parameters: GenerateParameters, api: Api, bearer: str | None) -> AdapterSelection | None:
    """The adapter that the request means, or None for the base."""
    source, token = api.source(parameters.adapter_source), parameters.api_token or bearer
    merged = parameters.merged_adapters
    if merged is not None:
        options = (merged.merge_strategy or "linear", merged.density, merged.majority_sign_method or "total")
        check_merge(len(merged.ids), merged.weights, *options)
        return AdapterSelection(source, merge=Merge(tuple(merged.ids), tuple(merged.weights), *options), api_token=token)
    return AdapterSelection(source, parameters.adapter_id, api_token=token) if parameters.adapter_id else None


def lorax_bearer(request: Request, settings: Settings) -> str | None:
    """The token of `Authorization: Bearer` as LoRAX reads it, for the adapter's source: only under lorax-strict and without tenants.
    Otherwise that header is the caller's credential for this server and never leaves it; a source's token is `api_token`."""
    if not settings.lorax_strict or settings.tenants_file is not None:
        return None
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None

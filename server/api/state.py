"""What the routes work with: one object, made by api.app, read by all routes through `get_api`.

Owns nothing itself but the short steps that several routes share: adapter resolved, prompt tokenized, chat rendered.
"""

import asyncio
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from server.api.adapter_status import AdapterStatus
from server.api.adapters import AdapterResolver, AdapterSelection, ResolvedAdapter
from server.api.admission import Admission
from server.api.base_model import ServedModel
from server.api.engine import EngineClient
from server.api.engines import Engines
from server.api.generation import Generation, Plan
from server.api.publishing import Publisher
from server.api.record import Record
from server.api.sampling import Limits, too_long
from server.api.shared_run import SharedRun
from server.api.tenants.access import Access, Places, nowhere, unrestricted
from server.api.tenants.callers import caller_of
from server.api.tenants.limits import Lease, scopes_of
from server.api.tenants.merges import MergeBook
from server.api.tenants.tenancy import Tenancy
from server.api.text.template_worker import TemplateWorkers
from server.api.text.templates import render
from server.api.text.tokenizer import Tokenizer
from server.api.tracing import Traces
from server.errors import AdapterNotFound, ServerError, TemplateFailed, Unavailable, ValidationFailed
from server.metrics import Metrics
from server.settings import Settings
from server.sources import canonical_name
from server.types import SamplingParams

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_MAX_LOGGED_CHARS = 20_000
_INLINE_CHARS = 4096  # a longer text is tokenized in a thread


@dataclass(frozen=True)
class Api:
    """The parts of the API process. `settings` are resolved: nothing in them is None that a route needs."""

    settings: Settings
    model: ServedModel
    engine: EngineClient | Engines
    adapters: AdapterResolver
    publisher: Publisher
    tenancy: Tenancy | None  # None: callers are not told apart
    merges: MergeBook | None  # as tenancy
    places: Places
    status: AdapterStatus
    templates: TemplateWorkers
    admission: Admission
    metrics: Metrics
    traces: Traces | None
    started_at: int  # seconds since 1970
    startup_probe: SharedRun = field(init=False)
    list_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="adapter-lists"))
    server_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])  # tells the servers of a fleet apart

    def __post_init__(self) -> None:
        object.__setattr__(self, "startup_probe", SharedRun(self._generate_one))  # frozen: made once, with all the other parts

    async def _generate_one(self) -> None:
        """One token of the base model, through the whole queue."""
        tokenizer = self.model.tokenizer
        with self.admission.admitted(1):
            plan = Plan(
                request_id=f"startup-{uuid.uuid4().hex}", prompts=[tokenizer.encode("liveness", add_special_tokens=False)],
                max_new_tokens=[1], tokenizer=tokenizer, params=SamplingParams(max_new_tokens=1),
            )  # fmt: skip
            await Generation(plan, self.engine).run()

    @property
    def compute_type(self) -> str:
        """LoRAX's x-compute-type."""
        ready = self.engine.last_ready
        return "gpu+optimized" if ready is not None and ready.device.startswith("cuda") else "cpu"

    def limits(self) -> Limits:
        """Bounds of this server; the engine's own is among them once it is ready."""
        settings, ready = self.settings, self.engine.last_ready
        assert settings.max_total_tokens is not None and settings.max_input_length is not None
        total = min(settings.max_total_tokens, ready.max_sequence_len if ready is not None else settings.max_total_tokens)
        return Limits(
            max_best_of=settings.max_best_of,
            max_stop_sequences=settings.max_stop_sequences,
            max_top_logprobs=settings.max_top_logprobs,
            max_input_length=min(settings.max_input_length, total - 1),
            max_total_tokens=total,
            vocab_size=ready.layout.vocab_size if ready is not None else self.model.tokenizer.num_ids,
        )

    def source(self, name: str | None) -> str:
        """The canonical name of the source that a request means. ValidationFailed if there is none of that name."""
        try:
            return canonical_name(name or self.settings.default_adapter_source or self.settings.adapter_source)
        except ValidationFailed as error:
            raise ValidationFailed(f"`adapter_source`: {error.message}", param="adapter_source") from None

    async def resolve(self, selection: AdapterSelection | None, access: Access) -> ResolvedAdapter | None:
        """The adapter on disk; None is the base. Unavailable until the engine has said what the base looks like, LimitReached as
        MergeBook.resolve."""
        if selection is None:
            return None
        ready = self.engine.ready
        if ready is None:
            raise Unavailable(self.engine.unhealthy_reason() or "the engine is not ready", retry_after_s=5.0)
        if selection.merge is None:  # of names alone: anybody can make up any number of merges
            self.adapters.residency.hit(selection.name_key)
        try:
            if selection.merge is not None and self.merges is not None and access.tenant is not None:
                work = partial(self.adapters.resolve, selection, ready.layout)
                is_made = partial(self.adapters.has_merge, selection, ready.layout)
                return await self.merges.resolve(access.tenant, selection.name_key, work, is_made)
            return await self.adapters.resolve(selection, ready.layout)
        except AdapterNotFound:
            if self.tenancy is None:
                raise
            raise nowhere(selection) from None

    def record(self, request: Request) -> Record:
        """The record of a request that has just come."""
        return Record(self.metrics, request.url.path, self.model.name, caller_of(request).name)

    def log_prompts(self, record: Record, prompts: Sequence[str]) -> None:
        """Only if a setting asks for it."""
        if self.settings.log_prompts:
            log.info("prompt of %s: %s", record.id, json.dumps(list(prompts))[:_MAX_LOGGED_CHARS])

    def access(self, request: Request) -> Access:
        """What the caller of a request may."""
        if self.tenancy is None:
            return unrestricted(self.publisher.registry, self.places)
        return self.tenancy.access(caller_of(request))

    @contextmanager
    def admitted(
        self, access: Access, selection: AdapterSelection | None, num_sequences: int, record: Record | None = None
    ) -> Iterator[Lease]:
        """Places for so many sequences, of the server's and of the caller's. The errors of Admission.admitted; LimitReached."""
        with self.admission.admitted(num_sequences):
            if self.tenancy is None or access.tenant is None or access.shared is None:
                yield Lease([], num_sequences)
                return
            spelling = partial(self.places.spelling, selection.source) if selection is not None else str
            scopes = scopes_of(access.tenant, access.shared, selection, access.shared_ids(selection), spelling)
            with self.tenancy.limits.admitted(scopes, num_sequences, record) as lease:
                if record is not None:
                    record.lease = lease
                yield lease

    @contextmanager
    def ordering(self, access: Access) -> Iterator[None]:
        """A place for an order about adapters, among those of the caller. LimitReached."""
        with self.tenancy.limits.ordering(access.tenant) if self.tenancy is not None and access.tenant is not None else nullcontext():
            yield

    def mending(self, selection: AdapterSelection | None, adapter: ResolvedAdapter | None) -> Callable[[], Awaitable[bool]] | None:
        """What api.generation calls when the engine refuses the adapter's pack; see AdapterResolver.mend."""
        ready = self.engine.last_ready
        if selection is None or adapter is None or ready is None:
            return None
        return partial(self.adapters.mend, selection, adapter, ready.layout)

    async def source_ids(self) -> list[str]:
        """Ids that the default source holds; none, and a line in the log, while it cannot be listed."""
        try:
            return await self.adapters.list_ids(self.source(None))
        except ServerError as error:
            log.warning("the adapters cannot be listed: %s", error.message)
            return []

    async def listed(self, work: Callable[[], Result]) -> Result:
        """What looks at all adapters, one at a time and in a thread of its own: however many poll, prompts wait for none of it."""
        return await asyncio.get_running_loop().run_in_executor(self.list_thread, work)

    def tokenizer(self, adapter: ResolvedAdapter | None) -> Tokenizer:
        """Of the adapter, or of the base."""
        return adapter.tokenizer if adapter is not None else self.model.tokenizer

    def check_chars(self, tokenizer: Tokenizer, text: str, prompt_name: str) -> None:
        """Refuse, before the work of tokenizing, a text that is too long even if all its tokens were the longest one."""
        max_len = self.limits().max_input_length
        if len(text) > max_len * tokenizer.max_token_chars:
            raise too_long(
                f"`{prompt_name}` must have less than {max_len} tokens. Given: {len(text)} characters, "
                f"and no token has more than {tokenizer.max_token_chars}",
                prompt_name,
            )

    async def encode(
        self, tokenizer: Tokenizer, text: str, *, prompt_name: str, add_special_tokens: bool = True, truncated: bool = False
    ) -> list[int]:
        """Token ids; a long text does not hold up the event loop. `truncated`: the caller keeps only some, so any length will do."""
        if not truncated:
            self.check_chars(tokenizer, text, prompt_name)
        if len(text) <= _INLINE_CHARS:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def encode_all(self, tokenizer: Tokenizer, texts: Sequence[str], *, prompt_name: str) -> list[list[int]]:
        """Token ids of several texts, as `encode`."""
        for text in texts:
            self.check_chars(tokenizer, text, prompt_name)
        if sum(map(len, texts)) <= _INLINE_CHARS:
            return tokenizer.encode_all(texts)
        return await asyncio.to_thread(tokenizer.encode_all, texts)

    async def render_chat(self, adapter: ResolvedAdapter | None, messages: Sequence[dict[str, Any]], variables: dict[str, Any]) -> str:
        """The prompt that the chat template makes of the messages. TemplateFailed if there is none or it refuses them."""
        tokenizer = self.tokenizer(adapter)
        if tokenizer.chat_template is None:
            raise TemplateFailed("Template not found")
        known = {
            "messages": list(messages),
            "bos_token": tokenizer.bos_token or "",
            "eos_token": tokenizer.eos_token or "",
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }
        if adapter is not None and adapter.own_template:
            return await self.templates.render(tokenizer.chat_template, known | variables)
        return await asyncio.to_thread(render, tokenizer.chat_template, known | variables)


async def get_api(request: Request) -> Api:
    """The Api of the app that a request came to. A coroutine: FastAPI has a plain function wait for a thread, with each request."""
    return request.app.state.api


ApiState = Annotated[Api, Depends(get_api)]

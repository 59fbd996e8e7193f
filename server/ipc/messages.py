"""The messages of the two processes. API to engine: `ToEngine`; engine to API: `FromEngine`. msgpack, tagged by class name."""

import msgspec

from server.types import AdapterRef, BaseLayout, EngineRequest, SequenceOutput


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Queue a sequence. Exactly one SequenceOutput with a finish_reason answers it."""

    request: EngineRequest


class Abort(msgspec.Struct, tag=True, frozen=True):
    """The client is gone, or the API found a stop string: free everything within one step. Unknown ids are ignored."""

    request_ids: list[str]


class Prefetch(msgspec.Struct, tag=True, frozen=True):
    """Bring an adapter into host memory before anybody asks for it."""

    adapter: AdapterRef


class Forget(msgspec.Struct, tag=True, frozen=True):
    """Free an adapter's memory once its last sequence ends."""

    hash: str


class Pin(msgspec.Struct, tag=True, frozen=True):
    """Bring an adapter into host memory and never evict it from there, until Unpin. Sent once for a hash; a new engine is told again."""

    adapter: AdapterRef


class Unpin(msgspec.Struct, tag=True, frozen=True):
    """Undo Pin: the adapter may be evicted like any other. A Forget may come before (it takes effect now) or after."""

    hash: str


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Stop at once; open requests end as aborted."""


class Starting(msgspec.Struct, tag=True, frozen=True):
    """Progress of the start: what is being done now."""

    phase: str
    elapsed_s: float


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine takes requests."""

    layout: BaseLayout
    device: str
    max_sequence_len: int  # prompt and output, tokens
    block_size: int
    num_blocks: int
    adapter_bytes: int  # device memory that adapters may take
    start_s: dict[str, float]  # phase -> seconds
    versions: dict[str, str]  # torch, transformers, attention backend


class Accepted(msgspec.Struct, tag=True, frozen=True):
    """The engine has read these Submits. Those that it never confirmed may be given to another engine when it dies."""

    request_ids: list[str]


class StepOutputs(msgspec.Struct, tag=True, frozen=True):
    """All that one step brought."""

    outputs: list[SequenceOutput]


class AdapterEvent(msgspec.Struct, tag=True, frozen=True):
    """An adapter changed its tier: "absent", "loading", "host", "device" or "failed"."""

    hash: str
    state: str
    bytes: int = 0
    load_s: float = 0.0
    error: str | None = None


class EngineStats(msgspec.Struct, frozen=True):
    """Counters since start, and what is held now."""

    num_running: int = 0
    num_waiting: int = 0
    num_tokens: int = 0  # of all sequences, queued and running
    max_tokens: int = 0  # that the KV blocks hold
    max_batch_size: int = 0  # sequences of one step
    num_blocks_used: int = 0
    num_blocks: int = 0
    num_blocks_cached: int = 0  # holding a prefix that can be reused, in use or not
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_adapters_device: int = 0
    num_adapters_host: int = 0
    adapter_bytes_device: int = 0
    adapter_bytes_host: int = 0


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """Sent by a thread of the engine each half second. `phase_deadline_at` (monotonic seconds, the same clock in both processes):
    the step loop has hung if it is still in `phase` then; None while idle."""

    step: int
    phase: str
    phase_deadline_at: float | None
    stats: EngineStats


class Died(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot go on; `reason` is for the log and /health."""

    reason: str


ToEngine = Submit | Abort | Prefetch | Forget | Pin | Unpin | Shutdown
FromEngine = Starting | Ready | Accepted | StepOutputs | AdapterEvent | Heartbeat | Died

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """The message as bytes for a socket."""
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """A message for the engine. msgspec.ValidationError if the two processes do not speak the same version."""
    return _to_engine.decode(data)


def decode_from_engine(data: bytes) -> FromEngine:
    """A message from the engine. msgspec.ValidationError if the two processes do not speak the same version."""
    return _from_engine.decode(data)

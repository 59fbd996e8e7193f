"""Types that the API process and the engine process share. Plain data (msgspec), no behaviour, no torch.

Owns the shapes of: what a request asks of the engine, what the base model looks like to an adapter, what a packed adapter holds.
`gc=False`: of these there are hundreds for an adapter or a step, in no cycle; Python's collector would look at all of them in mid-step.
"""

from typing import Literal

import msgspec

PackDtype = Literal["float32", "bfloat16", "float16"]
FinishReason = Literal["length", "stop", "aborted", "error"]


class GrammarSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an answer must look like. `text` by kind: a JSON schema as JSON; a regular expression (Rust's syntax, no look-around) that the
    whole answer matches; a grammar in llguidance's Lark, or in GBNF or EBNF (told by `::=`)."""

    kind: Literal["json_schema", "regex", "grammar"]
    text: str
    param: str = "response_format"  # the request's field, for messages; no part of the grammar's identity


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the engine picks tokens for one sequence. Bounds are checked by the API; the engine trusts them."""

    max_new_tokens: int
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # over prompt and output (CTRL, arXiv 1909.05858)
    frequency_penalty: float = 0.0  # OpenAI's meaning: times the count in the output
    presence_penalty: float = 0.0  # OpenAI's meaning: once if in the output
    logit_bias: dict[int, float] = {}
    seed: int = 0  # 64 bits; with the position it alone decides the random draw
    stop_token_ids: tuple[int, ...] = ()  # EOS included by the API unless the request ignores it
    num_logprobs: int = -1  # -1 none, 0 the chosen token's, k also the k likeliest
    raw_logprobs: bool = False  # True: of the model's own distribution (OpenAI); False: after penalties and warpers (LoRAX)
    num_prompt_logprobs: int = -1  # -1 none, 0 the prompt tokens' own, k also the k likeliest
    grammar: GrammarSpec | None = None


class AdapterRef(msgspec.Struct, frozen=True):
    """An adapter as the engine knows it: content hash and the packed file on local disk. `name` is for messages alone."""

    hash: str
    path: str
    name: str


class EngineRequest(msgspec.Struct, frozen=True):
    """One sequence to generate. `cache_salt` parts tenants' prefix caches; empty shares them.

    `tenant`: whose it is, for fairness; never shown to other tenants. `weight`: the tenant's share."""

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    adapter: AdapterRef | None = None
    cache_salt: str = ""
    tenant: str = ""
    weight: float = 1.0


class Logprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log probability of one token and, likeliest first, of its `top` alternatives as (token id, log probability).

    In a prompt's first position `logprob` is None."""

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]] = []


class SequenceOutput(msgspec.Struct, omit_defaults=True, gc=False):
    """What one step (or a failure) brought for one request. `finish_reason` set: the last message for it."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[Logprob] = []  # as long as token_ids if asked for, else empty
    prompt_logprobs: list[Logprob] | None = None  # once, with the first token
    finish_reason: FinishReason | None = None
    error: str | None = None  # with finish_reason "error": a message for the caller
    error_kind: str | None = None  # class name in server.errors
    error_param: str | None = None  # the request's field that is at fault, where there is one
    retry_after_s: float | None = None  # when trying again may help
    num_cached_tokens: int = 0  # prompt tokens read from the prefix cache (with the first token)
    queued_s: float = 0.0  # from arrival in the engine to its first step (with the first token)


class Site(msgspec.Struct, frozen=True):
    """One module of the base model that a LoRA delta can be added to.

    A linear maps [tokens, in_features] to [tokens, out_features]; an embedding maps ids below in_features to out_features."""

    name: str  # module path in the base model, "model.layers.0.self_attn.q_proj"
    kind: Literal["linear", "embedding"]
    in_features: int
    out_features: int
    has_bias: bool = False
    transposed: bool = False  # weight is stored [in, out] (GPT-2's Conv1D)
    group: int = -1  # sites of one group read the same input and run as one product


class Module(msgspec.Struct, frozen=True):
    """A module of the base model as PEFT sees it: its class and its own parameters."""

    name: str
    class_name: str
    parameters: dict[str, list[int]]  # own parameters (not its children's): name -> shape
    replaceable: bool = False  # acts on each token by itself, so that an adapter may replace its parameters


class BaseLayout(msgspec.Struct, frozen=True):
    """The base model as adapters meet it; the engine sends it to the API when it is ready. No weights."""

    fingerprint: str  # hash of everything below: a pack is valid for one fingerprint and dtype
    model_type: str
    num_layers: int
    vocab_size: int  # rows of the embedding
    hidden_size: int
    tied_head: bool  # lm_head shares the embedding's weight
    embedding: str  # module path of the input embedding
    head: str  # module path of the output head
    dtype: PackDtype  # what packs hold
    sites: list[Site]
    modules: list[Module]  # every named module, in the base model's order
    # Embedding and head -> server.adapters.parts.hash_weight of the base's own weight. PEFT saves a copy of it with every delta on it;
    # with the hash here that copy is known and left out, without it the adapter carries it as a replacement (right, but large).
    weight_hashes: dict[str, str] = {}


class PackedTensor(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a tensor lies in a pack's data: byte offset, shape; dtype is the pack's. Row-major.

    The offset is a multiple of 64, except that the `a` of a group's sites follow each other without a gap."""

    offset: int
    shape: tuple[int, ...]


class PackedSite(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What an adapter does at one site.

    linear: y + scale * (x @ a.T) @ b (+ bias); embedding: y + scale * a[ids] @ b.
    With `magnitude` (DoRA, arXiv 2402.09353): the engine computes g = magnitude / ||W + scale * delta|| once at load; then
    y = g * (Wx + scale * delta x) + base bias.
    `base_bias` replaces the base's bias; `weight` replaces the base's weight and then there is no delta."""

    site: int  # index in BaseLayout.sites
    rank: int = 0
    scale: float = 1.0
    a: PackedTensor | None = None  # linear [rank, in]; embedding [rows, rank]
    b: PackedTensor | None = None  # [rank, out]
    bias: PackedTensor | None = None  # [out], added as it is (scale is already in it)
    magnitude: PackedTensor | None = None  # [out]
    base_bias: PackedTensor | None = None  # [out]
    weight: PackedTensor | None = None  # [out, in]; embedding [rows, out]. More rows than the base has: added tokens
    group: int = -1  # Site.group


class PackedOverride(msgspec.Struct, frozen=True):
    """A parameter of a module that is no site (a norm, a router) replaced for this adapter's tokens."""

    module: str
    parameter: str
    tensor: PackedTensor


class PackedTokens(msgspec.Struct, frozen=True):
    """Rows of one module's weight replaced: PEFT's trainable_token_indices. A tied head has an entry of its own, with the same `rows`."""

    module: str
    token_ids: list[int]
    rows: PackedTensor  # [len(token_ids), hidden]


class PackedAdapter(msgspec.Struct, frozen=True):
    """Header of a pack file. The data follows in the same file; siblings of a group have adjacent `a` tensors in group order."""

    hash: str  # content hash of the adapter (config and weights)
    fingerprint: str  # BaseLayout.fingerprint
    dtype: PackDtype
    max_rank: int
    data_bytes: int
    vocab_size: int  # rows the head has with this adapter (the base's unless tokens were added)
    sites: list[PackedSite] = []
    overrides: list[PackedOverride] = []
    tokens: list[PackedTokens] = []


class EngineOptions(msgspec.Struct, frozen=True):
    """How the engine process is to run; the API writes it to a JSON file that the engine's command line names.

    None means "the engine decides from the device's memory"; what it decided comes back in ipc.messages.Ready."""

    model_dir: str  # local folder of the base model
    revision: str = ""  # names the base's weights in prefix-cache keys
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    block_size: int = 16  # tokens a KV block
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None  # at most one of num_blocks and kv_cache_bytes is set
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"  # auto: dtype; fp8: e4m3 without a scale
    max_batch_tokens: int = 2048  # tokens a step, prefill chunks and decode rows together
    max_batch_size: int = 64  # sequences a step
    max_batch_adapters: int | None = None  # adapters a step; None: as many as there is room for
    max_queue_s: float | None = None  # that a sequence may wait for its first step; None: for ever
    max_sequence_len: int = 4096  # prompt and output, tokens
    prefix_caching: bool = True
    adapter_device_bytes: int | None = None
    adapter_host_bytes: int | None = None
    adapter_read_timeout_s: float = 300.0  # reading one from disk is given up then
    num_threads: int | None = None
    allow_unverified_architecture: bool = False
    quantize: str | None = None  # a scheme of model.quantization; None: as the checkpoint is
    quantize_head: bool = False  # the output head too
    # "auto" is what the device is fastest with: on a GPU an arena, Triton kernels, FlashInfer, compiled layers and captured decode steps.
    kernels: Literal["auto", "torch", "triton"] = "auto"
    attention: Literal["auto", "flashinfer", "sdpa"] = "auto"
    compile_layers: bool | None = None
    cuda_graphs: bool | None = None
    overlap: bool | None = None  # launch a step before the last one's tokens are looked at
    kernel_trials_s: float = 20.0  # of a start, in which kernels of the base's products are tried; what is left is tried by the next

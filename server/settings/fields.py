"""The settings themselves: one frozen object, each field with its description, bounds and default.

Owns names, types and the rules between fields; does not know how values are read (see `reading`). None means "auto": `resolved` and the
engine fill it in, and the result is logged once at start. `lorax` names the environment variable that LoRAX reads for the same thing.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, SecretStr, field_validator, model_validator

from server.settings.foreign import kv_dtype_of, scheme_of

GiB = 1 << 30
AUTO_TOTAL_TOKENS = 4096  # LoRAX's bound on what it takes from the model's config when nothing is said


def _set(default: Any, group: str, description: str, *, lorax: str | None = None, **bounds: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"group": group, "lorax": lorax}, **bounds)


class Settings(BaseModel):
    """See each field's description; `python -m server --help` prints them all."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    # fmt: off (a table: one setting a line)
    model_id: str = _set(
        ..., "Model", "Folder of the base model (config.json, safetensors, tokenizer.json).", lorax="MODEL_ID", min_length=1
    )
    revision: str | None = _set(None, "Model", "Names the version of the weights, for /info and the prefix cache's keys.", lorax="REVISION")
    served_model_name: str | None = _set(None, "Model", "The base's name in /v1/models and in `model`; auto: the folder's name.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _set(
        "auto", "Model", "What to compute in; auto: float32 on a CPU, the checkpoint's on a GPU.", lorax="DTYPE"
    )
    quantize: Literal["fp8", "int8", "int4", "hqq", "nf4", "int8-bnb", "awq", "gptq"] | None = _set(
        None,
        "Model",
        "Hold the base's linears in few bits (docs/quantization.md); auto: as the checkpoint is. LoRAX's names are understood.",
        lorax="QUANTIZE",
    )
    quantize_head: bool = _set(False, "Model", "Quantize the output head too, where quantize does it while loading.")
    device: str = _set("auto", "Model", "auto, cpu, cuda or cuda:N.", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    allow_unverified_architecture: bool = _set(False, "Model", "Serve an architecture that the test suite does not cover.")

    adapters_dir: Path | None = _set(None, "Adapters", "Folder of the source `local`; an adapter's id is its path below it.")
    adapter_source: str = _set("local", "Adapters", "Source of a request that names none: local, s3 or hub.", lorax="ADAPTER_SOURCE")
    default_adapter_source: str | None = _set(
        None, "Adapters", "LoRAX's second name of adapter-source; wins if set.", lorax="DEFAULT_ADAPTER_SOURCE"
    )
    preloaded_adapter_ids: list[str] = _set([], "Adapters", "Fetched at start (comma-separated).", lorax="PRELOADED_ADAPTER_IDS")
    adapter_recheck_s: float = _set(
        2.0, "Adapters", "An adapter of a remote source is asked for changes at most this often; a local one always.", ge=0, le=3600
    )
    adapter_device_bytes: ByteSize | None = _set(None, "Adapters", "Device memory for adapters; auto: a share of what is free.", gt=0)
    adapter_host_bytes: ByteSize | None = _set(
        None, "Adapters", "Host memory for adapters, all engines together; auto: a share of what is free.", gt=0
    )
    adapter_timeout_s: float = _set(
        300.0, "Adapters", "A request whose adapter is not fetched by then, or not read from disk, is answered 424.", gt=0, le=86400
    )
    max_adapter_bytes: ByteSize = _set(ByteSize(4 * GiB), "Adapters", "A larger adapter is refused before it is fetched.", gt=0)
    max_merged_rank: int = _set(256, "Adapters", "Highest rank that merged_adapters may come to.", ge=1, le=4096)
    store_dir: Path | None = _set(None, "Adapters", "Fetched and packed adapters lie here; several servers may share it. Auto: ~/.cache.")
    store_max_bytes: ByteSize = _set(ByteSize(64 * GiB), "Adapters", "The least recently used go beyond this size.", gt=0)

    registry_dir: Path | None = _set(
        None, "Adapters", "Published names and their weights lie here; every server of a fleet shares it. Auto: registry/ in store-dir."
    )
    registry_poll_s: float = _set(1.0, "Adapters", "Look for what other servers published this often.", gt=0, le=60)

    model_bucket: str | None = _set(None, "Source s3", "Bucket of ids that name none; always allowed.", lorax="PREDIBASE_MODEL_BUCKET")
    model_folder: str | None = _set(None, "Source s3", "Folder of ids in model-bucket.", lorax="PREDIBASE_MODEL_FOLDER")
    allowed_buckets: list[str] = _set([], "Source s3", "Other buckets, or bucket/prefix, that a request may name (comma-separated).")
    s3_endpoint_url: str | None = _set(None, "Source s3", "S3-compatible service other than AWS.", lorax="S3_ENDPOINT_URL")
    s3_region: str | None = _set(None, "Source s3", "Region of the buckets; auto: the instance's.")

    hub_enabled: bool = _set(False, "Source hub", "Let requests load adapters from the Hugging Face hub.")
    allowed_hub_owners: list[str] = _set([], "Source hub", "Owners (before the slash) that a request may name (comma-separated).")
    hub_endpoint: str | None = _set(None, "Source hub", "A mirror of the hub.")

    source_connect_timeout_s: float = _set(5.0, "Sources", "To connect to a remote source.", gt=0, le=300)
    source_read_timeout_s: float = _set(30.0, "Sources", "Longest silence of a remote source.", gt=0, le=3600)
    source_retries: int = _set(3, "Sources", "Tries after the first one.", ge=0, le=20)

    max_concurrent_requests: int = _set(
        1024,
        "Limits",
        "Sequences in flight, queued ones included; more are answered 429.",
        lorax="MAX_CONCURRENT_REQUESTS",
        ge=1,
        le=1 << 20,
    )
    max_queue_s: float | None = _set(
        None,
        "Limits",
        "Seconds that a request may wait for its first step; one that would wait longer is answered 429 at once. Auto: for ever.",
        gt=0,
        le=86_400,
    )
    max_input_length: int | None = _set(None, "Limits", "Tokens of a prompt; auto: max-total-tokens - 1.", lorax="MAX_INPUT_LENGTH", ge=1)
    max_total_tokens: int | None = _set(
        None, "Limits", "Tokens of prompt and output; auto: the model's, at most 4096.", lorax="MAX_TOTAL_TOKENS", ge=2
    )
    max_stop_sequences: int = _set(4, "Limits", "Stop strings of one request.", lorax="MAX_STOP_SEQUENCES", ge=0, le=256)
    max_best_of: int = _set(8, "Limits", "Highest best_of and n (LoRAX's default is 2).", lorax="MAX_BEST_OF", ge=1, le=128)
    max_top_logprobs: int = _set(20, "Limits", "Most alternatives a token that a request may ask for.", ge=0, le=1000)
    max_body_bytes: ByteSize = _set(ByteSize(2 << 20), "Limits", "A larger request body is answered 413.", gt=0)

    max_batch_prefill_tokens: int = _set(
        1024, "Engine", "Tokens of one step, prompt chunks and decoding together.", lorax="MAX_BATCH_PREFILL_TOKENS", ge=1, le=1 << 20
    )
    max_batch_size: int = _set(64, "Engine", "Sequences of one step.", ge=1, le=4096)
    max_batch_adapters: int | None = _set(
        None,
        "Engine",
        "Adapters of one step, which reads the weights of each (docs/fairness.md); auto: as many as there is room for.",
        ge=1,
    )
    block_size: int = _set(16, "Engine", "Tokens of a KV block.", ge=1, le=256)
    num_blocks: int | None = _set(None, "Engine", "KV blocks; auto: from the memory that is free.", ge=1)
    kv_cache_bytes: ByteSize | None = _set(None, "Engine", "Memory for KV blocks, in place of num-blocks.", gt=0)
    kv_cache_dtype: Literal["auto", "fp8"] = _set(
        "auto", "Engine", "What keys and values are kept in; auto: the model's type; fp8: e4m3, half the bytes (docs/quantization.md)."
    )
    prefix_caching: bool = _set(True, "Engine", "Reuse the KV blocks of equal prompt beginnings.", lorax="PREFIX_CACHING")
    kernels: Literal["auto", "torch", "triton"] = _set(
        "auto", "Engine", "How adapters are added: by torch alone, or by Triton kernels in one memory with the KV blocks; auto: by device."
    )
    attention: Literal["auto", "flashinfer", "sdpa"] = _set(
        "auto", "Engine", "flashinfer, or torch's attention over gathered pages; auto: flashinfer where it has the model's kernels."
    )
    compile_layers: bool | None = _set(None, "Engine", "Compile the decoder's layers at start; auto: on a GPU.")
    cuda_graphs: bool | None = _set(None, "Engine", "Capture steps as CUDA graphs and replay them; auto: with flashinfer.")
    overlap: bool | None = _set(None, "Engine", "Launch a step before the last one's tokens are looked at; auto: on a GPU.")
    kernel_trials_s: float = _set(
        20.0,
        "Engine",
        "Seconds of a start in which kernels of the base's products are tried, on a GPU; the next start has those that were chosen, "
        "and tries what is left; 0: none is tried.",
        ge=0,
    )
    num_engines: int | None = _set(None, "Engine", "Engine processes, each with a GPU of its own; auto: one a visible GPU.", ge=1, le=64)
    num_threads: int | None = _set(
        None, "Engine", "CPU threads of an engine; auto: torch's choice, or its share of the cores.", ge=1, le=1024
    )
    start_timeout_s: float = _set(1800.0, "Engine", "The engine must be ready by then.", gt=0)
    heartbeat_timeout_s: float = _set(5.0, "Engine", "Unhealthy when the engine is silent for longer.", gt=0)
    hang_timeout_s: float = _set(60.0, "Engine", "An engine that is silent or stuck for longer is killed and started again.", gt=0)

    tenants_file: Path | None = _set(
        None, "Tenants", "TOML file of tenants, their limits and sources, read again when it changes; none: callers are not told apart."
    )
    gateway_key: SecretStr | None = _set(
        None,
        "Tenants",
        "What a gateway shows (X-Manylora-Gateway-Key) for its X-Manylora-Tenant to be believed; none: no gateway is. Set it as admin-key.",
        min_length=16,
    )
    log_prompts: bool = _set(False, "Tenants", "Write prompts into the log, for a while, to find a fault; they are never there otherwise.")

    hostname: str = _set("127.0.0.1", "Server", "Address to listen on (LoRAX: 0.0.0.0). HOSTNAME is not read: shells set it.")
    port: int = _set(3000, "Server", "Port to listen on; 0 takes a free one.", lorax="PORT", ge=0, le=65535)
    admin_key: SecretStr | None = _set(
        None,
        "Server",
        "Bearer key of /v1/adapters; none: those routes are off. Set it in the environment or the file: flags are seen in ps.",
        min_length=16,
    )
    root_path: str = _set(
        "", "Server", "Prefix that a gateway leaves before our paths, as in /prod/generate; taken off if there.", pattern=r"^(/[\w.~-]+)*$"
    )
    ui: bool = _set(True, "Server", "Serve the page at /ui (docs/ui.md); it needs no key, what it shows does.")
    cors_allow_origin: list[str] = _set(
        [], "Server", "Origins whose pages may call us from a browser, or * (LoRAX's default); none: no CORS.", lorax="CORS_ALLOW_ORIGIN"
    )
    cors_allow_method: list[str] = _set(["GET", "POST"], "Server", "Methods for such pages.", lorax="CORS_ALLOW_METHOD")
    cors_allow_header: list[str] = _set(
        ["content-type", "authorization"], "Server", "Request headers for such pages.", lorax="CORS_ALLOW_HEADER"
    )
    cors_expose_header: list[str] = _set([], "Server", "Response headers that such pages may read.", lorax="CORS_EXPOSE_HEADER")
    cors_allow_credentials: bool = _set(False, "Server", "Let such pages send cookies.", lorax="CORS_ALLOW_CREDENTIALS")
    otlp_endpoint: str | None = _set(
        None,
        "Server",
        "OpenTelemetry collector for traces, OTLP over HTTP (http://collector:4318); none: no traces.",
        lorax="OTLP_ENDPOINT",
        pattern=r"^https?://[^/\s]+",
    )
    metrics_max_adapters: int = _set(
        100, "Server", "Adapters with series of their own in /metrics; the others are counted together.", ge=0, le=10_000
    )
    drain_timeout_s: float = _set(120.0, "Server", "After SIGTERM running requests have this long to finish.", ge=0)
    keep_alive_s: float = _set(15.0, "Server", "A silent stream gets a comment this often.", gt=0)
    idle_connection_s: int = _set(
        75, "Server", "A connection without a request is closed after this; more than a load balancer before us waits before it does.", ge=1
    )
    write_timeout_s: float = _set(60.0, "Server", "A client that takes no bytes for this long is dropped.", gt=0)
    template_timeout_s: float = _set(1.0, "Server", "Time limit of a chat template that an adapter brings.", gt=0, le=60)
    tool_call_format: Literal["auto", "hermes", "llama3_json", "mistral"] = _set(
        "auto", "Server", "How the model writes calls of tools; auto: what its chat template shows."
    )
    lorax_strict: bool = _set(False, "Server", "Do as LoRAX does where we chose to differ: docs/lorax.md lists it all.")
    log_level: Literal["debug", "info", "warning", "error"] = _set("info", "Server", "Least level that is logged.")
    json_output: bool = _set(False, "Server", "Log lines as JSON.", lorax="JSON_OUTPUT")
    # fmt: on

    @field_validator("quantize", mode="before")
    @classmethod
    def _understand(cls, value: Any) -> Any:
        return scheme_of(value) if isinstance(value, str) else value

    @field_validator("kv_cache_dtype", mode="before")
    @classmethod
    def _understand_kv(cls, value: Any) -> Any:
        return kv_dtype_of(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.num_blocks is not None and self.kv_cache_bytes is not None:
            raise ValueError("num_blocks and kv_cache_bytes exclude each other")
        if self.quantize_head and self.quantize in (None, "awq", "gptq"):
            raise ValueError("quantize_head needs a scheme that quantizes while loading: fp8, int8, int4, hqq, nf4 or int8-bnb")
        if self.cors_allow_credentials and "*" in self.cors_allow_origin:
            raise ValueError("cors_allow_credentials needs the origins by name: browsers take no * with it")
        if self.max_input_length and self.max_total_tokens and self.max_input_length >= self.max_total_tokens:
            raise ValueError(f"max_input_length must be < max_total_tokens. Given: {self.max_input_length} and {self.max_total_tokens}")
        if self.max_batch_prefill_tokens < self.max_batch_size:
            raise ValueError(
                f"max_batch_prefill_tokens must be >= max_batch_size. Given: {self.max_batch_prefill_tokens} and {self.max_batch_size}"
            )
        return self

    def resolved(self, *, max_positions: int | None, store_dir: Path) -> "Settings":
        """A copy whose token limits and store are no longer None. `max_positions`: tokens that the model was made for.

        ValueError if the limits cannot be had from the model, or exceed it."""
        if self.max_total_tokens is None and max_positions is None:
            raise ValueError("max_total_tokens must be set: the model's config does not say how long a sequence may be")
        total = self.max_total_tokens or min(max_positions or AUTO_TOTAL_TOKENS, AUTO_TOTAL_TOKENS)
        if max_positions is not None and total > max_positions:
            raise ValueError(f"max_total_tokens must be <= {max_positions}, the model's own limit. Given: {total}")
        store = self.store_dir or store_dir
        values = self.model_dump() | {
            "max_total_tokens": total,
            "max_input_length": self.max_input_length or total - 1,
            "store_dir": store,
            "registry_dir": self.registry_dir or store / "registry",
            "default_adapter_source": self.default_adapter_source or self.adapter_source,
        }
        return Settings(**values)

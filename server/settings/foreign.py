"""The flags of LoRAX's launcher and of vLLM's server, and what each is here: the same, another name, or refused with the reason.

Owns the words alone. A flag that is a setting here by the same name needs no entry beyond SAME. `reading` asks `check`; docs/flags.md is
made from the two tables.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Foreign:
    """A flag of another server. `instead`: our flag for the same thing. `asks_nothing`: values that say what is so anyway; they pass."""

    why: str
    instead: str | None = None
    asks_nothing: tuple[str, ...] = ()


SAME = Foreign("")
_ON, _OFF = ("true",), ("false",)
_ONE_GPU = "one process drives one GPU; start a server on each and balance between them"
_SIZED = "memory is measured at start; set what it is divided into"
_NO_CODE = "code that comes with a model is never run"
_COMPILED = "the server decides at start"

# Every flag of lorax-launcher, in its order (launcher/src/main.rs).
LORAX: dict[str, Foreign] = {
    "model-id": SAME,
    "adapter-id": Foreign("no adapter is built in: a request names its own (`adapter_id`, or `model`)"),
    "source": Foreign("--model-id is a folder; fetch the model first", asks_nothing=("local",)),
    "default-adapter-source": SAME,
    "adapter-source": SAME,
    "revision": SAME,
    "validation-workers": Foreign("requests are checked in the event loop, long texts in threads"),
    "sharded": Foreign(_ONE_GPU, asks_nothing=_OFF),
    "num-shard": Foreign(_ONE_GPU, asks_nothing=("1",)),
    "quantize": SAME,
    "compile": Foreign(_COMPILED, asks_nothing=_ON),
    "eager": Foreign(_COMPILED, asks_nothing=_OFF),
    "compile-max-batch-size": Foreign(_COMPILED, instead="max-batch-size"),
    "compile-max-rank": Foreign("every rank takes the same path"),
    "compile-batch-size": Foreign(_COMPILED),
    "speculative-tokens": Foreign("no speculative decoding", asks_nothing=("0",)),
    "speculation-max-batch-size": Foreign("no speculative decoding"),
    "preloaded-adapter-ids": SAME,
    "preloaded-adapter-source": Foreign("preloaded adapters come from the default source", instead="default-adapter-source"),
    "predibase-api-token": Foreign("there is no source `pbase`"),
    "dtype": SAME,
    "trust-remote-code": Foreign(_NO_CODE, asks_nothing=_OFF),
    "max-concurrent-requests": SAME,
    "max-best-of": SAME,
    "max-stop-sequences": SAME,
    "max-input-length": SAME,
    "max-total-tokens": SAME,
    "waiting-served-ratio": Foreign("prompts join the next step in chunks; nothing waits for a batch to end"),
    "max-batch-prefill-tokens": SAME,
    "max-batch-total-tokens": Foreign("the KV cache is counted in blocks of block-size tokens", instead="num-blocks"),
    "max-waiting-tokens": Foreign("prompts join the next step in chunks; nothing waits for a batch to end"),
    "eager-prefill": Foreign("prompts always join the next step", asks_nothing=_ON),
    "chunked-prefill": Foreign("prompts are always taken in chunks", asks_nothing=_ON),
    "prefix-caching": SAME,
    "merge-adapter-weights": Foreign("adapters are never folded into the base, so that requests can choose", asks_nothing=_OFF),
    "max-active-adapters": Foreign("as many as fit", instead="adapter-device-bytes"),
    "adapter-cycle-time-s": Foreign("adapters share every step; none waits for its turn"),
    "adapter-memory-fraction": Foreign("given in bytes here", instead="adapter-device-bytes"),
    "hostname": SAME,
    "port": SAME,
    "shard-uds-path": Foreign(_ONE_GPU),
    "master-addr": Foreign(_ONE_GPU),
    "master-port": Foreign(_ONE_GPU),
    "huggingface-hub-cache": Foreign("adapters of every source lie in one store", instead="store-dir"),
    "weights-cache-override": Foreign("adapters of every source lie in one store", instead="store-dir"),
    "disable-custom-kernels": Foreign(_COMPILED, asks_nothing=_OFF),
    "cuda-memory-fraction": Foreign(_SIZED, instead="kv-cache-bytes"),
    "json-output": SAME,
    "otlp-endpoint": SAME,
    "cors-allow-origin": SAME,
    "cors-allow-header": SAME,
    "cors-allow-method": SAME,
    "cors-expose-header": SAME,
    "cors-allow-credentials": SAME,
    "watermark-gamma": Foreign("`watermark` is refused"),
    "watermark-delta": Foreign("`watermark` is refused"),
    "ngrok": Foreign("no tunnel is built in"),
    "ngrok-authtoken": Foreign("no tunnel is built in"),
    "ngrok-edge": Foreign("no tunnel is built in"),
    "env": Foreign("the settings are logged at start, the versions are in /info"),
    "download-only": Foreign("--model-id is a folder; fetch the model first"),
    "tokenizer-config-path": Foreign("tokenizer_config.json is read from the model's folder"),
    "backend": Foreign("the attention kernel is chosen for the device and the model; /info names it"),
    "embedding-dim": Foreign("models that embed are not served"),
    "disable-sgmv": Foreign(_COMPILED, asks_nothing=_OFF),
    "memory-wiggle-room": Foreign(_SIZED, instead="kv-cache-bytes"),
}

# What people set of vLLM's server (vllm serve); LoRAX's entries and our own flags of the same name come first.
VLLM: dict[str, Foreign] = {
    "model": Foreign("a folder", instead="model-id"),
    "served-model-name": SAME,
    "host": Foreign("", instead="hostname"),
    "port": SAME,
    "root-path": SAME,
    "dtype": SAME,
    "revision": SAME,
    "block-size": SAME,
    "max-model-len": Foreign("", instead="max-total-tokens"),
    "max-num-seqs": Foreign("", instead="max-batch-size"),
    "max-num-batched-tokens": Foreign("", instead="max-batch-prefill-tokens"),
    "max-logprobs": Foreign("", instead="max-top-logprobs"),
    "num-gpu-blocks-override": Foreign("", instead="num-blocks"),
    "kv-cache-memory-bytes": Foreign("", instead="kv-cache-bytes"),
    "gpu-memory-utilization": Foreign(_SIZED, instead="kv-cache-bytes"),
    "enable-prefix-caching": Foreign("on unless --prefix-caching false", instead="prefix-caching", asks_nothing=_ON),
    "no-enable-prefix-caching": Foreign("--prefix-caching false", instead="prefix-caching"),
    "enable-chunked-prefill": Foreign("prompts are always taken in chunks", asks_nothing=_ON),
    "enable-lora": Foreign("adapters are always served", asks_nothing=_ON),
    "lora-modules": Foreign("adapters are folders below it, and need no list", instead="adapters-dir"),
    "max-loras": Foreign("as many as fit by default", instead="max-batch-adapters"),
    "max-lora-rank": Foreign("each adapter has its own rank; there is no padding to a maximum"),
    "max-cpu-loras": Foreign("given in bytes here", instead="adapter-host-bytes"),
    "fully-sharded-loras": Foreign(_ONE_GPU, asks_nothing=_OFF),
    "allowed-origins": Foreign("", instead="cors-allow-origin"),
    "allowed-methods": Foreign("", instead="cors-allow-method"),
    "allowed-headers": Foreign("", instead="cors-allow-header"),
    "allow-credentials": Foreign("", instead="cors-allow-credentials"),
    "uvicorn-log-level": Foreign("", instead="log-level"),
    "download-dir": Foreign("of adapters; --model-id is a folder", instead="store-dir"),
    "tensor-parallel-size": Foreign(_ONE_GPU, asks_nothing=("1",)),
    "pipeline-parallel-size": Foreign(_ONE_GPU, asks_nothing=("1",)),
    "data-parallel-size": Foreign(_ONE_GPU, asks_nothing=("1",)),
    "quantization": Foreign("", instead="quantize"),
    "kv-cache-dtype": SAME,
    "tokenizer": Foreign("tokenizer.json is read from the model's folder"),
    "chat-template": Foreign("the model's folder brings it; an adapter may bring its own"),
    "enforce-eager": Foreign(_COMPILED, asks_nothing=_OFF),
    "compilation-config": Foreign(_COMPILED),
    "attention-backend": Foreign("the attention kernel is chosen for the device and the model; /info names it"),
    "speculative-config": Foreign("no speculative decoding"),
    "trust-remote-code": Foreign(_NO_CODE, asks_nothing=_OFF),
    "seed": Foreign("a request brings its own `seed`"),
    "swap-space": Foreign("a sequence that has to give way is computed again", asks_nothing=("0",)),
    "cpu-offload-gb": Foreign("the base lies on the device as a whole", asks_nothing=("0",)),
    "otlp-traces-endpoint": Foreign("OTLP over HTTP", instead="otlp-endpoint"),
    "disable-log-requests": Foreign("prompts are never logged", asks_nothing=_ON),
}

# LoRAX's values of --quantize: ours, or why not.
QUANTIZE = {
    "bitsandbytes": "int8-bnb",
    "bitsandbytes-nf4": "nf4",
    "eetq": "int8",  # the same numbers: 8 bits, a scale for each output
    "hqq-4bit": "hqq",
}
NOT_QUANTIZE = {
    "bitsandbytes-fp4": "nf4 has the same size and a smaller error: use bitsandbytes-nf4",
    "hqq-3bit": "3 bits lie in 4 here, so nothing is saved: use hqq-4bit",
    "hqq-2bit": "2 bits without data to fit them to lose too much: use hqq-4bit",
    "fp8-kv": "two settings here: --quantize fp8 for the weights, --kv-cache-dtype fp8 for keys and values",
    "fp8_kv": "two settings here: --quantize fp8 for the weights, --kv-cache-dtype fp8 for keys and values",
    "exl2": "its checkpoints are not read",
    "marlin": "a layout of GPTQ's weights, not a scheme: use gptq",
}


def scheme_of(name: str) -> str:
    """Our name of a value of --quantize. ValueError with the reason for one of LoRAX's that there is not; others are left as they are."""
    if name in NOT_QUANTIZE:
        raise ValueError(f"'{name}' is LoRAX's and not here: {NOT_QUANTIZE[name]}")
    return QUANTIZE.get(name, name)


# vLLM's values of --kv-cache-dtype: ours, or why not.
KV_DTYPES = {"fp8_e4m3": "fp8"}
NOT_KV_DTYPES = {
    "fp8_e5m2": "two bits of mantissa lose more than e4m3's three: use fp8",
    "fp8_inc": "it is for Intel Gaudi: use fp8",
    "fp8_ds_mla": "DeepSeek's keys and values are kept expanded: use fp8",
    "nvfp4": "there is no cache of 4 bits: use fp8",
    **dict.fromkeys(("bfloat16", "float16"), "otherwise keys and values are in the model's type, which --dtype says: use auto"),
}


def kv_dtype_of(name: str) -> str:
    """Our name of a value of --kv-cache-dtype. ValueError with the reason for one of vLLM's that there is not; others are left."""
    if name in NOT_KV_DTYPES:
        raise ValueError(f"'{name}' is vLLM's and not here: {NOT_KV_DTYPES[name]}")
    return KV_DTYPES.get(name, name)


# LoRAX reads each flag from the environment too. What other programs set as well is left alone, single common words for example.
_NOT_ITS_OWN = ("master-addr", "master-port", "huggingface-hub-cache")
LORAX_VARIABLES = {
    name.replace("-", "_").upper(): name for name in LORAX if ("-" in name and name not in _NOT_ITS_OWN) or name in ("quantize", "sharded")
}


def find(flag: str) -> tuple[Literal["LoRAX", "vLLM"], Foreign] | None:
    """Whose flag it is (without the dashes) and what it is here."""
    for owner, flags in (("LoRAX", LORAX), ("vLLM", VLLM)):
        if flag in flags:
            return owner, flags[flag]  # type: ignore[return-value]
    return None


def refusal(origin: str, flag: str, value: str) -> str | None:
    """Why the flag of another server cannot be had with that value, or None if the value asks for nothing. `origin`: how it was said."""
    found = find(flag)
    assert found is not None
    owner, foreign = found
    if value.strip().lower() in foreign.asks_nothing:
        return None
    hint = f"use --{foreign.instead}" if foreign.instead else "not here"
    allowed = f" (passes: {', '.join(foreign.asks_nothing)})" if foreign.asks_nothing else ""
    return f"{origin} is {owner}'s; {hint}{': ' + foreign.why if foreign.why else ''}{allowed}"

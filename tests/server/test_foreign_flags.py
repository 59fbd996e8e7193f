"""Flags of LoRAX and vLLM: each works, or is refused with the reason or the name to use; docs/flags.md says the same."""

import typing

import pytest

from docs.flag_tables import lorax_flags, vllm_flags
from server.settings import Settings, SettingsError, read_settings
from server.settings.foreign import LORAX, LORAX_VARIABLES, NOT_KV_DTYPES, NOT_QUANTIZE, QUANTIZE, SAME, VLLM

FOREIGN = [(owner, name) for owner, flags in (("LoRAX", LORAX), ("vLLM", VLLM)) for name in flags]


def read(*flags: str, env: dict | None = None) -> Settings:
    return read_settings(["--model-id", "m", *flags], env or {})


def is_setting(name: str) -> bool:
    return name.replace("-", "_") in Settings.model_fields


def test_all_of_loraxs_flags_are_known() -> None:
    assert len(LORAX) == 66


@pytest.mark.parametrize(("owner", "name"), FOREIGN, ids=lambda part: part)
def test_each_is_a_setting_or_has_a_reason(owner: str, name: str) -> None:
    foreign = (LORAX if owner == "LoRAX" else VLLM)[name]
    assert (foreign is SAME) <= is_setting(name)
    if is_setting(name):
        return
    assert foreign.instead is None or is_setting(foreign.instead)
    assert foreign.why or foreign.instead
    with pytest.raises(SettingsError) as caught:
        read(f"--{name}", "some-value")
    assert f"--{name} is " in str(caught.value) and foreign.why in str(caught.value)
    assert foreign.instead is None or f"use --{foreign.instead}" in str(caught.value)
    for value in foreign.asks_nothing:
        assert read(f"--{name}", value) == read() == read(f"--{name}={value}")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--compile"], None),
        (["--eager"], "--eager is LoRAX's; not here: the server decides at start (passes: false)"),
        (["-e"], "--env is LoRAX's"),
        (["--lora-modules", "a=b", "c=d"], "--lora-modules is vLLM's; use --adapters-dir"),
        (["--num-shard", "2", "--port", "5"], "--num-shard is LoRAX's; not here: one process drives one GPU"),
        (["--model", "m"], "--model is vLLM's; use --model-id: a folder"),
    ],
)
def test_words(flags: list[str], words: str | None) -> None:
    if words is None:
        assert read(*flags) == read()
        return
    with pytest.raises(SettingsError) as caught:
        read(*flags)
    assert words in str(caught.value)


def test_variables_are_read_like_the_flags() -> None:
    assert read(env={"QUANTIZE": "awq"}).quantize == "awq"
    assert read(env={"NUM_SHARD": "1", "SHARDED": "", "COMPILE": "x", "MASTER_ADDR": "x", "HUGGINGFACE_HUB_CACHE": "/data"}) == read()
    cors = read(env={"CORS_ALLOW_ORIGIN": "https://a, https://b", "CORS_ALLOW_CREDENTIALS": "true"})
    assert cors.cors_allow_origin == ["https://a", "https://b"] and cors.cors_allow_credentials is True
    for variable, name in LORAX_VARIABLES.items():
        field = Settings.model_fields.get(name.replace("-", "_"))
        assert field is None or field.json_schema_extra["lorax"] == variable, f"{name}: LoRAX reads {variable}"


def test_loraxs_quantizations_are_ours_or_have_a_reason() -> None:
    # server/src of lorax-launcher 0.12: the values of --quantize
    theirs = ["bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4", "gptq", "awq", "eetq", "hqq-4bit", "hqq-3bit", "hqq-2bit", "exl2",
              "fp8", "fp8-kv"]  # fmt: skip
    ours = typing.get_args(typing.get_args(Settings.model_fields["quantize"].annotation)[0])
    for name in theirs:
        if name in NOT_QUANTIZE:
            with pytest.raises(SettingsError) as caught:
                read("--quantize", name)
            assert f"'{name}' is LoRAX's and not here: {NOT_QUANTIZE[name]}" in str(caught.value)
        else:
            assert read("--quantize", name).quantize == QUANTIZE.get(name, name) and QUANTIZE.get(name, name) in ours
    with pytest.raises(SettingsError, match="--quantize .flag.: Input should be 'fp8', 'int8'"):
        read("--quantize", "int5")
    assert read("--quantize", "auto").quantize is None
    with pytest.raises(SettingsError, match="quantize_head needs a scheme that quantizes while loading"):
        read("--quantize", "awq", "--quantize-head")


def test_vllms_cache_types_are_ours_or_have_a_reason() -> None:
    # vllm/config/cache.py, CacheDType
    for name in ("auto", "fp8", "fp8_e4m3"):
        assert read("--kv-cache-dtype", name).kv_cache_dtype == ("auto" if name == "auto" else "fp8")
        assert read(env={"MANYLORA_KV_CACHE_DTYPE": name}) == read("--kv-cache-dtype", name)
    for name in ("bfloat16", "float16", "fp8_e5m2", "fp8_inc", "fp8_ds_mla", "nvfp4"):
        with pytest.raises(SettingsError) as caught:
            read("--kv-cache-dtype", name)
        assert f"--kv-cache-dtype (flag): '{name}' is vLLM's and not here: {NOT_KV_DTYPES[name]}" in str(caught.value)
    with pytest.raises(SettingsError, match="--kv-cache-dtype .flag.: Input should be 'auto' or 'fp8'. Given: 'int8'"):
        read("--kv-cache-dtype", "int8")
    with pytest.raises(SettingsError, match="two settings here: --quantize fp8 for the weights, --kv-cache-dtype fp8"):
        read("--quantize", "fp8-kv")


def test_the_launchers_line_starts_us_too() -> None:
    settings = read("--max-input-length", "1000", "--max-total-tokens", "1100", "--max-batch-prefill-tokens", "2000", "-p", "8080",
                    "--hostname", "0.0.0.0", "--max-concurrent-requests", "9", "--prefix-caching", "true", "--json-output",
                    "--preloaded-adapter-ids", "a", "--preloaded-adapter-ids", "b", "--dtype", "bfloat16", "--chunked-prefill", "true",
                    "--num-shard", "1")  # fmt: skip
    assert (settings.max_input_length, settings.port, settings.hostname, settings.json_output) == (1000, 8080, "0.0.0.0", True)
    assert settings.preloaded_adapter_ids == ["a", "b"] and settings.prefix_caching is True


def test_the_page_has_every_flag() -> None:
    for table, flags in ((lorax_flags(), LORAX), (vllm_flags(), VLLM)):
        assert all(f"| `--{name}` |" in table for name in flags)

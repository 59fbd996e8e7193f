"""The tables of docs/flags.md: what the flags of LoRAX's launcher and of vLLM's server are here. Called by docs.tables."""

from collections.abc import Mapping

from server.settings import Settings
from server.settings.foreign import KV_DTYPES, LORAX, LORAX_VARIABLES, NOT_KV_DTYPES, NOT_QUANTIZE, QUANTIZE, VLLM, Foreign


def lorax_flags() -> str:
    """Every flag of lorax-launcher."""
    return _table(LORAX, with_variable=True)


def vllm_flags() -> str:
    """The flags of vLLM's server that its users set."""
    return _table(VLLM, with_variable=False)


def quantization_names() -> str:
    """LoRAX's values of --quantize that are called otherwise here, or refused."""
    return _names("LoRAX", QUANTIZE, NOT_QUANTIZE)


def kv_names() -> str:
    """vLLM's values of --kv-cache-dtype that are called otherwise here, or refused."""
    return _names("vLLM", KV_DTYPES, NOT_KV_DTYPES)


def _names(owner: str, taken: Mapping[str, str], refused: Mapping[str, str]) -> str:
    rows = [f"| {owner}'s name | here | why |", "|---|---|---|"]
    rows += [f"| `{name}` | `{ours}` | |" for name, ours in taken.items()]
    rows += [f"| `{name}` | refused | {why} |" for name, why in refused.items()]
    return "\n".join(rows)


def _table(flags: Mapping[str, Foreign], *, with_variable: bool) -> str:
    rows = ["| flag | here | why, or what it is |", "|---|---|---|"]
    for name, foreign in flags.items():
        setting = Settings.model_fields.get(name.replace("-", "_"))
        if setting is not None:
            assert isinstance(setting.json_schema_extra, dict)
            variable = setting.json_schema_extra["lorax"]
            same = f"same, also `{variable}`" if with_variable and variable else "same"
            rows.append(f"| `--{name}` | {same} | {setting.description} |")
            continue
        here = f"`--{foreign.instead}`" if foreign.instead else "refused"
        passes = f"; passes: {', '.join(f'`{value}`' for value in foreign.asks_nothing)}" if foreign.asks_nothing else ""
        unread = with_variable and name.replace("-", "_").upper() not in LORAX_VARIABLES
        note = " (its variable is not read: other programs set it too)" if unread else ""
        rows.append(f"| `--{name}` | {here} | {foreign.why}{passes}{note} |")
    return "\n".join(rows)

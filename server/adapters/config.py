"""adapter_config.json of PEFT -> LoraConfig, strictly: every field is applied, inert at inference, or refused by name.

Owns the table of fields (PEFT 0.21.2, `peft.LoraConfig`) and their types. It knows neither the base nor the weights. Called by plan.py.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from server.adapters.refusal import quote, quote_some, refuse

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_PATTERN_LEN = 4096
_MAX_NUMBER = 1 << 53  # whole numbers beyond it are no longer exact as floats, and no field means one


@dataclass(frozen=True)
class LoraConfig:
    """What of PEFT's LoraConfig decides an answer. Field by field PEFT's meaning and default."""

    r: int = 8
    target_modules: list[str] | str = ""
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    use_dora: bool = False
    lora_bias: bool = False
    ensure_weight_tying: bool = False


Check = Callable[[Any], bool]


@dataclass(frozen=True)
class Field:
    """What this server does with a field: "applied", "inert" (no effect at inference) or "refused" (unless it has no effect).

    applied: `check` is what the value must be, `reason` says it in words. refused: `reason` is why, `check` knows the harmless values.
    """

    kind: Literal["applied", "inert", "refused"]
    reason: str
    check: Check = lambda value: _is_empty(value)


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) <= _MAX_NUMBER


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MAX_NUMBER  # false for NaN


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_PATTERN_LEN


def _is_list(item: Check) -> Check:
    return lambda value: isinstance(value, list) and all(item(v) for v in value)


def _is_map(item: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(_is_pattern(k) and item(v) for k, v in value.items())


def _is_any(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def _is_none(value: Any) -> bool:
    return value is None


def _is_token_id(value: Any) -> bool:
    return _is_int(value) and value >= 0


_names = _is_list(_is_pattern)
_token_ids = _is_list(_is_token_id)
_FLAG = ("true or false", lambda value: isinstance(value, bool))
# Initializations after which the base's weights are as they were; anything else subtracts from them (PEFT tuners/lora/layer.py).
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")


def _keeps_base(value: Any) -> bool:
    return value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in _HARMLESS_INITS)


def _applied(reason: str, check: Check) -> Field:
    return Field("applied", reason, check)


FIELDS: dict[str, Field] = {
    "r": _applied("a whole number above 0", lambda value: _is_int(value) and value > 0),
    "target_modules": _applied(
        "a list of names, a pattern or 'all-linear' (null leaves the choice to PEFT's version: write the names)",
        _is_any(_is_pattern, _names),
    ),
    "exclude_modules": _applied("a list of names, a pattern or null", _is_any(_is_none, _is_pattern, _names, _is_empty)),
    "lora_alpha": _applied("a finite number", _is_number),
    "bias": _applied("'none', 'all' or 'lora_only'", lambda value: value in ("none", "all", "lora_only")),
    "use_rslora": _applied(*_FLAG),
    "modules_to_save": _applied("a list of names or null", _is_any(_is_none, _names)),
    "layers_to_transform": _applied("a whole number, a list of them or null", _is_any(_is_none, _is_int, _is_list(_is_int))),
    "layers_pattern": _applied("a name, a list of names or null", _is_any(_is_none, _is_empty, _is_pattern, _names)),
    "rank_pattern": _applied(
        "an object of pattern to whole number above 0", _is_any(_is_none, _is_map(lambda value: _is_int(value) and value > 0))
    ),
    "alpha_pattern": _applied("an object of pattern to finite number", _is_any(_is_none, _is_map(_is_number))),
    "trainable_token_indices": _applied(
        "a list of token ids, an object of module to such lists, or null", _is_any(_is_none, _token_ids, _is_map(_token_ids))
    ),
    "use_dora": _applied(*_FLAG),
    "lora_bias": _applied(*_FLAG),
    "ensure_weight_tying": _applied(*_FLAG),
    "task_type": Field("inert", "the tensors say what is applied; another task's head is refused by its key"),
    "auto_mapping": Field("inert", "names the class that PEFT wrapped"),
    "peft_version": Field("inert", "says who wrote the file"),
    "base_model_name_or_path": Field("inert", "a name alone; shapes and module paths are what is checked"),
    "revision": Field("inert", "a name alone"),
    "inference_mode": Field("inert", "says whether weights are trainable"),
    "lora_dropout": Field("inert", "dropout is off at inference"),
    "fan_in_fan_out": Field("inert", "PEFT sets it by the module's class, and so does the base's layout"),
    "megatron_core": Field("inert", "used with megatron_config alone, which is refused"),
    "qalora_group_size": Field("inert", "used with use_qalora alone, which is refused"),
    "runtime_config": Field("inert", "never saved; offload during initialization"),
    "loftq_config": Field("inert", "used with init_lora_weights 'loftq' alone, which is refused"),
    "eva_config": Field("inert", "initialization; the base is left as it is"),
    "corda_config": Field("inert", "used with init_lora_weights 'corda' alone, which is refused"),
    "lora_ga_config": Field("inert", "used with init_lora_weights 'lora_ga' alone, which is refused"),
    "peft_type": Field("refused", "only LORA adapters can be served", lambda value: value == "LORA"),
    "init_lora_weights": Field(
        "refused",
        "this initialization changes the base's weights. Convert the adapter: PEFT's save_pretrained with "
        "path_initial_model_for_weight_conversion writes one for the unchanged base (init_lora_weights is then true)",
        _keeps_base,
    ),
    "megatron_config": Field("refused", "Megatron's parallel layers are not supported"),
    "layer_replication": Field("refused", "the base would have to run other layers than it has"),
    "target_parameters": Field("refused", "LoRA on bare parameters (3-D experts) is not supported"),
    "use_qalora": Field("refused", "QALoRA pools its inputs, which is not supported"),
    "alora_invocation_tokens": Field("refused", "activated LoRA switches on inside a prompt, which is not supported"),
    "arrow_config": Field("refused", "Arrow routes between adapters, which is not supported"),
    "use_bdlora": Field("refused", "block-diagonal factors are not supported"),
    "velora_config": Field("refused", "VeLoRA layers are not supported"),
    "kasa_config": Field("refused", "KaSA truncates the base's weights"),
    "monteclora_config": Field("refused", "MonteCLoRA samples its weights, which is not supported"),
}


def read_config(folder: Path) -> LoraConfig:
    """The folder's adapter_config.json. AdapterRefused if it is missing, no JSON object, or says what is not supported."""
    path = folder / CONFIG_NAME
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise refuse(f"{CONFIG_NAME} cannot be read ({type(error).__name__})", param=CONFIG_NAME) from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise refuse(f"{CONFIG_NAME} is larger than {MAX_CONFIG_BYTES} bytes", param=CONFIG_NAME)
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise refuse(f"{CONFIG_NAME} is not JSON ({type(error).__name__})", param=CONFIG_NAME) from error
    if not isinstance(values, dict):
        raise refuse(f"{CONFIG_NAME} must be a JSON object", param=CONFIG_NAME)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> LoraConfig:
    """A config that was read as JSON. A field that is not there has PEFT's default; `peft_type` and `target_modules` must be there."""
    for name in ("peft_type", "target_modules"):
        if name not in values:
            raise refuse(f"{CONFIG_NAME}: {name} is missing", param=name)
    for name, value in values.items():
        field = FIELDS.get(name)
        if field is None:
            if not _is_empty(value):
                raise refuse(f"{CONFIG_NAME}: field {quote(name)} is not known (value {quote(value)}), so it cannot be applied", param=name)
        elif field.kind == "applied" and not field.check(value):
            raise refuse(f"{CONFIG_NAME}: {name} must be {field.reason}, not {quote(value)}", param=name)
        elif field.kind == "refused" and not field.check(value):
            raise refuse(f"{CONFIG_NAME}: {name} is {quote(value)}: {field.reason}", param=name)
    config = LoraConfig(**{field.name: values[field.name] for field in fields(LoraConfig) if field.name in values})
    _check_together(config)
    return config


def _check_together(config: LoraConfig) -> None:
    """The combinations that PEFT's own constructor refuses, so that nothing it could not have trained gets through."""
    by_pattern = isinstance(config.target_modules, str)
    for name in ("layers_to_transform", "layers_pattern"):
        if by_pattern and getattr(config, name) is not None:
            raise refuse(f"{CONFIG_NAME}: {name} needs target_modules to be a list", param=name)
    if config.layers_pattern and config.layers_to_transform is None:
        raise refuse(f"{CONFIG_NAME}: layers_pattern needs layers_to_transform", param="layers_pattern")
    if config.lora_bias and config.use_dora:
        raise refuse(f"{CONFIG_NAME}: lora_bias cannot be combined with use_dora", param="lora_bias")
    if isinstance(config.trainable_token_indices, dict):
        both = [name for name in config.trainable_token_indices if name in (config.modules_to_save or [])]
        if both:
            raise refuse(f"{CONFIG_NAME}: {quote_some(both)} is in trainable_token_indices and in modules_to_save", param=both[0])

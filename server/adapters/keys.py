"""The names of tensors in a PEFT file -> what each of them is: a delta's factor, or a parameter that is replaced.

Owns PEFT's naming (0.21.2, utils/save_and_load.py) and which modules exist; not what the config wants of them. Called by plan.py.
"""

import difflib
import re
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from server.adapters.refusal import quote, quote_some, refuse
from server.adapters.tensors import StoredTensor
from server.types import BaseLayout

PREFIX = "base_model.model."
Role = Literal["a", "b", "embedding_a", "embedding_b", "bias", "magnitude", "tokens", "parameter"]

# PEFT takes the adapter's name out of the keys; one saved by hand still has "default", and PEFT loads it all the same.
_DELTA_SUFFIXES: dict[str, Role] = {
    r"lora_A(\.default)?\.weight": "a",
    r"lora_B(\.default)?\.weight": "b",
    r"lora_B(\.default)?\.bias": "bias",
    r"lora_embedding_A(\.default)?": "embedding_a",
    r"lora_embedding_B(\.default)?": "embedding_b",
    r"lora_magnitude_vector(\.default)?(\.weight)?": "magnitude",
    r"token_adapter\.trainable_tokens_delta(\.default)?": "tokens",
}
_DELTA = [(re.compile(rf"(?P<module>.+)\.{suffix}"), role) for suffix, role in _DELTA_SUFFIXES.items()]
_PARAMETER = re.compile(
    r"(?P<module>.+?)\.((?P<wrapper>base_layer|token_adapter\.base_layer|original_module|modules_to_save)(\.default)?\.)?(?P<parameter>[^.]+)"
)


class TensorKey(NamedTuple):
    """What a key names. `wrapper` is where PEFT puts a parameter whose module it wrapped ("" for one that it did not)."""

    module: str
    role: Role
    wrapper: str = ""
    parameter: str = ""


@dataclass
class ModuleTensors:
    """All that a file has for one module: factors by role, parameters by (wrapper, name)."""

    factors: dict[Role, StoredTensor] = field(default_factory=dict)
    parameters: dict[tuple[str, str], StoredTensor] = field(default_factory=dict)


def parse_key(key: str) -> TensorKey:
    """What the key names. AdapterRefused if PEFT writes no such key for LoRA."""
    if not key.startswith(PREFIX):
        raise refuse(f"tensor {quote(key)}: keys of a PEFT file begin with {quote(PREFIX)}", param=key)
    rest = key.removeprefix(PREFIX)
    for pattern, role in _DELTA:
        found = pattern.fullmatch(rest)
        if found:
            return TensorKey(found["module"], role)
    found = _PARAMETER.fullmatch(rest)
    if found is None or "lora_" in rest:
        raise refuse(f"tensor {quote(key)} is no tensor of plain LoRA or DoRA", param=key)
    return TensorKey(found["module"], "parameter", found["wrapper"] or "", found["parameter"])


def sort_tensors(tensors: dict[str, StoredTensor], layout: BaseLayout) -> dict[str, ModuleTensors]:
    """The file's tensors by module path. AdapterRefused: an unknown key, a module that the base has not, two tensors for one thing."""
    known = {module.name for module in layout.modules}
    sorted_tensors: dict[str, ModuleTensors] = {}
    for key, tensor in tensors.items():
        parsed = parse_key(key)
        if parsed.module not in known:
            near = difflib.get_close_matches(parsed.module, known, n=3)
            hint = f"; nearest: {quote_some(near)}" if near else ""
            raise refuse(f"tensor {quote(key)}: the base has no module {quote(parsed.module)}{hint}", param=key)
        module = sorted_tensors.setdefault(parsed.module, ModuleTensors())
        place = (parsed.wrapper, parsed.parameter)
        other = module.parameters.get(place) if parsed.role == "parameter" else module.factors.get(parsed.role)
        if other is not None:
            raise refuse(f"tensors {quote(other.key)} and {quote(key)} are for one thing", param=key)
        if parsed.role == "parameter":
            module.parameters[place] = tensor
        else:
            module.factors[parsed.role] = tensor
    return sorted_tensors

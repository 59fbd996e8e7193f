"""What an adapter replaces whole: modules_to_save, trained biases, embeddings of a resized vocabulary.

Owns which tensor stands for which parameter of the base, a tied head included. It does not fold deltas or lay anything out (plan.py does).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from server.adapters.config import LoraConfig
from server.adapters.keys import PREFIX, ModuleTensors
from server.adapters.match import Targets
from server.adapters.parts import hash_weight
from server.adapters.refusal import quote, quote_some, refuse
from server.adapters.tensors import StoredTensor, is_same
from server.types import BaseLayout, Site

Parameter = tuple[str, str]  # module path, parameter's name


@dataclass
class Replacements:
    """Parameters that the adapter replaces: `saved` belong to modules_to_save, `base` overwrite the base's own (a tied head's too)."""

    saved: dict[Parameter, StoredTensor] = field(default_factory=dict)
    base: dict[Parameter, StoredTensor] = field(default_factory=dict)

    def get(self, module: str, parameter: str) -> StoredTensor | None:
        """The tensor that stands for a parameter, if any."""
        return self.saved.get((module, parameter)) or self.base.get((module, parameter))

    def items(self) -> Iterator[tuple[Parameter, StoredTensor]]:
        """Every replaced parameter once."""
        return iter({**self.base, **self.saved}.items())


class ReplacementFinder:
    """Finds an adapter's replacements. AdapterRefused names the key or field of whatever the config does not explain."""

    def __init__(self, config: LoraConfig, targets: Targets, tensors: dict[str, ModuleTensors], layout: BaseLayout) -> None:
        self._config, self._targets, self._tensors, self._layout = config, targets, tensors, layout
        self._sites: dict[str, Site] = {site.name: site for site in layout.sites}
        self._modules = {module.name: module for module in layout.modules}
        self._tied = (layout.embedding, layout.head)

    def find(self) -> Replacements:
        """All replacements, checked for shape and completeness."""
        found = Replacements()
        for name, module in self._tensors.items():
            for (wrapper, parameter), tensor in module.parameters.items():
                self._check_shape(name, parameter, tensor)
                self._place(found, name, wrapper, parameter, tensor)
        self._check_saved_complete(found)
        self._check_biases_complete(found)
        self._spread_tied(found)
        self._drop_unchanged(found)
        return found

    def _place(self, found: Replacements, name: str, wrapper: str, parameter: str, tensor: StoredTensor) -> None:
        if self._targets.saves(name):
            if wrapper == "":
                found.saved[name, parameter] = tensor
            elif wrapper == "modules_to_save":  # the resized embedding's own copy, which PEFT writes a second time and does not read
                own = self._tensors[name].parameters.get(("", parameter))
                if own is None or not is_same(own, tensor):
                    raise refuse(f"tensor {quote(tensor.key)} is not the same as {quote(f'{PREFIX}{name}.{parameter}')}", param=tensor.key)
            elif wrapper == "original_module":  # what the saved module stands in for: read by a tied head or embedding alone
                found.base[name, parameter] = tensor
            else:
                raise refuse(f"tensor {quote(tensor.key)}: modules_to_save has the whole module", param=tensor.key)
            return
        if wrapper != self._wrapper_of(name):
            raise refuse(f"tensor {quote(tensor.key)}: with this config PEFT has no parameter of that name", param=tensor.key)
        if not self._is_explained(name, parameter):
            raise refuse(f"tensor {quote(tensor.key)} replaces a weight of the base, and no field of the config says so", param=tensor.key)
        found.base[name, parameter] = tensor

    def _wrapper_of(self, name: str) -> str:
        """Where PEFT has the base's own parameters of a module that it did not save whole."""
        if name in self._targets.lora:
            return "base_layer"
        return "token_adapter.base_layer" if name in self._targets.tokens else ""

    def _is_explained(self, name: str, parameter: str) -> bool:
        if name in self._tied:  # PEFT saves both when the vocabulary was resized (save_embedding_layers)
            return parameter in ("weight", "bias")
        bias = self._config.bias
        return parameter == "bias" and (bias == "all" or (bias == "lora_only" and name in self._targets.lora))

    def _check_shape(self, name: str, parameter: str, tensor: StoredTensor) -> None:
        if parameter not in self._modules[name].parameters:
            raise refuse(f"tensor {quote(tensor.key)}: the base's {quote(name)} has no parameter {quote(parameter)}", param=tensor.key)
        if name not in self._sites and not self._modules[name].replaceable:
            class_name = self._modules[name].class_name
            raise refuse(f"tensor {quote(tensor.key)}: a module of class {class_name} cannot be replaced for one adapter", param=tensor.key)
        shape, expected = list(tensor.shape), self._shape_of(name, parameter)
        grows = name in self._tied and len(shape) == len(expected) and shape[0] > expected[0]
        if shape[1:] != expected[1:] or (shape != expected and not grows):
            allowed = f"{expected}" + (" (or more rows)" if name in self._tied else "")
            raise refuse(f"tensor {quote(tensor.key)} has shape {shape}; the base has {allowed}", param=tensor.key)

    def _shape_of(self, name: str, parameter: str) -> list[int]:
        site = self._sites.get(name)
        if site is None or parameter not in ("weight", "bias"):
            return self._modules[name].parameters[parameter]
        if parameter == "bias":
            return [site.out_features]
        wide_first = site.kind == "embedding" or site.transposed
        return [site.in_features, site.out_features] if wide_first else [site.out_features, site.in_features]

    def _check_saved_complete(self, found: Replacements) -> None:
        missing = []
        for module in self._layout.modules:
            if self._targets.saves(module.name):
                wanted = ["weight"] if module.name in self._targets.tied_saved else module.parameters
                missing += [f"{PREFIX}{module.name}.{p}" for p in wanted if (module.name, p) not in found.saved]
        if missing:
            raise refuse(f"modules_to_save: the file has no {quote_some(missing)}", param="modules_to_save")
        for head in self._targets.tied_saved:
            if head not in self._sites or self._sites[head].has_bias:
                raise refuse(f"modules_to_save: PEFT drops the bias of {quote(head)} when it ties it", param="modules_to_save")
            if not is_same(found.saved[head, "weight"], found.saved[self._layout.embedding, "weight"]):
                raise refuse("ensure_weight_tying: the file's embedding and head differ", param="ensure_weight_tying")

    def _check_biases_complete(self, found: Replacements) -> None:
        """bias says that biases were trained; without them the base's would answer in silence."""
        if self._config.bias == "none":
            return
        missing = []
        for module in self._layout.modules:
            meant = self._config.bias == "all" or module.name in self._targets.lora
            if meant and "bias" in module.parameters and found.get(module.name, "bias") is None:
                missing.append(f"{PREFIX}{module.name}.bias")
        if missing:
            raise refuse(f"bias is {quote(self._config.bias)}, and the file has no {quote_some(missing)}", param="bias")

    def _spread_tied(self, found: Replacements) -> None:
        """A tied head and its embedding are one parameter of the base: PEFT's load into one is a load into both."""
        if not self._layout.tied_head:
            return
        given = [found.base[name, "weight"] for name in self._tied if (name, "weight") in found.base]
        if len(given) == 2 and not is_same(*given):
            raise refuse(f"tensors {quote(given[0].key)} and {quote(given[1].key)} are one tied weight and differ", param=given[1].key)
        for name in self._tied if given else ():
            found.base[name, "weight"] = given[0]

    def _drop_unchanged(self, found: Replacements) -> None:
        """PEFT saves the base's own embedding whenever a delta is on it: that copy is no replacement."""
        for name in self._tied:
            known = self._layout.weight_hashes.get(name)
            tensor = found.base.get((name, "weight"))
            if known and tensor is not None and hash_weight(tensor.part(), self._layout.dtype) == known:
                del found.base[name, "weight"]

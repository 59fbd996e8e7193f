"""A PEFT folder and a base's layout -> what a pack of it holds, or AdapterRefused with the key or field and the reason.

Owns shapes, ranks and scales of deltas, and how deltas, replaced weights and trained tokens of one module come together. Called by pack.py.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.adapters.config import LoraConfig, read_config
from server.adapters.keys import ModuleTensors, Role, sort_tensors
from server.adapters.match import PatternValue, Targets, resolve_targets
from server.adapters.parts import Contents, SiteParts, as_part, check_finite, fold_delta, with_rows
from server.adapters.refusal import quote, quote_some, refuse
from server.adapters.replacements import ReplacementFinder, Replacements
from server.adapters.tensors import StoredTensor, is_same, open_tensors
from server.types import BaseLayout, Site


@contextmanager
def plan_folder(folder: Path, layout: BaseLayout) -> Iterator[Contents]:
    """What a pack of the adapter in `folder` holds on this base. Its parts can be read while the context is open."""
    config = read_config(folder)
    with open_tensors(folder) as tensors:
        yield _Planner(config, sort_tensors(tensors, layout), layout).plan()


class _Planner:
    """One adapter on one base. Every tensor is used by exactly one of the steps of plan(), or refused by name."""

    def __init__(self, config: LoraConfig, tensors: dict[str, ModuleTensors], layout: BaseLayout) -> None:
        self._config, self._tensors, self._layout = config, tensors, layout
        self._targets: Targets = resolve_targets(config, layout)
        self._sites: dict[str, tuple[int, Site]] = {site.name: (index, site) for index, site in enumerate(layout.sites)}
        self._ranks = PatternValue("rank_pattern", config.rank_pattern, config.r)
        self._alphas = PatternValue("alpha_pattern", config.alpha_pattern, config.lora_alpha)
        self._parts: dict[int, SiteParts] = {}

    def plan(self) -> Contents:
        self._check_targets()
        replacements = ReplacementFinder(self._config, self._targets, self._tensors, self._layout).find()
        self._check_factors()
        contents = Contents(vocab_size=self._vocab_size(replacements))
        tokens = self._token_rows(replacements)
        for (module, parameter), tensor in replacements.items():
            self._replace(contents, module, parameter, tensor, tokens)
        for module in sorted(self._targets.lora):
            self._add_delta(module, replacements)
        self._check_tied_delta()
        contents.sites = [self._parts[index] for index in sorted(self._parts)]
        shared = {id(rows): rows.part() for _, rows in tokens.values()}
        contents.tokens = [
            (module, ids, shared[id(rows)]) for module, (ids, rows) in tokens.items() if replacements.get(module, "weight") is None
        ]
        if not (contents.sites or contents.overrides or contents.tokens):
            raise refuse("the adapter changes nothing of this base", param="target_modules")
        return contents

    def _check_targets(self) -> None:
        """Every module that the config targets must be a site, and nothing else may be wanted of it."""
        classes = {module.name: module.class_name for module in self._layout.modules}
        for module in sorted(self._targets.lora):
            if module not in self._sites:
                what = f"{quote(module)} (class {classes[module]})"
                raise refuse(f"target_modules: {what} is no layer that LoRA can be on", param="target_modules")
            site = self._sites[module][1]
            if module in self._targets.tokens:
                raise refuse(f"trainable_token_indices: {quote(module)} is in target_modules too", param="trainable_token_indices")
            if self._targets.saves(module):
                raise refuse(f"modules_to_save: {quote(module)} is in target_modules too", param="modules_to_save")
            if site.kind == "embedding" and self._config.lora_bias:
                raise refuse(f"lora_bias: {quote(module)} is an embedding", param="lora_bias")
            if site.kind == "embedding" and self._config.use_dora:
                raise refuse(f"use_dora: DoRA on an embedding ({quote(module)}) is not supported", param="use_dora")
        for module in self._targets.tokens:
            if self._targets.saves(module):
                raise refuse(f"trainable_token_indices: {quote(module)} is in modules_to_save too", param="trainable_token_indices")

    def _roles(self, module: str) -> set[Role]:
        """The factors that the file must have for a module, no more and no less."""
        if module in self._targets.lora:
            if self._sites[module][1].kind == "embedding":
                return {"embedding_a", "embedding_b"}
            roles: set[Role] = {"a", "b"}
            if self._config.use_dora:
                roles.add("magnitude")
            if self._config.lora_bias:
                roles.add("bias")
            return roles
        if module in self._targets.tokens and module not in self._targets.tied_tokens:
            return {"tokens"}
        return set()

    def _check_factors(self) -> None:
        """Missing and unexplained factors are refused: the first would be base output, the second a trained tensor that is ignored."""
        missing = []
        for module in sorted(self._targets.lora | self._targets.tokens.keys()):
            held = self._tensors[module].factors if module in self._tensors else {}
            missing += [f"{module} ({role})" for role in sorted(self._roles(module) - held.keys())]
        if missing:
            raise refuse(f"the config targets modules that the file has no tensors for: {quote_some(missing)}", param="target_modules")
        for name, of_module in self._tensors.items():
            for role, tensor in of_module.factors.items():
                tied = role == "tokens" and name in self._targets.tied_tokens
                if role not in self._roles(name) and not tied:
                    why = self._why_not(name, role)
                    raise refuse(f"tensor {quote(tensor.key)}: the config does not explain it ({why})", param=tensor.key)

    def _why_not(self, module: str, role: Role) -> str:
        if role == "tokens":
            return "trainable_token_indices does not name the module"
        if module not in self._targets.lora:
            return "target_modules does not match the module, or exclude_modules, modules_to_save or layers_to_transform rule it out"
        if role in ("magnitude", "bias"):
            return "use_dora is false" if role == "magnitude" else "lora_bias is false"
        return f"the module is a layer of kind {self._sites[module][1].kind}"

    def _vocab_size(self, replacements: Replacements) -> int:
        """Rows of the head; embedding and head must have grown alike, or one would not know the other's tokens."""
        layout = self._layout
        grown = {}
        for name in (layout.embedding, layout.head):
            weight = replacements.get(name, "weight")
            grown[name] = 0 if weight is None else weight.shape[0] - self._rows_of(name)
            bias = replacements.get(name, "bias")
            has_bias = name in self._sites and self._sites[name][1].has_bias
            bias_rows = self._rows_of(name) if bias is None else bias.shape[0]
            if has_bias and bias_rows != self._rows_of(name) + grown[name]:
                raise refuse(f"{quote(f'{name}.bias')} must have as many rows as {quote(f'{name}.weight')}", param=f"{name}.bias")
        if grown[layout.embedding] != grown[layout.head]:
            raise refuse(
                f"the vocabulary grew by {grown[layout.embedding]} rows in {quote(layout.embedding)} and by {grown[layout.head]} in "
                f"{quote(layout.head)}: save both (save_embedding_layers=True)",
                param="modules_to_save",
            )
        return self._rows_of(layout.head) + grown[layout.head]

    def _rows_of(self, module: str) -> int:
        if module not in self._sites:
            return self._layout.vocab_size
        site = self._sites[module][1]
        return site.in_features if site.kind == "embedding" else site.out_features

    def _site(self, module: str) -> SiteParts:
        index, site = self._sites[module]
        return self._parts.setdefault(index, SiteParts(index, group=site.group))

    def _replace(self, contents: Contents, module: str, parameter: str, tensor: StoredTensor, tokens: dict) -> None:
        if module not in self._sites:
            contents.overrides.append((module, parameter, tensor.part()))
        elif parameter == "bias":
            self._site(module).base_bias = tensor.part()
        else:
            part = tensor.transposed() if self._sites[module][1].transposed else tensor.part()
            if module in tokens:
                ids, rows = tokens[module]
                check_finite(rows.part())
                part = with_rows(part, ids, rows.read())
            self._site(module).weight = part

    def _add_delta(self, module: str, replacements: Replacements) -> None:
        site, factors = self._sites[module][1], self._tensors[module].factors
        embedding = site.kind == "embedding"
        a, b = factors["embedding_a" if embedding else "a"], factors["embedding_b" if embedding else "b"]
        rank, alpha = int(self._ranks.of(module)), self._alphas.of(module)
        scale = alpha / math.sqrt(rank) if self._config.use_rslora else alpha / rank
        weight = replacements.get(module, "weight")
        rows = self._rows_of(module) if weight is None else weight.shape[0]
        in_features, out_features = (rows, site.out_features) if embedding else (site.in_features, rows)
        expect_shape(a, (rank, in_features), "[rank, in]; the rank is from r and rank_pattern")
        expect_shape(b, (out_features, rank), "[out, rank]; the rank is from r and rank_pattern")
        magnitude, bias = factors.get("magnitude"), factors.get("bias")
        for vector in (magnitude, bias):
            if vector is not None:
                expect_shape(vector, (out_features,), "[out]")
        parts = self._site(module)
        if bias is not None:
            parts.bias = as_part(bias.key, bias.read().astype("float32") * scale)  # PEFT scales lora_B's output, its bias included
        if parts.weight is not None:
            for factor in (a, b, magnitude):  # folded away, not written: looked at here, so that a message names it
                if factor is not None:
                    check_finite(factor.part())
            rows_by_rank, rank_by_columns = (a.read().T, b.read().T) if embedding else (b.read(), a.read())
            if site.transposed:
                key = parts.weight.key
                raise refuse(f"tensor {quote(key)}: a delta on a replaced Conv1D weight is not supported", param=key)
            parts.weight = fold_delta(parts.weight, rows_by_rank, rank_by_columns, scale, None if magnitude is None else magnitude.read())
            return
        parts.rank, parts.scale = rank, scale
        parts.a = a.transposed() if embedding else a.part()
        parts.b = b.transposed()
        parts.magnitude = None if magnitude is None else magnitude.part()

    def _check_tied_delta(self) -> None:
        """ensure_weight_tying makes one delta of the embedding's and the head's; a file in which they differ has no meaning in PEFT."""
        for head in self._targets.tied_lora:
            if self._layout.embedding not in self._targets.lora:
                raise refuse("ensure_weight_tying: the config excludes the embedding that the head is tied to", param="ensure_weight_tying")
            own, source = self._tensors[head].factors, self._tensors[self._layout.embedding].factors
            for mine, theirs in ((own["a"], source["embedding_b"]), (own["b"], source["embedding_a"])):
                if mine.dtype != theirs.dtype or mine.shape != theirs.shape[::-1] or mine.read().tobytes() != theirs.read().T.tobytes():
                    raise refuse(f"ensure_weight_tying: tensors {quote(mine.key)} and {quote(theirs.key)} differ", param=mine.key)

    def _token_rows(self, replacements: Replacements) -> dict[str, tuple[list[int], StoredTensor]]:
        """Trained rows by module: [len(ids), hidden]."""
        found = {}
        for module, ids in self._targets.tokens.items():
            tied = module in self._targets.tied_tokens
            rows = self._tensors[self._layout.embedding if tied else module].factors["tokens"]
            own = self._tensors[module].factors.get("tokens") if module in self._tensors else None
            if own is not None and not is_same(own, rows):
                raise refuse(f"tensors {quote(own.key)} and {quote(rows.key)} are of one tied weight and differ", param=own.key)
            if module not in self._sites:
                message = f"trainable_token_indices: {quote(module)} is no layer whose rows can be replaced"
                raise refuse(message, param="trainable_token_indices")
            site = self._sites[module][1]
            if site.kind == "linear" and (site.has_bias or site.transposed):
                raise refuse(f"trainable_token_indices: PEFT drops the bias of {quote(module)}", param="trainable_token_indices")
            weight = replacements.get(module, "weight")
            num_rows = self._rows_of(module) if weight is None else weight.shape[0]
            if len(set(ids)) != len(ids) or any(token_id >= num_rows for token_id in ids):
                raise refuse(f"trainable_token_indices must be different ids below {num_rows}", param="trainable_token_indices")
            width = site.out_features if site.kind == "embedding" else site.in_features
            expect_shape(rows, (len(ids), width), "[tokens, hidden]")
            found[module] = (ids, rows)
        return found


def expect_shape(tensor: StoredTensor, shape: tuple[int, ...], meaning: str) -> None:
    """AdapterRefused if the tensor has another shape."""
    if tensor.shape != shape:
        raise refuse(f"tensor {quote(tensor.key)} has shape {list(tensor.shape)}, not {list(shape)} ({meaning})", param=tensor.key)

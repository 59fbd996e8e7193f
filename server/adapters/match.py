"""Which modules of the base a config means: PEFT's matching rules, exactly (PEFT 0.21.2, tuners_utils.check_target_module_exists and kin).

Owns names alone, no tensors. Patterns come from an untrusted file, so they run in `regex` against a deadline. Called by plan.py.
"""

import re
import time
from dataclasses import dataclass, field

import regex

from server.adapters.config import CONFIG_NAME, LoraConfig
from server.adapters.refusal import quote, quote_some, refuse
from server.types import BaseLayout

MATCH_SECONDS = 2.0  # for all patterns of one config; a catastrophic one would never end
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")  # PEFT's EMBEDDING_LAYER_NAMES
_COUNT = re.compile(r"(?P<group>\)?)\{(?P<least>\d*)(?:,(?P<most>\d*))?\}")
MAX_REPEATS = 1000  # of one count, and of the product of all counts on groups: nested ones are unrolled when they are compiled
_LINEAR_CLASSES = frozenset({"Linear", "Conv1D", "Linear4bit", "Linear8bitLt"})


class PatternMatcher:
    """Runs a config's patterns; all of them together may take MATCH_SECONDS. AdapterRefused names the field beyond that."""

    def __init__(self) -> None:
        self._deadline_at = time.monotonic() + MATCH_SECONDS
        self._compiled: dict[str, regex.Pattern] = {}

    def fullmatch(self, pattern: str, name: str, config_field: str) -> bool:
        """re.fullmatch(pattern, name)."""
        return self._run("fullmatch", pattern, name, config_field) is not None

    def match(self, pattern: str, name: str, config_field: str) -> "regex.Match | None":
        """re.match(pattern, name)."""
        return self._run("match", pattern, name, config_field)

    def _run(self, method: str, pattern: str, name: str, config_field: str) -> "regex.Match | None":
        left = self._deadline_at - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            if pattern not in self._compiled:
                _check_counts(pattern)
                self._compiled[pattern] = regex.compile(pattern)
            return getattr(self._compiled[pattern], method)(name, timeout=left)
        except TimeoutError as error:
            raise refuse(f"{CONFIG_NAME}: {config_field} takes too long to match ({quote(pattern)})", param=config_field) from error
        except (regex.error, RecursionError, OverflowError, ValueError) as error:
            raise refuse(f"{CONFIG_NAME}: {config_field} has a pattern that is not valid ({quote(pattern)})", param=config_field) from error


@dataclass(frozen=True)
class Targets:
    """What a config means on this base, by module path."""

    lora: frozenset[str]  # modules that get a delta
    saved: frozenset[str]  # modules replaced whole (modules_to_save), the matched ones, not their children
    tokens: dict[str, list[int]]  # modules with rows of their own (trainable_token_indices)
    tied_lora: frozenset[str] = frozenset()  # of lora: the head, whose delta is the embedding's (ensure_weight_tying)
    tied_saved: frozenset[str] = frozenset()  # of saved: the head, whose weight is the embedding's
    tied_tokens: frozenset[str] = frozenset()  # of tokens: the head, whose rows are the embedding's

    def saves(self, module: str) -> bool:
        """Whether a module is one of `saved` or inside one."""
        path = module
        while path:
            if path in self.saved:
                return True
            path = path.rpartition(".")[0]
        return False


@dataclass
class _Resolver:
    config: LoraConfig
    layout: BaseLayout
    matcher: PatternMatcher = field(default_factory=PatternMatcher)

    def __post_init__(self) -> None:
        self.names = [module.name for module in self.layout.modules]
        self.target_modules: str | set[str] = (
            self.config.target_modules if isinstance(self.config.target_modules, str) else set(self.config.target_modules)
        )
        self.modules_to_save = list(self.config.modules_to_save or [])
        self.tie_lora = self.tie_saved = False

    def resolve(self) -> Targets:
        if self.config.ensure_weight_tying and self.layout.tied_head:
            self._tie()
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            self.target_modules = self._all_linear()
        head = frozenset({self.layout.head})
        saved = {name for name in self.names if any(name.endswith(key) for key in self.modules_to_save)}
        lora = {name for name in self.names if not (self.tie_lora and name == self.layout.head) and self._is_targeted(name)}
        tokens, tied_tokens = self._tokens()
        return Targets(
            lora=frozenset(lora) | (head if self.tie_lora else frozenset()),
            saved=frozenset(saved) | (head if self.tie_saved else frozenset()),
            tokens=tokens,
            tied_lora=head if self.tie_lora else frozenset(),
            tied_saved=head if self.tie_saved else frozenset(),
            tied_tokens=tied_tokens,
        )

    def _is_targeted(self, name: str) -> bool:
        """PEFT's check_target_module_exists, in its order."""
        config = self.config
        exclude = config.exclude_modules
        if isinstance(exclude, str) and exclude:
            if self.matcher.fullmatch(exclude, name, "exclude_modules"):
                return False
        elif exclude and _has_suffix(name, set(exclude)):
            return False
        if any(self.matcher.match(rf"(^|.*\.){key}($|\..*)", name, "modules_to_save") for key in self.modules_to_save):
            return False
        if isinstance(self.target_modules, str):
            return self.matcher.fullmatch(self.target_modules, name, "target_modules")
        if name in self.target_modules:
            return True
        return _has_suffix(name, self.target_modules) and self._is_layer_meant(name)

    def _is_layer_meant(self, name: str) -> bool:
        layers, patterns = self.config.layers_to_transform, self.config.layers_pattern
        if layers is None or layers == []:
            return True
        found = None
        if not patterns:
            found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
        for pattern in ([patterns] if isinstance(patterns, str) else patterns) if patterns else ():
            found = self.matcher.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name, "layers_pattern")
            if found:
                break
        return found is not None and int(found["idx"]) in ([layers] if isinstance(layers, int) else layers)

    def _all_linear(self) -> set[str]:
        """Every linear but the output head (PEFT's _maybe_include_all_linear_layers)."""
        linears = {site.name for site in self.layout.sites if site.kind == "linear"}
        linears |= {module.name for module in self.layout.modules if module.class_name in _LINEAR_CLASSES}
        return linears - {self.layout.head}

    def _tie(self) -> None:
        """ensure_weight_tying on a base whose head is the embedding: the head follows, as LoraModel._add_*_to_tie has it."""
        embedding, head = self.layout.embedding, self.layout.head
        if any(name.split(".")[-1] in _EMBEDDING_NAMES for name in self.modules_to_save):
            self.tie_saved = True
            if embedding not in self.modules_to_save:
                self.modules_to_save.append(embedding)
            self._drop_first(self.modules_to_save, head, "modules_to_save")
        elif isinstance(self.target_modules, str):
            if any(self.matcher.fullmatch(self.target_modules, name, "target_modules") for name in _EMBEDDING_NAMES):
                self.tie_lora = True
                self.target_modules = rf"(?:{self.target_modules}|^{re.escape(embedding)}$)"
        elif any(name.split(".")[-1] in _EMBEDDING_NAMES for name in self.target_modules):
            self.tie_lora = True
            names = [*sorted(self.target_modules), embedding]
            self._drop_first(names, head, "target_modules")
            self.target_modules = set(names)

    def _drop_first(self, names: list[str], head: str, config_field: str) -> None:
        for name in names:
            if self.matcher.match(rf"(^|.*\.){name}($|\..*)", head, config_field):
                names.remove(name)
                return

    def _tokens(self) -> tuple[dict[str, list[int]], frozenset[str]]:
        """trainable_token_indices by module, and those that follow the embedding (PEFT's set_additional_trainable_modules)."""
        indices, layout = self.config.trainable_token_indices, self.layout
        if indices is None:
            return {}, frozenset()
        wanted = indices if isinstance(indices, dict) else {layout.embedding: indices}
        tokens: dict[str, list[int]] = {}
        for key, ids in wanted.items():
            modules = [name for name in self.names if name.endswith(key)]
            if not modules or any(name not in (layout.embedding, layout.head) for name in modules):
                message = f"{CONFIG_NAME}: trainable_token_indices: {quote(key)} must name the embedding ({layout.embedding})"
                raise refuse(f"{message} or the head ({layout.head}), not {quote_some(modules)}", param="trainable_token_indices")
            tokens |= dict.fromkeys(modules, ids)
        differ = len({tuple(ids) for ids in tokens.values()}) > 1
        if layout.tied_head and layout.embedding in tokens and not differ:
            tokens[layout.head] = tokens[layout.embedding]
            return tokens, frozenset({layout.head})
        if layout.tied_head and differ and self.config.ensure_weight_tying:
            raise refuse(
                f"{CONFIG_NAME}: trainable_token_indices differ between tied modules, and ensure_weight_tying is true",
                param="trainable_token_indices",
            )
        return tokens, frozenset()


def resolve_targets(config: LoraConfig, layout: BaseLayout) -> Targets:
    """What `config` means on `layout`. AdapterRefused: a pattern that is invalid or too slow, tokens of another module."""
    return _Resolver(config, layout).resolve()


class PatternValue:
    """rank_pattern or alpha_pattern: the first pattern that matches a module's path decides (PEFT's get_pattern_key)."""

    def __init__(self, config_field: str, patterns: dict[str, int] | dict[str, float] | None, default: float) -> None:
        self._field, self._patterns, self._default = config_field, patterns or {}, default
        self._matcher = PatternMatcher()

    def of(self, module: str) -> float:
        """The value for a module path."""
        for pattern, value in self._patterns.items():
            if self._matcher.match(rf"(.*\.)?({pattern})$", module, self._field):
                return value
        return self._default


def _check_counts(pattern: str) -> None:
    """ValueError for a pattern whose counted repeats would be unrolled into gigabytes, or whose braces mean something else in `regex`."""
    product = 1
    for count in _COUNT.finditer(pattern):
        times = max((int(number) for number in (count["least"], count["most"]) if number), default=1)
        product *= times if count["group"] else 1
        if max(times, product) > MAX_REPEATS:
            raise ValueError("counted repeats")
    if "{" in _COUNT.sub("", pattern):
        raise ValueError("braces")


def _has_suffix(name: str, keys: set[str]) -> bool:
    """Whether `name` is a key or ends in "." and a key."""
    while name:
        if name in keys:
            return True
        name = name.partition(".")[2]
    return False

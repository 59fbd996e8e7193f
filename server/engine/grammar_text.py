"""From what a request says of its answer's form to the text that llguidance compiles; schemas that no finite answer meets are refused.

Knows neither tokenizers nor sequences. Runs in the trial process (engine.grammar_trial) alone: it may be slow, or worse, on a stranger's
text.
"""

import json
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

# Models write JSON with blanks, indented or not; without a bound a small one can go on with blanks until its tokens are used up.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \n\r\t]{1,40}"}
_PLAIN_TYPES = {"string", "number", "integer", "boolean", "null"}


def grammar_text(kind: str, text: str) -> str:
    """What `llguidance.LLMatcher` takes, for a types.GrammarSpec. ValueError, in words for the caller, if it is known to be of no use."""
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "grammar":
        if "::=" in text:
            try:
                text = any_to_lark(text)
            except Exception as error:  # its own class, and whatever its parser trips over
                raise ValueError(f"the grammar is neither Lark nor GBNF: {error}") from None
        return LLMatcher.grammar_from_lark(text)
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the schema is no JSON ({error})") from None
    if not isinstance(schema, dict | bool):
        raise ValueError("a JSON schema is an object")
    if schema is False:
        raise ValueError("no JSON meets the schema `false`")
    if schema is True:
        text = "{}"
    elif "x-guidance" in schema:  # llguidance's own options, which could make it ignore what it does not know
        raise ValueError("`x-guidance` is not a keyword of JSON schemas")
    endless = find_endless(schema)
    if endless is not None:
        raise ValueError(f"no finite JSON meets the schema: {endless} requires itself")
    return LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)


def find_endless(schema: Any) -> str | None:
    """The place in a JSON schema (as a URI fragment) whose every instance holds an instance of itself; None if the schema can be met.

    The least fixpoint of "can be finite" over the schemas that `schema` reaches by local references. A keyword that is not looked at counts
    as finite: that a schema is let through promises nothing."""
    nodes = _reachable(schema)
    finite: set[str] = set()
    changed = True
    while changed:
        changed = False
        for place, node in reversed(nodes.items()):  # what is required comes after what requires it, so that one round mostly does
            if place not in finite and not any(part not in finite for part in _needed(place, node, nodes, finite)):
                finite.add(place)
                changed = True
    place, seen = "#", set()
    while place not in finite:
        if place in seen:
            return place
        seen.add(place)
        place = next(part for part in _needed(place, nodes[place], nodes, finite) if part not in finite)
    return None


def _reachable(schema: Any) -> dict[str, Any]:
    """Place -> schema, from the root on."""
    nodes: dict[str, Any] = {}
    pending = ["#"]
    while pending:
        place = pending.pop()
        if place in nodes:
            continue
        node = nodes[place] = _look_up(schema, place)
        if isinstance(node, dict):
            pending += [part for _, part in _parts(place, node)]
    return nodes


def _parts(place: str, node: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(keyword, place) of the schemas that a schema is made of."""
    reference = node.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        yield "$ref", reference
    for keyword in ("anyOf", "oneOf", "allOf", "prefixItems"):
        branches = node.get(keyword)
        if isinstance(branches, list):
            yield from ((keyword, f"{place}/{keyword}/{index}") for index in range(len(branches)))
    if isinstance(node.get("properties"), dict):
        yield from (("properties", f"{place}/properties/{_escape(name)}") for name in node["properties"])
    if isinstance(node.get("items"), dict):
        yield "items", f"{place}/items"


def _needed(place: str, node: Any, nodes: dict[str, Any], finite: set[str]) -> Iterator[str]:
    """Places that must be finite for this one to be: of a choice, the first branch, unless another is known to be finite."""
    if not isinstance(node, dict) or "enum" in node or "const" in node:
        return
    parts = list(_parts(place, node))
    yield from (part for keyword, part in parts if keyword in ("$ref", "allOf"))
    for choice in ("anyOf", "oneOf"):
        branches = [part for keyword, part in parts if keyword == choice]
        if branches and not any(branch in finite for branch in branches):
            yield branches[0]
    kinds = node.get("type")
    kinds = {kinds} if isinstance(kinds, str) else set(filter(lambda kind: isinstance(kind, str), kinds or ()))
    if not kinds or kinds & _PLAIN_TYPES:
        return
    of_object = [part for part in _required(place, node) if part in nodes]
    of_array = [part for part in _first_items(place, node) if part in nodes]
    if "object" in kinds and ("array" not in kinds or all(part in finite for part in of_object)):
        yield from of_object
    elif "array" in kinds:
        yield from of_array


def _required(place: str, node: dict[str, Any]) -> list[str]:
    names = node.get("required")
    return [f"{place}/properties/{_escape(name)}" for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _first_items(place: str, node: dict[str, Any]) -> list[str]:
    """The schemas of the items that an array has at least."""
    num_items = node.get("minItems")
    if not isinstance(num_items, int) or num_items <= 0:
        return []
    num_prefix = len(node["prefixItems"]) if isinstance(node.get("prefixItems"), list) else 0
    return [f"{place}/prefixItems/{index}" for index in range(min(num_items, num_prefix))] + [f"{place}/items"] * (num_items > num_prefix)


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _look_up(schema: Any, place: str) -> Any:
    """The schema at a JSON pointer (RFC 6901); True, which anything meets, if there is none: llguidance will say so."""
    for part in place.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, dict) and part in schema:
            schema = schema[part]
        elif isinstance(schema, list) and part.isdigit() and int(part) < len(schema):
            schema = schema[int(part)]
        else:
            return True
    return schema

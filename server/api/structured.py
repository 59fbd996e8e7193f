"""What an answer must look like: `response_format` in LoRAX's and OpenAI's forms, `structured_outputs` in vLLM's.

Owns these fields' shapes and their meaning as a types.GrammarSpec. Whether a grammar is of any use is the engine's to say: it compiles it
before the sequence starts. The bodies of both families of routes have these models as fields.
"""

import json
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from server.api.sampling import refuse
from server.api.schemas_common import RequestModel
from server.types import GrammarSpec

MAX_CHOICES = 1000
_ANY_OBJECT = {"type": "object"}
Schema = dict[str, Any] | bool | str | None


class NativeResponseFormat(RequestModel):
    """LoRAX's `response_format`. Any JSON object if there is no schema (LoRAX: also null; its own client sends null and meant this)."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="LoRAX's Text, JsonObject and JsonSchema are taken too.")
    json_schema: Schema = Field(None, alias="schema", description="A JSON schema, or one as text.")

    @field_validator("type", mode="before")
    @classmethod
    def _lorax_names(cls, value: Any) -> Any:
        return (
            {"Text": "text", "JsonObject": "json_object", "JsonSchema": "json_schema"}.get(value, value)
            if isinstance(value, str)
            else value
        )

    def grammar(self) -> GrammarSpec | None:
        """None if any text will do. ValidationFailed if the schema is of no use here."""
        if self.type == "text":
            if self.json_schema is not None:
                raise refuse('`response_format`: a `schema` needs `type`: "json_schema" or "json_object"', "response_format")
            return None
        return json_grammar(self.json_schema, "response_format")


class JsonSchemaFormat(RequestModel):
    """OpenAI's `json_schema`. The answer always meets the schema, with or without `strict`."""

    name: str | None = Field(None, max_length=64)
    description: str | None = None
    strict: bool | None = Field(None, description="Without effect: the schema is always enforced.")
    json_schema: Schema = Field(None, alias="schema", description="A JSON schema; none is any JSON object.")


class ResponseFormat(RequestModel):
    """OpenAI's `response_format`; `schema` beside `json_object` is LoRAX's addition."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = Field(None, description="Of type json_schema.")
    lorax_schema: Schema = Field(None, alias="schema", description="Of type json_object (LoRAX's addition).")

    @model_validator(mode="after")
    def _check_together(self) -> "ResponseFormat":
        if self.json_schema is not None and self.type != "json_schema":
            raise ValueError('`json_schema` needs `type`: "json_schema"')
        if self.lorax_schema is not None and self.type != "json_object":
            raise ValueError('`schema` needs `type`: "json_object"; with "json_schema" it is `json_schema.schema`')
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("missing field `json_schema`")
        return self

    def grammar(self) -> GrammarSpec | None:
        """None if any text will do."""
        if self.type == "text":
            return None
        return json_grammar(self.json_schema.json_schema if self.json_schema is not None else self.lorax_schema, "response_format")


class StructuredOutputs(RequestModel):
    """vLLM's `structured_outputs`: exactly one of its fields."""

    not_served: ClassVar = {
        name: ("", (None, False)) for name in ("structural_tag", "json_object", "disable_fallback", "disable_any_whitespace",
                                               "disable_additional_properties", "whitespace_pattern")
    }  # fmt: skip

    json_value: Schema = Field(None, alias="json", description="A JSON schema.")
    regex: str | None = Field(None, description="A regular expression (Rust's syntax, no look-around) that the whole answer matches.")
    choice: list[str] | None = Field(None, description="The answer is one of these.", min_length=1, max_length=MAX_CHOICES)
    grammar: str | None = Field(None, description="A grammar in Lark (llguidance's), GBNF or EBNF.")

    @model_validator(mode="after")
    def _check_one(self) -> "StructuredOutputs":
        given = [name for name in ("json_value", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("exactly one of `json`, `regex`, `choice` and `grammar` must be given")
        if self.choice is not None and "" in self.choice:
            raise ValueError("`choice` must not hold an empty text")
        return self

    def spec(self) -> GrammarSpec:
        """What the engine is to compile."""
        if self.json_value is not None:
            return json_grammar(self.json_value, "structured_outputs.json")
        if self.regex is not None:
            return GrammarSpec("regex", self.regex, "structured_outputs.regex")
        if self.choice is not None:
            return GrammarSpec("grammar", "start: " + " | ".join(map(lark_string, self.choice)), "structured_outputs.choice")
        assert self.grammar is not None
        return GrammarSpec("grammar", self.grammar, "structured_outputs.grammar")


def chosen_grammar(
    response_format: NativeResponseFormat | ResponseFormat | None, structured_outputs: StructuredOutputs | None
) -> GrammarSpec | None:
    """What a request with these two fields asks for. ValidationFailed if it asks twice."""
    grammar = response_format.grammar() if response_format is not None else None
    if structured_outputs is None:
        return grammar
    if grammar is not None:
        raise refuse("at most one of `response_format` and `structured_outputs` may be given", "structured_outputs")
    return structured_outputs.spec()


def json_grammar(schema: Schema, param: str) -> GrammarSpec:
    """JSON that meets `schema` (as a value, or as JSON in a text); any JSON object if there is none."""
    if isinstance(schema, str):
        return GrammarSpec("json_schema", schema, param)
    return GrammarSpec("json_schema", json.dumps(_ANY_OBJECT if schema is None else schema), param)


def lark_string(text: str) -> str:
    """A literal of llguidance's Lark, which are JSON's."""
    return json.dumps(text, ensure_ascii=False)

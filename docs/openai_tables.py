"""Tables of docs/openai.md: every field of the two generating routes, from their schemas."""

from server.api.schemas_common import RequestModel
from server.api.schemas_openai import ChatRequest, CompletionRequest

_DIFFERENT = {
    "max_tokens": "Completions: default 16, 0 is allowed with `echo`. Chat: older name of `max_completion_tokens`.",
    "logprobs": "Completions: the number of alternatives. Chat: true or false, see `top_logprobs`.",
}


def openai_fields() -> str:
    """Every field that is taken, and on which of the routes."""
    rows = ["| field | completions | chat | what it is |", "|---|---|---|---|"]
    completions, chat = _fields(CompletionRequest), _fields(ChatRequest)
    for name in sorted(completions | chat):
        words = _DIFFERENT.get(name) or completions.get(name) or chat[name]
        rows.append(f"| `{name}` | {'yes' if name in completions else ''} | {'yes' if name in chat else ''} | {words} |")
    return "\n".join(rows)


def openai_refused() -> str:
    """Every field that is known and refused."""
    reasons = {name: reason for schema in (CompletionRequest, ChatRequest) for name, (reason, _) in schema.not_served.items()}
    rows = ["| field | why, or what to use |", "|---|---|"]
    rows += [f"| `{name}` | {reason.strip(' ;()') or 'there is no such thing here'} |" for name, reason in sorted(reasons.items())]
    return "\n".join(rows)


def _fields(schema: type[RequestModel]) -> dict[str, str]:
    return {field.alias or name: field.description or "" for name, field in schema.model_fields.items()}

"""What the bodies of all routes have in common: strict types; unknown fields, and known ones that are not served, refused by name.

Owns the base class alone; the fields are in schemas_native and schemas_openai, checks across fields in api.sampling.
"""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class RequestModel(BaseModel):
    """A part of a request's body. Integers are not taken from floats or text, NaN and infinities are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())

    # field -> (why it is refused, values that ask for nothing and are let through)
    not_served: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_served(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, (reason, neutral) in cls.not_served.items():
            if name in data and not any(data[name] == value and type(data[name]) is type(value) for value in neutral):
                raise PydanticCustomError("not_served", "`{name}` is not supported{reason}", {"name": name, "reason": reason})
        return {name: value for name, value in data.items() if name not in cls.not_served}


class ResponseModel(BaseModel):
    """A part of an answer's body."""

    model_config = ConfigDict(protected_namespaces=())

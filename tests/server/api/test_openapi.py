"""The OpenAPI document is whole, and true: schemathesis makes requests of every kind from it, and no answer is a 500 or unknown to it."""

import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from tests.server.api.live import LiveServer

METHODS = {"get", "post", "put", "delete", "patch"}
CHECKS: list[Any] = [not_a_server_error, content_type_conformance, status_code_conformance, response_schema_conformance]


@pytest.mark.filterwarnings("ignore::UserWarning:schemathesis.*")
def test_requests_of_every_kind(live: LiveServer, subtests: pytest.Subtests) -> None:
    """Both what the document allows and what it does not, a fixed number an operation and always the same."""
    schema = schemathesis.openapi.from_dict(live.client.get("/openapi.json").json())
    found = [result.ok() for result in schema.get_all_operations()]
    assert len(found) > 15
    for operation in found:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            with subtests.test(f"{operation.label} {mode.value}"):
                _try(operation, mode, live.base_url)


def _try(operation: schemathesis.APIOperation, mode: GenerationMode, base_url: str) -> None:
    @settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=base_url, checks=CHECKS, timeout=20)

    try:
        run()
    except Unsatisfiable:  # an operation without parameters cannot be called wrongly
        assert mode is GenerationMode.NEGATIVE


def operations(live: LiveServer) -> dict[str, Any]:
    paths = live.client.get("/openapi.json").json()["paths"]
    return {f"{method.upper()} {path}": entry for path, methods in paths.items() for method, entry in methods.items() if method in METHODS}


def test_every_operation_is_described(live: LiveServer) -> None:
    for name, operation in operations(live).items():
        assert operation.get("summary") and operation.get("description") and operation.get("tags"), name
        assert operation["responses"], name


def test_every_body_has_an_example_that_is_served(live: LiveServer) -> None:
    schemas = live.client.get("/openapi.json").json()["components"]["schemas"]
    for name, operation in operations(live).items():
        if "requestBody" not in operation:
            continue
        if operation["tags"] not in (["native"], ["server"], ["other models"]):
            continue
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert schemas[reference.rsplit("/", 1)[-1]].get("examples"), name


def test_every_field_of_a_body_says_what_it_is(live: LiveServer) -> None:
    schemas = live.client.get("/openapi.json").json()["components"]["schemas"]
    for body in ("GenerateParameters", "GenerateRequest", "MergedAdapters", "TokenizeRequest"):
        for name, field in schemas[body]["properties"].items():
            assert field.get("description"), f"{body}.{name}"
    assert json.dumps(schemas["GenerateParameters"]["properties"]["temperature"]).count("minimum") == 1

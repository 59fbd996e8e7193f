"""What a way to authenticate must say and make: the contract that every registered one is tested against.

Knows nothing of routes and of the load balancer; a mode is one file beside this one, and `Endpoint` asks it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from aws_cdk import aws_apigateway as apigw
from constructs import Construct

from infra.config import KitConfig


class Auth(ABC):
    """One way to authenticate, for one REST API.

    `tenant` is the variable of API Gateway's request context whose value the gateway sends as the tenant. It must be one that no accepted
    request is without: where a mapping finds nothing, the header of that name that the caller sent would go through.
    """

    has_admin: ClassVar[bool]  # whether it can tell those who may publish and unload from the other callers
    tenant: str

    def __init__(self, scope: Construct, *, config: KitConfig) -> None:
        """`scope`: where its resources are made. ConfigError, naming the key, if the configuration lacks what the mode needs."""
        self.scope = scope
        self.config = config

    @abstractmethod
    def method_options(self, *, admin: bool) -> Mapping[str, Any]:
        """What a method asks of its caller: keyword arguments of `Resource.add_method`."""

    def attach(self, api: apigw.RestApi, admin_methods: list[apigw.Method]) -> None:  # noqa: B027 (not every mode has something to make)
        """Called once, after the last method: plans, keys, policies."""

    @abstractmethod
    def outputs(self) -> Mapping[str, str]:
        """Output name -> value: what a caller needs to get in. No secret."""

    @abstractmethod
    def curl_options(self) -> str:
        """The options of a curl command that an accepted call needs; $VARIABLES are explained by the outputs."""

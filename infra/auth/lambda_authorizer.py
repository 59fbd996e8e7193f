"""A function of the deployer's decides: it is given the request's headers and answers with a policy and a principal.

What it must answer: `principalId`, which is the tenant, and a policy that names the methods that this caller may call, the admin routes
only for those who may publish and unload. The answer is cached by the Authorization header, so it must cover every method, not the one
that was asked for.
"""

from collections.abc import Mapping
from typing import Any

import aws_cdk as cdk
from aws_cdk import aws_apigateway as apigw
from aws_cdk import aws_lambda as lambda_

from infra.acknowledge import acknowledge
from infra.auth.base import Auth
from infra.config import KitConfig
from infra.errors import ConfigError


class LambdaAuth(Auth):
    """The tenant is `principalId`: API Gateway takes no answer without one."""

    has_admin = True
    tenant = "context.authorizer.principalId"

    def __init__(self, scope: Any, *, config: KitConfig) -> None:
        super().__init__(scope, config=config)
        arn = config.endpoint.lambda_arn
        if not arn:
            raise ConfigError('endpoint.lambda_arn must be set when endpoint.auth is "lambda": the ARN of the function that decides')
        self._authorizer = apigw.RequestAuthorizer(
            scope,
            "Authorizer",
            handler=lambda_.Function.from_function_attributes(scope, "AuthorizerFunction", function_arn=arn, same_environment=True),
            identity_sources=[apigw.IdentitySource.header("Authorization")],
            results_cache_ttl=cdk.Duration.minutes(5),
        )

    def method_options(self, *, admin: bool) -> Mapping[str, Any]:
        """The same for all: the function's policy tells methods apart."""
        return {"authorization_type": apigw.AuthorizationType.CUSTOM, "authorizer": self._authorizer}

    def attach(self, api: apigw.RestApi, admin_methods: list[apigw.Method]) -> None:
        """Nothing to make: the function is the deployer's."""
        acknowledge(api, {"COG4": "the deployer's own function is the configured auth mode"})

    def outputs(self) -> Mapping[str, str]:
        """What decides."""
        return {"AuthorizerArn": self.config.endpoint.lambda_arn or ""}

    def curl_options(self) -> str:
        """$TOKEN is whatever the function takes."""
        return '-H "Authorization: $TOKEN"'

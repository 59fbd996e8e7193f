"""JSON web tokens of an Amazon Cognito user pool: the deployer's (`user_pool_arn`), or one made here for machine-to-machine clients.

Tokens are access tokens, and their scopes say what the caller may: `endpoint.jwt_scope` and `endpoint.jwt_admin_scope`, each
`resource-server/scope`. Tokens of another issuer are for the function of auth "lambda" to judge.
"""

from collections.abc import Mapping
from typing import Any

import aws_cdk as cdk
from aws_cdk import aws_apigateway as apigw
from aws_cdk import aws_cognito as cognito

from infra.acknowledge import acknowledge
from infra.auth.base import Auth
from infra.config import KitConfig
from infra.errors import ConfigError
from infra.removal import data_policy


class JwtAuth(Auth):
    """The tenant is a claim of the access token, `endpoint.jwt_tenant_claim`."""

    has_admin = True

    def __init__(self, scope: Any, *, config: KitConfig) -> None:
        super().__init__(scope, config=config)
        self.tenant = f"context.authorizer.claims.{config.endpoint.jwt_tenant_claim}"
        self._outputs: dict[str, str] = {}
        arn = config.endpoint.jwt_user_pool_arn
        pool = cognito.UserPool.from_user_pool_arn(scope, "UserPool", arn) if arn else self._make_pool()
        self._authorizer = apigw.CognitoUserPoolsAuthorizer(scope, "Authorizer", cognito_user_pools=[pool])

    def method_options(self, *, admin: bool) -> Mapping[str, Any]:
        """An admin's token may also generate; a caller's is refused by the admin routes."""
        endpoint = self.config.endpoint
        scopes = [endpoint.jwt_admin_scope] if admin else [endpoint.jwt_scope, endpoint.jwt_admin_scope]
        return {
            "authorization_type": apigw.AuthorizationType.COGNITO,
            "authorizer": self._authorizer,
            "authorization_scopes": scopes,
        }

    def _make_pool(self) -> cognito.UserPool:
        """Nobody signs in to it: two app clients with a secret, one a scope, for the client-credentials grant."""
        pool = cognito.UserPool(
            self.scope,
            "UserPool",
            self_sign_up_enabled=False,
            password_policy=cognito.PasswordPolicy(
                min_length=16, require_lowercase=True, require_uppercase=True, require_digits=True, require_symbols=True
            ),
            removal_policy=data_policy(self.config),
            deletion_protection=self.config.retain_data,
        )
        reason = "the pool has no users, only clients with a secret: there is no sign-in to protect"
        acknowledge(pool, dict.fromkeys(("COG2", "COG3", "COG8"), reason))
        self._add_clients(pool)
        domain = pool.add_domain(
            "Domain", cognito_domain=cognito.CognitoDomainOptions(domain_prefix=f"{self.config.name}-{cdk.Aws.ACCOUNT_ID}")
        )
        self._outputs |= {"UserPoolId": pool.user_pool_id, "TokenUrl": f"{domain.base_url()}/oauth2/token"}
        return pool

    def _add_clients(self, pool: cognito.UserPool) -> None:
        server_id, scopes = _split(self.config)
        made = {name: cognito.ResourceServerScope(scope_name=name, scope_description=text) for name, text in scopes.items()}
        server = pool.add_resource_server("ResourceServer", identifier=server_id, scopes=list(made.values()))
        for id, scope in zip(("CallerClient", "AdminClient"), made.values(), strict=True):
            client = pool.add_client(
                id,
                generate_secret=True,
                o_auth=cognito.OAuthSettings(
                    flows=cognito.OAuthFlows(client_credentials=True), scopes=[cognito.OAuthScope.resource_server(server, scope)]
                ),
            )
            self._outputs[f"{id}Id"] = client.user_pool_client_id

    def outputs(self) -> Mapping[str, str]:
        """Where a token comes from. The clients' secrets are Cognito's: `aws cognito-idp describe-user-pool-client`."""
        return self._outputs

    def curl_options(self) -> str:
        """$TOKEN is an access token with the scope `endpoint.jwt_scope`."""
        return '-H "Authorization: Bearer $TOKEN"'


def _split(config: KitConfig) -> tuple[str, dict[str, str]]:
    """The resource server's identifier, and scope -> what it allows."""
    server, _, caller = config.endpoint.jwt_scope.rpartition("/")
    admin_server, _, admin = config.endpoint.jwt_admin_scope.rpartition("/")
    if not server or server != admin_server or caller == admin:
        raise ConfigError(
            "endpoint.jwt_scope and endpoint.jwt_admin_scope must be two scopes of one resource server (as manylora/generate and "
            f"manylora/admin) where the pool is made here. Given: {config.endpoint.jwt_scope}, {config.endpoint.jwt_admin_scope}"
        )
    return server, {caller: "call the models", admin: "publish and unload adapters"}

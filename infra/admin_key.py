"""The key that the servers ask for before they publish or unload an adapter. Nobody knows it: the gateway shows it for callers whose
authorization says that they may (`infra.auth`), and the instances read it when they boot.

Made before fleet and endpoint, which both take it. Where the auth mode cannot tell an admin, there is no key, and the routes are off twice:
not mapped, and refused by the servers.
"""

from aws_cdk import aws_iam as iam
from aws_cdk import aws_secretsmanager as secrets
from constructs import Construct

from infra.acknowledge import acknowledge
from infra.auth import MODES
from infra.config import KitConfig
from infra.removal import data_key

NUM_CHARACTERS = 48


class AdminKey(Construct):
    """`secret`: None without an admin; `arn`: its ARN or ""."""

    def __init__(self, scope: Construct, id: str, *, config: KitConfig) -> None:
        super().__init__(scope, id)
        self.secret = self._make(config) if MODES[config.endpoint.auth].has_admin else None
        self.arn = self.secret.secret_arn if self.secret else ""

    @property
    def constant(self) -> str:
        """The key as a constant of API Gateway's mappings: a reference in the template, which CloudFormation replaces in the method."""
        assert self.secret is not None, "no admin route is mapped without a key"
        return f"'{self.secret.secret_value.unsafe_unwrap()}'"

    def grant_read(self, role: iam.IGrantable) -> None:
        """Let `role` read this secret and no other."""
        if self.secret is not None:
            allow = iam.PolicyStatement(actions=["secretsmanager:GetSecretValue"], resources=[self.secret.secret_arn])
            role.grant_principal.add_to_principal_policy(allow)

    def _make(self, config: KitConfig) -> secrets.Secret:
        secret = secrets.Secret(
            self,
            "Secret",
            description=f"{config.name}: what the gateway shows to the servers on admin routes",
            encryption_key=data_key(self, config),
            generate_secret_string=secrets.SecretStringGenerator(exclude_punctuation=True, password_length=NUM_CHARACTERS),
        )
        acknowledge(secret, {"SMG4": "the gateway and the instances read it at a deploy and at boot: a new one is a deploy"})
        return secret

"""A secret that the gateway shows to the servers in a header, and that nobody needs to know: the gateway's methods hold it as a constant,
the instances read it when they boot.

Owns the secret and who may read it. `AdminKey` and `GatewayKey` say what it is for and whether there is one.
"""

from aws_cdk import aws_iam as iam
from aws_cdk import aws_secretsmanager as secrets
from constructs import Construct

from infra.acknowledge import acknowledge
from infra.config import KitConfig
from infra.removal import data_key

NUM_CHARACTERS = 48


class ShownKey(Construct):
    """`secret`: None if it is not wanted; `arn`: its ARN or ""."""

    def __init__(self, scope: Construct, id: str, *, config: KitConfig, wanted: bool, what: str) -> None:
        super().__init__(scope, id)
        self.secret = self._make(config, what) if wanted else None
        self.arn = self.secret.secret_arn if self.secret else ""

    @property
    def constant(self) -> str:
        """The key as a constant of API Gateway's mappings: a reference in the template, which CloudFormation replaces in the method."""
        assert self.secret is not None, "nothing that shows it is mapped without a key"
        return f"'{self.secret.secret_value.unsafe_unwrap()}'"

    def grant_read(self, role: iam.IGrantable) -> None:
        """Let `role` read this secret and no other."""
        if self.secret is not None:
            allow = iam.PolicyStatement(actions=["secretsmanager:GetSecretValue"], resources=[self.secret.secret_arn])
            role.grant_principal.add_to_principal_policy(allow)

    def _make(self, config: KitConfig, what: str) -> secrets.Secret:
        # CloudFormation reads a secret again only where the reference itself changes: another key is another secret.
        generation = config.endpoint.key_generation
        secret = secrets.Secret(
            self,
            "Secret" if generation == 1 else f"Secret{generation}",
            description=f"{config.name}: {what}",
            encryption_key=data_key(self, config),
            generate_secret_string=secrets.SecretStringGenerator(exclude_punctuation=True, password_length=NUM_CHARACTERS),
        )
        acknowledge(
            secret, {"SMG4": "gateway and instances read it at a deploy and at boot: a new one is a deploy with another generation"}
        )
        return secret

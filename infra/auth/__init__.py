"""Ways to authenticate at the edge, by the name that `endpoint.auth` takes. A new one: a file here, a line below, and it runs through
the contract test."""

from infra.auth.api_key import ApiKeyAuth
from infra.auth.base import Auth
from infra.auth.iam import IamAuth
from infra.auth.jwt import JwtAuth
from infra.auth.lambda_authorizer import LambdaAuth

MODES: dict[str, type[Auth]] = {"api_key": ApiKeyAuth, "iam": IamAuth, "jwt": JwtAuth, "lambda": LambdaAuth}

__all__ = ["MODES", "Auth"]

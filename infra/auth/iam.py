"""AWS signatures: a caller is a principal of IAM, and IAM says which methods it may call. Two managed policies are made to hand out."""

from collections.abc import Mapping
from typing import Any

from aws_cdk import Aws, Stack
from aws_cdk import aws_apigateway as apigw
from aws_cdk import aws_iam as iam

from infra.acknowledge import acknowledge
from infra.auth.base import Auth


class IamAuth(Auth):
    """The tenant is the caller's ARN. A role's session name is part of it, and whoever may assume the role chooses that: give each tenant a
    role or a user of its own."""

    has_admin = True
    tenant = "context.identity.userArn"

    def method_options(self, *, admin: bool) -> Mapping[str, Any]:
        """The same for all: the caller's policies tell methods apart."""
        return {"authorization_type": apigw.AuthorizationType.IAM}

    def attach(self, api: apigw.RestApi, admin_methods: list[apigw.Method]) -> None:
        """The two policies. The first denies nothing: it names each method that is not an admin's."""
        acknowledge(api, {"COG4": "AWS signatures are the configured auth mode"})
        admin_arns = [method.method_arn for method in admin_methods]
        others = [method for method in api.methods if not _is_open(method) and method.method_arn not in admin_arns]
        self._caller = self._policy("CallerPolicy", "may call the models", [method.method_arn for method in others])
        _acknowledge_names(self._caller, api, others)
        self._admin = self._policy("AdminPolicy", "may publish and unload adapters", admin_arns) if admin_arns else None
        if self._admin:
            _acknowledge_names(self._admin, api, admin_methods)

    def _policy(self, name: str, description: str, arns: list[str]) -> iam.ManagedPolicy:
        allow = iam.PolicyStatement(actions=["execute-api:Invoke"], resources=arns)
        return iam.ManagedPolicy(self.scope, name, description=f"{self.config.name}: {description}", statements=[allow])

    def outputs(self) -> Mapping[str, str]:
        """The policies to attach to callers."""
        admin = {"AdminPolicyArn": self._admin.managed_policy_arn} if self._admin else {}
        return {"CallerPolicyArn": self._caller.managed_policy_arn, **admin}

    def curl_options(self) -> str:
        """The variables are those of the AWS CLI."""
        signing = f'--aws-sigv4 "aws:amz:{Aws.REGION}:execute-api" --user "$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY"'
        return f'{signing} -H "x-amz-security-token: $AWS_SESSION_TOKEN"'


def _acknowledge_names(policy: iam.ManagedPolicy, api: apigw.RestApi, methods: list[apigw.Method]) -> None:
    """nag's findings on paths that end in a name."""
    stack = Stack.of(api)
    api_id, stage_id = (stack.resolve(name)["Ref"] for name in (api.rest_api_id, api.deployment_stage.stage_name))
    start = f"IAM5[Resource::arn:<AWS::Partition>:execute-api:<AWS::Region>:<AWS::AccountId>:<{api_id}>/<{stage_id}>/"
    named = [method for method in methods if "{" in method.resource.path]
    paths = [f"{method.http_method}{method.resource.path.split('{')[0]}*" for method in named]
    acknowledge(policy, {f"{start}{path}]": "the path ends in a model's or adapter's name, whichever it is" for path in paths})


def _is_open(method: apigw.Method) -> bool:
    return method.node.default_child.authorization_type == "NONE"  # type: ignore[union-attr]

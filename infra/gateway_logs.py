"""Where API Gateway writes: the access log, its own errors, and the role of the account that lets it write at all.

Both groups are made before the stage, so that they have a retention and are deleted with it: API Gateway makes the second one by itself
otherwise, and `cdk destroy` would leave it behind. `Endpoint` makes one.
"""

import json

from aws_cdk import aws_apigateway as apigw
from aws_cdk import aws_iam as iam
from constructs import Construct

from infra.acknowledge import acknowledge
from infra.config import KitConfig
from infra.log_group import make_log_group

_FIELDS = {  # of each request: who, what, how it ended and how long it took; never a body
    "requestId": "$context.requestId",
    "time": "$context.requestTimeEpoch",
    "ip": "$context.identity.sourceIp",
    "key": "$context.identity.apiKeyId",
    "principal": "$context.authorizer.principalId",
    "caller": "$context.identity.userArn",
    "method": "$context.httpMethod",
    "route": "$context.resourcePath",
    "status": "$context.status",
    "serverStatus": "$context.integration.status",
    "ms": "$context.responseLatency",
    "serverMs": "$context.integration.latency",
    "bytes": "$context.responseLength",
    "error": "$context.error.message",
    "serverError": "$context.integration.error",
}
ACCESS_LOG_FORMAT = apigw.AccessLogFormat.custom(json.dumps(_FIELDS))


class GatewayLogs(Construct):
    """`access`: the access log's group. `watch` must be called once the API is there."""

    def __init__(self, scope: Construct, id: str, *, config: KitConfig) -> None:
        super().__init__(scope, id)
        self._config = config
        self.access = make_log_group(self, "Access", config=config)
        self._account = self._make_account() if config.endpoint.account_logging_role == "create" else None

    def watch(self, api: apigw.RestApi, stage_name: str) -> None:
        """Makes the group of `api`'s own log, and has the stage wait for all that it writes to."""
        errors = make_log_group(self, "Errors", config=self._config, name=f"API-Gateway-Execution-Logs_{api.rest_api_id}/{stage_name}")
        api.deployment_stage.node.add_dependency(errors)
        if self._account is not None:
            api.deployment_stage.node.add_dependency(self._account)

    def _make_account(self) -> apigw.CfnAccount:
        """One a region and account: the role that every API of it logs with. Goes with the stack."""
        name = "service-role/AmazonAPIGatewayPushToCloudWatchLogs"
        role = iam.Role(
            self,
            "Role",
            assumed_by=iam.ServicePrincipal("apigateway.amazonaws.com"),
            managed_policies=[iam.ManagedPolicy.from_aws_managed_policy_name(name)],
        )
        reason = "API Gateway looks for this policy's rights when it is given the role, which serves every API of the account"
        acknowledge(role, {f"IAM4[Policy::arn:<AWS::Partition>:iam::aws:policy/{name}]": reason})
        account = apigw.CfnAccount(self, "Account", cloud_watch_role_arn=role.role_arn)
        return account

"""API keys and a usage plan: the default. A key is a tenant; keys alone cannot tell an admin, so admin routes are not mapped."""

from collections.abc import Mapping
from typing import Any

from aws_cdk import aws_apigateway as apigw

from infra.acknowledge import acknowledge
from infra.auth.base import Auth


class ApiKeyAuth(Auth):
    """One key and one usage plan; more keys are added to the plan without a deploy (docs/deploy.md)."""

    has_admin = False
    tenant = "context.identity.apiKeyId"

    def method_options(self, *, admin: bool) -> Mapping[str, Any]:
        """The key is asked for by each method."""
        return {"api_key_required": True}

    def attach(self, api: apigw.RestApi, admin_methods: list[apigw.Method]) -> None:
        """The key, and the plan that says how much it may call."""
        endpoint = self.config.endpoint
        quota = apigw.QuotaSettings(limit=endpoint.quota_per_day, period=apigw.Period.DAY) if endpoint.quota_per_day else None
        plan = api.add_usage_plan(
            "UsagePlan",
            throttle=apigw.ThrottleSettings(rate_limit=endpoint.rate, burst_limit=endpoint.burst),
            quota=quota,
            api_stages=[apigw.UsagePlanPerApiStage(api=api, stage=api.deployment_stage)],
        )
        self.key = api.add_api_key("ApiKey", description=f"{self.config.name}: the first tenant's")
        plan.add_api_key(self.key)
        self._plan = plan
        reason = "API keys are the configured auth mode; iam, jwt and lambda are the others"
        acknowledge(api, {"APIG4": reason, "COG4": reason})

    def outputs(self) -> Mapping[str, str]:
        """The id of the key, the command that shows its value, the plan that further keys go into."""
        show = f"aws apigateway get-api-key --api-key {self.key.key_id} --include-value --query value --output text"
        return {"ApiKeyId": self.key.key_id, "ApiKeyCommand": show, "UsagePlanId": self._plan.usage_plan_id}

    def curl_options(self) -> str:
        """$KEY is what ApiKeyCommand prints."""
        return '-H "x-api-key: $KEY"'

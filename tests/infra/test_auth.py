"""The ways to authenticate: one contract for all that are registered, and what is particular to each."""

import json
import re

import pytest

from infra.auth import MODES
from infra.config import ConfigError, KitConfig
from infra.routes import ROUTES, Access, mapped
from tests.infra.edge_stack import JWT, LAMBDA, ROOT, synth, text_of

CONFIGS = {"api_key": {}, "iam": {"endpoint.auth": "iam"}, "jwt": JWT, "lambda": LAMBDA}
OPEN = {(route.method, route.path) for route in ROUTES if route.access is Access.ANYONE}
ADMIN = {(route.method, route.path) for route in ROUTES if route.access is Access.ADMIN}


def test_every_mode_has_a_configuration_here():
    assert set(CONFIGS) == set(MODES)


@pytest.fixture(params=sorted(MODES))
def mode(request):
    return request.param


def test_the_configuration_takes_it(mode):
    assert KitConfig.load("dev", ROOT, CONFIGS[mode]).endpoint.auth == mode


def test_nobody_calls_without_authentication(mode):
    for key, method in synth(CONFIGS[mode]).methods().items():
        asks = method["AuthorizationType"] != "NONE" or method.get("ApiKeyRequired") is True
        assert asks == (key not in OPEN), key


def test_admin_routes_are_mapped_only_where_an_admin_can_be_told(mode):
    found = set(synth(CONFIGS[mode]).methods())
    assert ADMIN and found >= {(route.method, route.path) for route in mapped(has_admin=False)}
    assert (found & ADMIN == ADMIN) if MODES[mode].has_admin else not found & ADMIN


def test_the_tenant_comes_from_the_request_context(mode):
    """Never from what the caller sends, and never a variable that may be missing."""
    never_missing = {
        "context.identity.apiKeyId",
        "context.identity.userArn",
        "context.authorizer.principalId",
        "context.authorizer.claims.sub",
        "context.authorizer.claims.client_id",
    }
    sent = {
        method["Integration"]["RequestParameters"]["integration.request.header.X-Manylora-Tenant"]
        for key, method in synth(CONFIGS[mode]).methods().items()
        if key not in OPEN
    }
    assert len(sent) == 1 and sent <= never_missing


def test_there_is_an_admin_key_only_with_an_admin(mode):
    assert bool(synth(CONFIGS[mode]).of_type("AWS::SecretsManager::Secret")) == MODES[mode].has_admin


def test_a_key_has_a_plan_with_its_limits():
    template = synth({"endpoint.rate": 3, "endpoint.burst": 4, "endpoint.quota_per_day": 1000})
    plan = template.one("AWS::ApiGateway::UsagePlan")
    assert plan["Throttle"] == {"BurstLimit": 4, "RateLimit": 3} and plan["Quota"] == {"Limit": 1000, "Period": "DAY"}
    (key,), (plan_id,) = template.of_type("AWS::ApiGateway::ApiKey"), template.of_type("AWS::ApiGateway::UsagePlan")
    joined = template.one("AWS::ApiGateway::UsagePlanKey")
    assert joined["KeyId"] == {"Ref": key} and joined["UsagePlanId"] == {"Ref": plan_id}
    assert "Quota" not in synth().one("AWS::ApiGateway::UsagePlan")
    assert f"--api-key {{{key}}} --include-value" in text_of(template["Outputs"]["ApiKeyCommand"]["Value"])


def test_the_policies_of_iam_name_methods_and_only_the_admins_has_admin_methods():
    template = synth(CONFIGS["iam"])
    policies = {name: policy["PolicyDocument"]["Statement"] for name, policy in template.of_type("AWS::IAM::ManagedPolicy").items()}
    ((caller,),) = [statements for name, statements in policies.items() if "CallerPolicy" in name]
    ((admin,),) = [statements for name, statements in policies.items() if "AdminPolicy" in name]
    for statement in (caller, admin):
        assert statement["Action"] == "execute-api:Invoke" and statement["Effect"] == "Allow"
    callers, admins = ([json.dumps(arn) for arn in statement["Resource"]] for statement in (caller, admin))
    assert len(admins) == len(ADMIN) and all(re.search(r"/v1/(adapters|intake|stats)\b", arn) for arn in admins)
    assert len(callers) == len(mapped(has_admin=True)) - len(ADMIN) - len(OPEN)
    assert not any("/v1/adapters" in arn or "/ui" in arn for arn in callers)


def test_admin_routes_want_the_admin_scope_and_the_others_either():
    template = synth({**JWT, "endpoint.jwt_scope": "llm/ask", "endpoint.jwt_admin_scope": "llm/rule"})
    for key, method in template.methods().items():
        if key not in OPEN:
            assert method["AuthorizationType"] == "COGNITO_USER_POOLS"
            assert method["AuthorizationScopes"] == (["llm/rule"] if key in ADMIN else ["llm/ask", "llm/rule"])
    server = template.one("AWS::Cognito::UserPoolResourceServer")
    assert server["Identifier"] == "llm" and {scope["ScopeName"] for scope in server["Scopes"]} == {"ask", "rule"}
    for client in template.of_type("AWS::Cognito::UserPoolClient").values():
        assert client["AllowedOAuthFlows"] == ["client_credentials"] and client["GenerateSecret"] is True
        assert len(client["AllowedOAuthScopes"]) == 1


def test_a_pool_of_the_deployers_is_taken_as_it_is():
    arn = "arn:aws:cognito-idp:eu-west-1:111122223333:userpool/eu-west-1_AbCdEfGhI"
    template = synth({**JWT, "endpoint.jwt_user_pool_arn": arn, "endpoint.jwt_tenant_claim": "client_id"})
    assert not template.of_type("AWS::Cognito::UserPool")
    assert template.one("AWS::ApiGateway::Authorizer")["ProviderARNs"] == [arn]
    tenant = template.methods()["POST", "/generate"]["Integration"]["RequestParameters"]["integration.request.header.X-Manylora-Tenant"]
    assert tenant == "context.authorizer.claims.client_id"


@pytest.mark.parametrize("scopes", [("ask", "rule"), ("a/ask", "b/rule"), ("a/ask", "a/ask")])
def test_scopes_that_no_pool_of_ours_can_have_are_refused(scopes):
    with pytest.raises(ConfigError, match="endpoint.jwt_scope and endpoint.jwt_admin_scope"):
        synth({**JWT, "endpoint.jwt_scope": scopes[0], "endpoint.jwt_admin_scope": scopes[1]})


def test_the_deployers_function_decides_and_may_be_called_by_this_api_alone():
    template = synth(LAMBDA)
    authorizer = template.one("AWS::ApiGateway::Authorizer")
    assert authorizer["Type"] == "REQUEST" and authorizer["IdentitySource"] == "method.request.header.Authorization"
    permission = template.one("AWS::Lambda::Permission")
    assert permission["FunctionName"] == LAMBDA["endpoint.lambda_arn"] and permission["Principal"] == "apigateway.amazonaws.com"
    assert "/authorizers/" in json.dumps(permission["SourceArn"])

"""The endpoint: every route as it should be, nobody in without authentication, logs that are deleted with it."""

import importlib
import json
import pkgutil
import re

import aws_cdk as cdk
import pytest
from aws_cdk import aws_apigateway as apigw
from aws_cdk import aws_apigatewayv2 as apigwv2
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_elasticloadbalancingv2 as elbv2
from fastapi import APIRouter

import server.api
from infra.alb_integration import AlbIntegration
from infra.auth import MODES
from infra.config import ConfigError, KitConfig
from infra.endpoint import ADMIN_HEADER, GATEWAY_HEADER, edge_settings
from infra.routes import NOT_MAPPED, ROUTES, Access, mapped
from server.settings import Settings
from tests.infra.edge_stack import JWT, LAMBDA, ROOT, synth, text_of

AUTHS = {"api_key": {}, "iam": {"endpoint.auth": "iam"}, "jwt": JWT, "lambda": LAMBDA}
TENANT = "integration.request.header.X-Manylora-Tenant"


def proxied(template):
    return {key: method for key, method in template.methods().items() if method["Integration"]["Type"] == "HTTP_PROXY"}


def server_routes():
    """(method, path) of every route of the server, FastAPI's own pages included."""
    found = {("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/redoc"), ("GET", "/docs/oauth2-redirect")}
    for module in pkgutil.walk_packages(server.api.__path__, "server.api."):
        router = getattr(importlib.import_module(module.name), "router", None)
        if isinstance(router, APIRouter):
            found |= {(method, _as_mapped(route.path)) for route in router.routes for method in route.methods}
    return found


def _as_mapped(path):
    """As the gateway writes it: a parameter that takes slashes is the path's end there."""
    return re.sub(r"\{(\w+):path\}.*", r"{\1+}", path)


def test_another_generation_is_another_key_for_gateway_and_servers():
    """CloudFormation does not read a secret again while the reference to it stays the same, and a stage serves its deployment's copy."""
    found = []
    for generation in (1, 2):
        template = synth({"endpoint.auth": "iam", "endpoint.tenants": True, "endpoint.key_generation": generation})
        shown = template.methods()["POST", "/v1/adapters"]["Integration"]["RequestParameters"]
        keys = [json.dumps(shown[f"integration.request.header.{name}"]) for name in (ADMIN_HEADER, GATEWAY_HEADER)]
        found.append(
            (set(template.of_type("AWS::SecretsManager::Secret")), set(keys), set(template.of_type("AWS::ApiGateway::Deployment")))
        )
    assert all(len(one) == len(other) and not one & other for one, other in zip(*found, strict=True))


def test_every_route_of_the_server_is_mapped_or_left_out_with_a_reason():
    ours = {(route.method, route.path) for route in ROUTES}
    left_out = {tuple(name.split(" ", 1)) for name in NOT_MAPPED}
    assert not ours & left_out
    unknown = server_routes() - ours - left_out
    assert not unknown, "each belongs into ROUTES or, with the reason, into NOT_MAPPED"
    assert all(len(reason) > 20 for reason in NOT_MAPPED.values())


def test_every_mapped_route_is_one_of_the_server():
    page = {("GET", "/ui"), ("GET", "/ui/{file+}")}
    ours = {(route.method, route.path) for route in ROUTES}
    assert not ours - page - server_routes()


@pytest.mark.parametrize("auth", AUTHS)
def test_the_methods_are_the_routes_and_nothing_else(auth):
    expected = {(route.method, route.path) for route in mapped(has_admin=MODES[auth].has_admin)}
    template = synth(AUTHS[auth])
    assert set(template.methods()) == expected
    for (_, path), method in template.methods().items():
        uri = text_of(method["Integration"]["Uri"])
        assert uri.startswith("http://{LoadBalancer") and uri.endswith(f":80{path.replace('+}', '}')}")


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_what_generates_is_streamed_and_long_the_rest_is_not(route):
    integration = synth(JWT).methods()[route.method, route.path]["Integration"]
    if route.generates:
        assert integration["ResponseTransferMode"] == "STREAM" and integration["TimeoutInMillis"] == 900_000
    else:
        assert "ResponseTransferMode" not in integration and integration["TimeoutInMillis"] == 29_000


def test_every_route_that_generates_is_marked():
    """By the server's word: the routes whose bodies ask for tokens."""
    generating = {route.path for route in ROUTES if route.generates}
    assert {"/", "/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions"} <= generating


@pytest.mark.parametrize("auth", AUTHS)
def test_the_gateway_overwrites_the_tenant_on_every_method(auth):
    open_paths = {route.path for route in ROUTES if route.access is Access.ANYONE}
    sources = {
        "api_key": "context.identity.apiKeyId",
        "iam": "context.identity.userArn",
        "jwt": "context.authorizer.claims.sub",
        "lambda": "context.authorizer.principalId",
    }
    for (_, path), method in proxied(synth(AUTHS[auth])).items():
        sent = method["Integration"]["RequestParameters"][TENANT]
        assert sent == ("'anonymous'" if path in open_paths else sources[auth])


def test_path_parameters_are_passed_on():
    method = synth().methods()["GET", "/ui/{file+}"]
    assert method["Integration"]["RequestParameters"]["integration.request.path.file"] == "method.request.path.file"
    assert method["RequestParameters"] == {"method.request.path.file": True}


def test_the_load_balancer_is_the_target_and_the_link_is_of_the_second_version():
    template = synth()
    (link,) = template.of_type("AWS::ApiGatewayV2::VpcLink")
    (balancer,) = template.of_type("AWS::ElasticLoadBalancingV2::LoadBalancer")
    assert not template.of_type("AWS::ApiGateway::VpcLink")
    for method in proxied(template).values():
        integration = method["Integration"]
        assert integration["ConnectionId"] == {"Ref": link} and integration["IntegrationTarget"] == {"Ref": balancer}


def deployment_id(*, second_balancer=False, second_link=False):
    """The deployment's logical id of an API whose integration goes one way or another."""
    stack = cdk.Stack(cdk.App(builtin_cloud_formation_validation=False), "stack")
    vpc = ec2.Vpc(stack, "Vpc")
    group = ec2.SecurityGroup(stack, "Group", vpc=vpc)
    balancers = [elbv2.ApplicationLoadBalancer(stack, f"Balancer{i}", vpc=vpc, security_group=group) for i in range(2)]
    listeners = [each.add_listener("Listener", port=80, default_action=elbv2.ListenerAction.fixed_response(503)) for each in balancers]
    links = [apigwv2.VpcLink(stack, f"Link{i}", vpc=vpc, security_groups=[group]) for i in range(2)]
    api = apigw.RestApi(stack, "Api", cloud_watch_role=False)
    api.root.add_method("POST", AlbIntegration(listeners[second_balancer], vpc_link=links[second_link]))
    template = cdk.App.of(stack).synth().get_stack_by_name("stack").template
    (found,) = [name for name, item in template["Resources"].items() if item["Type"] == "AWS::ApiGateway::Deployment"]
    return found


def test_another_target_or_link_is_another_deployment():
    """Else CloudFormation changes the method and the stage goes on serving the old one."""
    ids = {deployment_id(), deployment_id(second_balancer=True), deployment_id(second_link=True)}
    assert len(ids) == 3
    assert deployment_id() in ids


def test_the_stage_throttles_logs_and_keeps_bodies_out_of_the_logs():
    template = synth({"endpoint.rate": 7, "endpoint.burst": 9, "observability.log_days": 14})
    stage = template.one("AWS::ApiGateway::Stage")
    (settings,) = stage["MethodSettings"]
    assert settings["ThrottlingRateLimit"] == 7 and settings["ThrottlingBurstLimit"] == 9
    assert settings["LoggingLevel"] == "ERROR" and settings["DataTraceEnabled"] is False and settings["HttpMethod"] == "*"
    logged = json.loads(stage["AccessLogSetting"]["Format"])
    assert logged["key"] == "$context.identity.apiKeyId" and logged["status"] == "$context.status"
    assert not any("body" in value.lower() for value in logged.values())


def test_log_groups_are_ours_and_go_with_the_stack():
    """The second one API Gateway would make by itself, for ever, and `cdk destroy` would leave it."""
    template = synth({"retain_data": True, "observability.log_days": 14})
    groups = template.of_type("AWS::Logs::LogGroup")
    assert all(group["RetentionInDays"] == 14 for group in groups.values())
    assert all(template["Resources"][name]["DeletionPolicy"] == "Delete" for name in groups)
    names = [text_of(group["LogGroupName"]) for group in groups.values() if "LogGroupName" in group]
    (api,) = template.of_type("AWS::ApiGateway::RestApi")
    assert names == [f"API-Gateway-Execution-Logs_{{{api}}}/prod"]
    (stage,) = [item for item in template["Resources"].values() if item["Type"] == "AWS::ApiGateway::Stage"]
    assert set(stage["DependsOn"]) >= {name for name, group in groups.items() if "LogGroupName" in group}


def test_the_accounts_logging_role_is_made_and_goes_or_is_anothers():
    made = synth()
    (name,) = made.of_type("AWS::ApiGateway::Account")
    assert made["Resources"][name].get("DeletionPolicy", "Delete") == "Delete"
    (stage,) = [item for item in made["Resources"].values() if item["Type"] == "AWS::ApiGateway::Stage"]
    assert name in stage["DependsOn"]
    assert not synth({"endpoint.account_logging_role": "existing"}).of_type("AWS::ApiGateway::Account")


def test_a_browser_is_told_what_it_may():
    origins = ["https://a.example", "https://b.example"]
    template = synth({"endpoint.cors_origins": origins})
    preflights = {path: method for (verb, path), method in template.methods().items() if verb == "OPTIONS"}
    assert set(preflights) == {route.path for route in mapped(has_admin=False)}
    assert all(method["Integration"]["Type"] == "MOCK" and method["AuthorizationType"] == "NONE" for method in preflights.values())
    assert origins[1] in json.dumps(preflights["/generate"])
    assert {item["ResponseType"] for item in template.of_type("AWS::ApiGateway::GatewayResponse").values()} == {
        "DEFAULT_4XX",
        "DEFAULT_5XX",
    }
    assert not [verb for verb, _ in synth().methods() if verb == "OPTIONS"]


def test_the_servers_are_told_what_stands_before_them():
    origins = ["https://a.example", "https://b.example"]
    settings = edge_settings(KitConfig.load("dev", ROOT, {"endpoint.cors_origins": origins}))
    assert settings["root_path"] == "/" + synth().one("AWS::ApiGateway::Stage")["StageName"]
    assert settings["cors_allow_origin"] == origins and "x-api-key" in settings["cors_allow_header"]
    Settings(model_id="model", **settings)  # every name and value is one of the server's
    assert set(edge_settings(KitConfig.load("dev", ROOT))) == {"root_path", "idle_connection_s"}


def test_the_gateway_shows_the_admin_key_on_admin_routes_alone():
    """The caller's own Authorization is the gateway's affair; the servers take orders from whoever shows their key."""
    template, header = synth(JWT), "integration.request.header.X-Manylora-Admin-Key"
    admin = {(route.method, route.path) for route in ROUTES if route.access is Access.ADMIN}
    assert admin
    for key, method in proxied(template).items():
        shown = method["Integration"]["RequestParameters"].get(header)
        assert (shown is not None) == (key in admin)
        if shown is not None:
            assert "{{resolve:secretsmanager:" in json.dumps(shown)
    assert not synth().of_type("AWS::SecretsManager::Secret")


def test_a_private_api_is_reached_through_its_door_alone():
    template = synth({"endpoint.private": True})
    api, (door,) = template.one("AWS::ApiGateway::RestApi"), template.of_type("AWS::EC2::VPCEndpoint")
    assert api["EndpointConfiguration"]["Types"] == ["PRIVATE"]
    deny = [statement for statement in api["Policy"]["Statement"] if statement["Effect"] == "Deny"]
    assert deny[0]["Condition"]["StringNotEquals"]["aws:SourceVpce"] == [{"Ref": door}]
    given = synth({"endpoint.private": True, "endpoint.vpc_endpoint_ids": ["vpce-0123456789abcdef0"]})
    assert not given.of_type("AWS::EC2::VPCEndpoint")
    assert given.one("AWS::ApiGateway::RestApi")["EndpointConfiguration"]["VpcEndpointIds"] == ["vpce-0123456789abcdef0"]


def test_a_private_api_in_a_vpc_of_the_deployers_names_its_door():
    vpc = {
        "network.vpc_id": "vpc-0123456789abcdef0",
        "network.availability_zones": ["eu-west-1a", "eu-west-1b"],
        "network.private_subnet_ids": ["subnet-0123456789abcdef0", "subnet-0123456789abcdef1"],
    }
    with pytest.raises(ConfigError, match="endpoint.vpc_endpoint_ids"):
        synth({"endpoint.private": True, **vpc})


def test_the_firewall_judges_no_prompt_and_stands_before_the_stage():
    template = synth({"endpoint.waf": True, "endpoint.waf_rate": 500})
    rules = template.one("AWS::WAFv2::WebACL")["Rules"]
    assert rules[0]["Statement"]["RateBasedStatement"]["Limit"] == 500
    common = next(rule for rule in rules if rule["Name"] == "AWSManagedRulesCommonRuleSet")
    counted = common["Statement"]["ManagedRuleGroupStatement"]["RuleActionOverrides"]
    assert {"SizeRestrictions_BODY", "CrossSiteScripting_BODY"} <= {item["Name"] for item in counted}
    assert all(item["ActionToUse"] == {"Count": {}} for item in counted)
    assert "/stages/" in text_of(template.one("AWS::WAFv2::WebACLAssociation")["ResourceArn"])
    assert not synth().of_type("AWS::WAFv2::WebACL")


def test_a_domain_replaces_the_apis_own_name():
    domain = {
        "endpoint.domain": "llm.example.com",
        "endpoint.certificate_arn": "arn:aws:acm:eu-west-1:111122223333:certificate/0a1b2c3d-0000-4000-8000-000000000000",
    }
    template = synth({**domain, "endpoint.hosted_zone_id": "Z0123456789"})
    assert template.one("AWS::ApiGateway::RestApi")["DisableExecuteApiEndpoint"] is True
    assert template.one("AWS::Route53::RecordSet")["Name"] == "llm.example.com"
    assert template["Outputs"]["EndpointUrl"]["Value"] == "https://llm.example.com/"
    without = synth(domain)
    assert not without.of_type("AWS::Route53::RecordSet") and "DomainTarget" in without["Outputs"]


@pytest.mark.parametrize("auth", AUTHS)
def test_the_curl_line_names_the_endpoint_and_no_secret(auth):
    outputs = synth(AUTHS[auth])["Outputs"]
    line = text_of(outputs["Curl"]["Value"])
    assert line.startswith("curl -N ") and line.endswith("/generate_stream") and text_of(outputs["EndpointUrl"]["Value"]) in line
    assert "resolve:" not in json.dumps(outputs) and "ClientSecret" not in json.dumps(outputs)


def test_xray_is_by_choice():
    assert synth({"observability.tracing": "xray"}).one("AWS::ApiGateway::Stage")["TracingEnabled"] is True
    assert not synth().one("AWS::ApiGateway::Stage").get("TracingEnabled")

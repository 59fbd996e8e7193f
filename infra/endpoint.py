"""The endpoint: a REST API with streamed answers, its stage, and one method for each of `routes`.

Owns the API and the way from it to the load balancer. Who may call is `infra.auth`'s, where the logs go `gateway_logs`'s, the name and
the firewall `front_door`'s. The service stack makes one; `Observability` reads `api`.
"""

from typing import Any

import aws_cdk as cdk
from aws_cdk import aws_apigateway as apigw
from aws_cdk import aws_apigatewayv2 as apigwv2
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_iam as iam
from constructs import Construct

from infra.acknowledge import acknowledge
from infra.admin_key import AdminKey
from infra.alb_integration import AlbIntegration
from infra.auth import MODES
from infra.config import KitConfig
from infra.errors import ConfigError
from infra.front_door import add_domain, add_firewall
from infra.gateway_key import GatewayKey
from infra.gateway_logs import ACCESS_LOG_FORMAT, GatewayLogs
from infra.load_balancer import IDLE_MARGIN_S, LoadBalancer
from infra.network import Network
from infra.routes import Access, Route, mapped

STAGE = "prod"
TENANT_HEADER, GATEWAY_HEADER, ADMIN_HEADER = "X-Manylora-Tenant", "X-Manylora-Gateway-Key", "X-Manylora-Admin-Key"
NOBODY = "'anonymous'"  # the tenant of a request without a key; quoted: a constant in API Gateway's mappings
SHORT_TIMEOUT_S = 29  # of a buffered answer: what API Gateway allows without a quota request
CORS_METHODS = ["GET", "POST", "DELETE"]
CORS_HEADERS = ["authorization", "content-type", "x-amz-date", "x-amz-security-token", "x-api-key", "x-lorax-adapter-id"]


def edge_settings(config: KitConfig) -> dict[str, Any]:
    """What the servers must be told about what stands before them: settings of the server, for user-data.

    A private integration sends the stage's name as the path's first part, and a browser wants the CORS answer from the server itself. The
    load balancer must be the first to close an idle connection: a request on one that the server is closing ends with 502."""
    settings: dict[str, Any] = {"root_path": f"/{STAGE}", "idle_connection_s": config.endpoint.timeout_s + 2 * IDLE_MARGIN_S}
    if config.endpoint.cors_origins:
        origins = list(config.endpoint.cors_origins)
        settings |= {"cors_allow_origin": origins, "cors_allow_method": CORS_METHODS, "cors_allow_header": CORS_HEADERS}
    return settings


class Endpoint(Construct):
    """`api`, `auth`, `url` (ends in /), `api_key` (None but for auth "api_key"), `logs`."""

    def __init__(
        self,
        scope: Construct,
        id: str,
        *,
        config: KitConfig,
        network: Network,
        load_balancer: LoadBalancer,
        admin_key: AdminKey,
        gateway_key: GatewayKey,
    ) -> None:
        super().__init__(scope, id)
        self._config, self._load_balancer, self._admin_key, self._gateway_key = config, load_balancer, admin_key, gateway_key
        self._vpc_link = apigwv2.VpcLink(
            self, "VpcLink", vpc=network.vpc, subnets=network.edge_subnets, security_groups=[network.edge_security_group]
        )
        self.logs = GatewayLogs(self, "GatewayLogs", config=config)
        self.api = self._make_api(network)
        self.logs.watch(self.api, STAGE)
        self.auth = MODES[config.endpoint.auth](self, config=config)
        self._validator = self.api.add_request_validator("Validator", validate_request_body=True, validate_request_parameters=True)
        methods = [(route, self._add(route)) for route in mapped(has_admin=self.auth.has_admin, tenants=config.endpoint.tenants)]
        self.auth.attach(self.api, [method for route, method in methods if route.access is Access.ADMIN])
        self._add_error_headers()
        add_firewall(self, config=config, stage=self.api.deployment_stage)
        self.url = add_domain(self, config=config, api=self.api) or self.api.url
        self.api_key: apigw.IApiKey | None = getattr(self.auth, "key", None)
        self._add_outputs()

    def _make_api(self, network: Network) -> apigw.RestApi:
        endpoint, private = self._config.endpoint, self._config.endpoint.private
        doors = self._make_private_doors(network) if private else None
        api = apigw.RestApi(
            self,
            "Api",
            rest_api_name=self._config.name,  # what its metrics are called by
            description=f"{self._config.name}: one base model and its adapters",
            endpoint_configuration=apigw.EndpointConfiguration(
                types=[apigw.EndpointType.PRIVATE if private else apigw.EndpointType.REGIONAL],
                vpc_endpoints=doors,
            ),
            policy=_only_through(doors) if doors else None,
            cloud_watch_role=False,  # GatewayLogs makes it, or another stack of the account did
            disable_execute_api_endpoint=bool(endpoint.domain),
            deploy_options=apigw.StageOptions(
                stage_name=STAGE,
                throttling_rate_limit=endpoint.rate,
                throttling_burst_limit=endpoint.burst,
                metrics_enabled=True,
                logging_level=apigw.MethodLoggingLevel.ERROR,
                data_trace_enabled=False,  # it would write prompts into the log
                tracing_enabled=self._config.observability.tracing == "xray",
                access_log_destination=apigw.LogGroupLogDestination(self.logs.access),
                access_log_format=ACCESS_LOG_FORMAT,
            ),
        )
        api.node.try_remove_child("Endpoint")  # the L2's own output; ours knows the domain
        if not endpoint.waf:
            reason = (
                "endpoint.waf is off in this configuration; the stage is throttled and every route but the page asks for authentication"
            )
            acknowledge(api, {"APIG3": reason})
        return api

    def _make_private_doors(self, network: Network) -> list[ec2.IInterfaceVpcEndpoint]:
        """How callers reach a private API: the deployer's endpoints, or one in the fleet's subnets for whoever is in the VPC."""
        given = self._config.endpoint.vpc_endpoint_ids
        if given:
            make = ec2.InterfaceVpcEndpoint.from_interface_vpc_endpoint_attributes
            return [make(self, f"Door{i}", vpc_endpoint_id=id, port=443) for i, id in enumerate(given, start=1)]
        if self._config.network.vpc_id:
            raise ConfigError("endpoint.vpc_endpoint_ids must name execute-api endpoints where endpoint.private meets network.vpc_id")
        group = ec2.SecurityGroup(self, "DoorSecurityGroup", vpc=network.vpc, description="callers of the private API")
        group.add_ingress_rule(ec2.Peer.ipv4(self._config.network.cidr), ec2.Port.HTTPS, "whoever is in the VPC")
        door = ec2.InterfaceVpcEndpoint(
            self,
            "Door",
            vpc=network.vpc,
            service=ec2.InterfaceVpcEndpointAwsService.APIGATEWAY,
            subnets=network.edge_subnets,
            private_dns_enabled=True,
            security_groups=[group],
            open=False,
        )
        return [door]

    def _add(self, route: Route) -> apigw.Method:
        resource = self.api.root.resource_for_path(route.path)
        if self._config.endpoint.cors_origins and resource.node.try_find_child("OPTIONS") is None:
            _add_preflight(resource, self._config.endpoint.cors_origins)
        names = [part[1:-1].rstrip("+") for part in route.path.split("/") if part.startswith("{")]
        anyone = route.access is Access.ANYONE
        integration = AlbIntegration(
            self._load_balancer.listener,
            vpc_link=self._vpc_link,
            path=route.path.replace("+}", "}"),
            request_parameters=self._headers(route) | {f"integration.request.path.{name}": f"method.request.path.{name}" for name in names},
            response_transfer_mode=apigw.ResponseTransferMode.STREAM if route.generates else None,
            timeout=cdk.Duration.seconds(self._config.endpoint.timeout_s if route.generates else SHORT_TIMEOUT_S),
        )
        rights = {} if anyone else self.auth.method_options(admin=route.access is Access.ADMIN)
        method = resource.add_method(
            route.method,
            integration,
            request_parameters={f"method.request.path.{name}": True for name in names} or None,
            request_validator=self._validator,
            **rights,
        )
        if anyone:
            _acknowledge_open(method, "the page and its files hold no data; the calls that it makes carry the visitor's key")
        return method

    def _headers(self, route: Route) -> dict[str, str]:
        """What the servers are told beside the request. A header that the caller sent under one of these names is overwritten, or it is of
        no use to him: without the gateway's key the servers believe no tenant."""
        headers = {TENANT_HEADER: NOBODY if route.access is Access.ANYONE else self.auth.tenant}
        if self._config.endpoint.tenants and route.access is not Access.ANYONE:
            headers[GATEWAY_HEADER] = self._gateway_key.constant
        if route.access is Access.ADMIN:
            headers[ADMIN_HEADER] = self._admin_key.constant
        return {f"integration.request.header.{name}": value for name, value in headers.items()}

    def _add_error_headers(self) -> None:
        """A browser shows the gateway's own refusals to the page only if they, too, say that it may read them."""
        if not self._config.endpoint.cors_origins:
            return
        for name, kind in (("ClientErrors", apigw.ResponseType.DEFAULT_4_XX), ("ServerErrors", apigw.ResponseType.DEFAULT_5_XX)):
            self.api.add_gateway_response(name, type=kind, response_headers={"Access-Control-Allow-Origin": "'*'"})

    def _add_outputs(self) -> None:
        stack = cdk.Stack.of(self)
        body = '{"inputs": "Why is the sky blue?", "parameters": {"max_new_tokens": 64}}'
        call = f"curl -N {self.auth.curl_options()} -H 'content-type: application/json' -d '{body}' {self.url}generate_stream"
        for name, value in {"EndpointUrl": self.url, "Curl": call, **self.auth.outputs()}.items():
            cdk.CfnOutput(stack, name, value=value)


def _only_through(doors: list[ec2.IInterfaceVpcEndpoint]) -> iam.PolicyDocument:
    """Who is answered is for the methods to say; that requests come through one of the doors is said here."""
    allow = {"actions": ["execute-api:Invoke"], "principals": [iam.AnyPrincipal()], "resources": ["execute-api:/*"]}
    condition = {"StringNotEquals": {"aws:SourceVpce": [door.vpc_endpoint_id for door in doors]}}
    return iam.PolicyDocument(
        statements=[iam.PolicyStatement(**allow), iam.PolicyStatement(effect=iam.Effect.DENY, conditions=condition, **allow)]
    )


def _add_preflight(resource: apigw.IResource, origins: tuple[str, ...]) -> None:
    """The gateway itself answers OPTIONS: a preflight carries no key, and should not reach a server."""
    method = resource.add_cors_preflight(
        allow_origins=list(origins), allow_methods=CORS_METHODS, allow_headers=CORS_HEADERS, max_age=cdk.Duration.hours(1)
    )
    _acknowledge_open(method, "a CORS preflight carries no credentials; the gateway answers it alone")


def _acknowledge_open(method: apigw.Method, reason: str) -> None:
    acknowledge(method, {"APIG4": reason, "COG4": reason})

"""The way from a REST API's method to an internal Application Load Balancer: VPC link V2, no Network Load Balancer between them.

aws-cdk-lib 2.275 has no such integration; the class below has the name and the arguments of the one that is coming to
`aws_apigateway`, `path` apart, so that it can be swapped. Knows nothing of routes or auth. `Endpoint` calls it.

The stage's name is part of the path that the load balancer receives (API Gateway's developer guide, "Private integrations"). The override
that would take it out is a mapping template, and responses cannot be streamed with one. So the server strips it: see `edge_variables`.
"""

import json
from typing import Any

import jsii
from aws_cdk import Aspects, IAspect
from aws_cdk import aws_apigateway as apigw
from aws_cdk import aws_apigatewayv2 as apigwv2
from aws_cdk import aws_elasticloadbalancingv2 as elbv2
from constructs import IConstruct


class AlbIntegration(apigw.Integration):
    """Proxies a method to `listener`'s load balancer through `vpc_link`.

    `path` is the backend's (`{name}` for a mapped parameter); default: the path of the method's resource. The load balancer must be of this
    app and account."""

    def __init__(
        self,
        listener: elbv2.ApplicationListener,
        *,
        vpc_link: apigwv2.IVpcLink,
        http_method: str | None = None,
        path: str | None = None,
        request_parameters: dict[str, str] | None = None,
        response_transfer_mode: apigw.ResponseTransferMode | None = None,
        timeout: Any = None,
    ) -> None:
        options = apigw.IntegrationOptions(
            connection_type=apigw.ConnectionType.VPC_LINK,
            vpc_link=_as_first_version(vpc_link),
            request_parameters=request_parameters,
            response_transfer_mode=response_transfer_mode,
            timeout=timeout,
        )
        self._balancer, self._port, self._link_id = listener.load_balancer, listener.port, vpc_link.vpc_link_id
        self._method, self._path = http_method, path
        super().__init__(
            type=apigw.IntegrationType.HTTP_PROXY, integration_http_method=http_method or "ANY", uri="http://set.in.bind", options=options
        )

    @jsii.member(jsii_name="bind")
    def bind(self, method: apigw.Method) -> apigw.IntegrationConfig:
        """Called by the method that is being made. The target is not known to the L2 method: it is put into its resource at synth, and
        into the deployment's fingerprint here, since an override is not part of it."""
        target = self._balancer.load_balancer_arn
        Aspects.of(method).add(_Target(target))
        uri = f"http://{self._balancer.load_balancer_dns_name}:{self._port}{self._path or method.resource.path}"
        bound = super().bind(method)
        return apigw.IntegrationConfig(
            type=bound.type,
            options=bound.options,
            uri=uri,
            integration_http_method=self._method or method.http_method,
            deployment_token=json.dumps({"target": target, "link": self._link_id, "uri": uri}),
        )


@jsii.implements(IAspect)
class _Target:
    """Puts what the L2 method has no property for into its resource."""

    def __init__(self, load_balancer_arn: str) -> None:
        self._arn = load_balancer_arn

    def visit(self, node: IConstruct) -> None:
        if isinstance(node, apigw.CfnMethod):
            node.add_property_override("Integration.IntegrationTarget", self._arn)


def _as_first_version(link: apigwv2.IVpcLink) -> apigw.IVpcLink:
    """The L2 options take a link of the first version alone; all they do with it is to write its id."""
    name = "AsFirstVersion"
    known = link.node.try_find_child(name)
    return known if known is not None else apigw.VpcLink.from_vpc_link_id(link, name, link.vpc_link_id)

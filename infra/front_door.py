"""What may stand before the API: a name of the deployer's with its certificate, and a web application firewall. Both are off by default.

Knows nothing of routes. `Endpoint` calls both functions.
"""

import aws_cdk as cdk
from aws_cdk import aws_apigateway as apigw
from aws_cdk import aws_certificatemanager as acm
from aws_cdk import aws_route53 as route53
from aws_cdk import aws_wafv2 as wafv2
from constructs import Construct

from infra.config import KitConfig

# Prompts are prose, code and markup: rules that judge a body would take them for attacks, and one refuses bodies beyond 8 kB. They count.
_COUNTED = {
    "AWSManagedRulesCommonRuleSet": (
        "SizeRestrictions_BODY",
        "CrossSiteScripting_BODY",
        "GenericLFI_BODY",
        "GenericRFI_BODY",
        "EC2MetaDataSSRF_BODY",
    ),
    "AWSManagedRulesKnownBadInputsRuleSet": ("Log4JRCE_BODY", "JavaDeserializationRCE_BODY", "ReactJSRCE_BODY"),
    "AWSManagedRulesAmazonIpReputationList": (),
}


def add_domain(scope: Construct, *, config: KitConfig, api: apigw.RestApi) -> str | None:
    """Puts `api` under `endpoint.domain`, and the name into `endpoint.hosted_zone_id` if given. The URL, or None without a domain."""
    endpoint = config.endpoint
    if not endpoint.domain:
        return None
    domain = api.add_domain_name(
        "Domain",
        domain_name=endpoint.domain,
        certificate=acm.Certificate.from_certificate_arn(scope, "Certificate", endpoint.certificate_arn),
        endpoint_type=apigw.EndpointType.REGIONAL,
        security_policy=apigw.SecurityPolicy.TLS_1_2,
    )
    if endpoint.hosted_zone_id:
        alias = route53.CfnRecordSet.AliasTargetProperty(
            dns_name=domain.domain_name_alias_domain_name, hosted_zone_id=domain.domain_name_alias_hosted_zone_id
        )
        route53.CfnRecordSet(  # the L2 record asks for the zone's name, which its id says already
            scope, "Record", hosted_zone_id=endpoint.hosted_zone_id, name=endpoint.domain, type="A", alias_target=alias
        )
    else:
        cdk.CfnOutput(cdk.Stack.of(scope), "DomainTarget", value=domain.domain_name_alias_domain_name)
    return f"https://{endpoint.domain}/"


def add_firewall(scope: Construct, *, config: KitConfig, stage: apigw.Stage) -> wafv2.CfnWebACL | None:
    """AWS's managed rules and a limit on each address, before `stage`, if `endpoint.waf`."""
    if not config.endpoint.waf:
        return None
    managed = [_managed(position, name, counted) for position, (name, counted) in enumerate(_COUNTED.items(), start=1)]
    firewall = wafv2.CfnWebACL(
        scope,
        "Firewall",
        scope="REGIONAL",
        default_action=wafv2.CfnWebACL.DefaultActionProperty(allow={}),
        rules=[_rate_limit(config.endpoint.waf_rate), *managed],
        visibility_config=_visible("Firewall"),
    )
    wafv2.CfnWebACLAssociation(scope, "FirewallAssociation", resource_arn=stage.stage_arn, web_acl_arn=firewall.attr_arn)
    return firewall


def _rate_limit(num_requests: int) -> wafv2.CfnWebACL.RuleProperty:
    """At most so many requests in five minutes from one address."""
    limit = wafv2.CfnWebACL.RateBasedStatementProperty(aggregate_key_type="IP", limit=num_requests, evaluation_window_sec=300)
    return wafv2.CfnWebACL.RuleProperty(
        name="RateLimit",
        priority=0,
        action=wafv2.CfnWebACL.RuleActionProperty(block={}),
        statement=wafv2.CfnWebACL.StatementProperty(rate_based_statement=limit),
        visibility_config=_visible("RateLimit"),
    )


def _managed(priority: int, name: str, counted: tuple[str, ...]) -> wafv2.CfnWebACL.RuleProperty:
    count = wafv2.CfnWebACL.RuleActionProperty(count={})
    group = wafv2.CfnWebACL.ManagedRuleGroupStatementProperty(
        vendor_name="AWS",
        name=name,
        rule_action_overrides=[wafv2.CfnWebACL.RuleActionOverrideProperty(name=rule, action_to_use=count) for rule in counted] or None,
    )
    return wafv2.CfnWebACL.RuleProperty(
        name=name,
        priority=priority,
        override_action=wafv2.CfnWebACL.OverrideActionProperty(none={}),
        statement=wafv2.CfnWebACL.StatementProperty(managed_rule_group_statement=group),
        visibility_config=_visible(name),
    )


def _visible(name: str) -> wafv2.CfnWebACL.VisibilityConfigProperty:
    return wafv2.CfnWebACL.VisibilityConfigProperty(cloud_watch_metrics_enabled=True, metric_name=name, sampled_requests_enabled=False)

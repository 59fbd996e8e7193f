"""The key by which the servers know that it is the gateway that names a tenant. Anybody could write the tenant's header; the gateway alone
knows this key, and writes both on every route that asks for authentication.

Addresses would not do in its place: a server sees the load balancer's, whoever called. Made with `endpoint.tenants`, before fleet and
endpoint, which both take it.
"""

from constructs import Construct

from infra.config import KitConfig
from infra.shown_key import ShownKey


class GatewayKey(ShownKey):
    """`secret`: None without `endpoint.tenants`; `arn`: its ARN or ""."""

    def __init__(self, scope: Construct, id: str, *, config: KitConfig) -> None:
        wanted = config.endpoint.tenants
        super().__init__(scope, id, config=config, wanted=wanted, what="what the gateway shows to the servers beside a tenant's name")

"""The key that the servers ask for before they publish or unload an adapter. Nobody knows it: the gateway shows it for callers whose
authorization says that they may (`infra.auth`), and the instances read it when they boot.

Made before fleet and endpoint, which both take it. Where the auth mode cannot tell an admin, there is no key, and the routes are off twice:
not mapped, and refused by the servers.
"""

from constructs import Construct

from infra.auth import MODES
from infra.config import KitConfig
from infra.shown_key import ShownKey


class AdminKey(ShownKey):
    """`secret`: None without an admin; `arn`: its ARN or ""."""

    def __init__(self, scope: Construct, id: str, *, config: KitConfig) -> None:
        wanted = MODES[config.endpoint.auth].has_admin
        super().__init__(scope, id, config=config, wanted=wanted, what="what the gateway shows to the servers on admin routes")

"""How far a symbolic link below --adapters-dir may lead: no further than whoever may read its place may read anyway.

Owns the question which places of the tenants file a place is below; sources.local asks it for each id and looks at the links. Made anew
whenever the rules change.
"""

import re
from collections.abc import Iterator

from server.api.tenants.rules import EVERY, TENANT_NAME, Rules

_TENANT = "{tenant}"


class LinkBounds:
    """For the places of one source."""

    def __init__(self, rules: Rules, source: str = "local") -> None:
        self._places = {_plain(one) for one in _listed(rules, source)} - {EVERY}
        given = rules.defaults.sources.get(source, ()) if rules.gateway.others == "each" else ()
        self._forms = [re.compile(re.escape(_plain(one)).replace(re.escape(_TENANT), TENANT_NAME.pattern)) for one in given if one != EVERY]

    def of(self, place: str) -> list[str]:
        """The places of tenants, and shared ones, that a place is or is below; what lies there must really lie below each of them."""
        segments = place.split("/")
        above = ("/".join(segments[:length]) for length in range(1, len(segments) + 1))
        return [one for one in above if one in self._places or any(form.fullmatch(one) for form in self._forms)]


def _listed(rules: Rules, source: str) -> Iterator[str]:
    yield from rules.shared.sources.get(source, ())
    for name in rules.tenants:
        tenant = rules.tenant(name)
        assert tenant is not None
        yield from tenant.sources.get(source, ())


def _plain(entry: str) -> str:
    return entry.strip("/")

"""How names of tenants are told apart from each other's and from shared ones, inside this server and in the registry's document.

A tenant's name is kept as `tenant\\name`. No id of a request can look like that: a backslash is refused in all of them (sources.ids), so a
tenant cannot spell another one's name. Shared names, and ids of sources, have no backslash. Owns the spelling alone; pure functions.
"""

SEPARATOR = "\\"


def qualified(tenant: str, name: str) -> str:
    """The name as it is kept; of no tenant ("") the name itself."""
    return f"{tenant}{SEPARATOR}{name}" if tenant else name


def shown(name: str) -> str:
    """The name as its tenant gave it."""
    return name.rpartition(SEPARATOR)[2]


def owner_of(name: str) -> str:
    """The tenant of a kept name; "" for a shared one."""
    return name.rpartition(SEPARATOR)[0]

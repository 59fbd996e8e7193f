"""Everything that a deployer may set: parsed once, frozen, passed on. Nothing below `__main__` reads the environment.

`fields` owns the settings and their bounds, `reading` the three ways in (flags, environment, a TOML file). No knowledge of who uses them.
"""

from server.settings.fields import Settings
from server.settings.reading import SettingsError, read_settings

__all__ = ["Settings", "SettingsError", "read_settings"]

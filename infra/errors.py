"""What is said to the deployer when the configuration cannot be deployed. Imports nothing of ours."""


class ConfigError(ValueError):
    """A key of the configuration that cannot be; the message names each key, what was given and what is allowed."""

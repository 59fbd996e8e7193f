"""What is said when something cannot be sized. Imports nothing of ours."""


class SizingError(ValueError):
    """A model, scheme, rank or instance that cannot be; the message names it and what is allowed."""

"""What makes the rehearsal fail: something differs from what the step promises, or it cannot run here."""


class Differs(Exception):
    """A step did not show what it is there to show; the message says what was wanted and what came."""


class CannotRun(Exception):
    """Something that the rehearsal needs is not on this machine; the message names it."""


def check(holds: object, message: str) -> None:
    """Differs(`message`) unless `holds`."""
    if not holds:
        raise Differs(message)

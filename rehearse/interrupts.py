"""Signals that end the rehearsal: once, and never between the start of a process and the note of who has to end it.

`rehearse.__main__` installs it; whoever starts a process in the main thread does so inside `held`.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_num_held = 0
_came: int | None = None  # while held


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP, once: what ends the rehearsal is not to be interrupted itself."""


def install() -> None:
    """From now on the first of the signals raises Interrupted(its number) in the main thread; later ones do nothing."""
    for number in _SIGNALS:
        signal.signal(number, _interrupt)


@contextmanager
def held() -> Iterator[None]:
    """A signal that comes inside is raised at the end."""
    global _num_held
    _num_held += 1
    try:
        yield
    finally:
        _num_held -= 1
        if _came is not None and not _num_held:
            _raise(_came)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _came
    if _num_held:
        _came = number if _came is None else _came
    else:
        _raise(number)


def _raise(number: int) -> None:
    global _came
    _came = None
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)

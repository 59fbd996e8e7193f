"""How every command-line tool of the repository ends when whoever reads its output has seen enough, as `head` has: at once, saying nothing.

Stands in sizing/ because that is what both halves import. `SIG_DFL` for SIGPIPE would be shorter, but would also end a tool whose peer
closes a socket.
"""

import os
import select
import sys
from collections.abc import Callable

CUT_OFF = 141  # what a shell says of a program that SIGPIPE ended


def run_tool(main: Callable[[], int | None]) -> int:
    """Call `main` and write out what it printed: its exit status (0 for None), or CUT_OFF if nobody reads stdout any more.

    A BrokenPipeError of anything else, such as a socket, goes to the caller, as what else `main` raises does (SystemExit of argparse too).
    """
    try:
        try:
            return main() or 0
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes what is left once more at its end
        return CUT_OFF


def _is_unread(descriptor: int) -> bool:
    """Whether it is a pipe whose reader is gone."""
    poll = select.poll()
    poll.register(descriptor, 0)  # POLLERR and POLLHUP are always told
    return bool(poll.poll(0))

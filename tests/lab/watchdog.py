"""The lab's watchdog: a small process that removes the lab when its owner ends in any way, kill -9 included.

It waits on a pidfd of the owner rather than on a pipe, whose other end a forked child of the owner would keep open.
Its own session and ignored signals keep a Ctrl-C in the terminal, meant for the tests, from ending it first.

    python -m tests.lab.watchdog NAME OWNER_PID OWNER_STARTED_AT
"""

import os
import select
import signal
import sys

from tests.lab.cleanup import started_at, tear_down


def main() -> None:
    """Wait for the owner's end, then remove the lab."""
    name, owner, owner_started_at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)
    try:
        descriptor = os.pidfd_open(owner)
    except ProcessLookupError:
        descriptor = None
    # The owner may have died before the pidfd was opened, and its id may be someone else's by now.
    if descriptor is not None and started_at(owner) == owner_started_at:
        print("watching", flush=True)
        select.select([descriptor], [], [])
    tear_down(name)


if __name__ == "__main__":
    main()

"""The product's heartbeat, on a lab host. Only its watchdog is another."""

import os
from pathlib import Path

from tests.lab.standin import StandInDevice
from workers.heartbeat import LineJournal, lock_memory, make_heartbeat, run


def main() -> None:
    """Run it, with the stand-in whose socket VMHERD_WATCHDOG names."""
    journal = LineJournal(os.environ["VMHERD_NODE"])
    heartbeat = make_heartbeat(os.environ, journal, StandInDevice(Path(os.environ["VMHERD_WATCHDOG"])))
    if why := lock_memory():
        journal("memory is not locked", warning=True, why=why)
    journal("heartbeat starts", address=heartbeat.heart.identity.address)
    run(heartbeat)
    journal("heartbeat has ended")
    journal.drain()


if __name__ == "__main__":
    main()

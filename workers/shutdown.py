"""A host's orderly shutdown: it waits until its VMs have left, and stops those that could not.

The unit `vmherd-guests.service` runs `begin` when the host shuts down, before systemd ends anything that guests need:
the order of units holds the shutdown, with no limit of logind's (whose delay inhibitors get 5 s by default). The
control plane moves the VMs off; what is still here when the time is over is asked to power off, and then destroyed. All
that stops meanwhile is the node's doing: its VMs run again, elsewhere or here when the host is back.
"""

import sys
import threading

from orchestrator import logs
from orchestrator.errors import HypervisorError, OutcomeUnknown, VmherdError
from orchestrator.logs import logger
from orchestrator.settings import Settings, settings
from orchestrator.store.node_store import NodeStore
from workers import clock
from workers.hypervisor.drivers import open_hypervisor
from workers.hypervisor.port import Domain, DomainState, Hypervisor
from workers.reporting import report_surely

log = logger(__name__)

_LOOK_EVERY_S = 0.5
_READ_S = 1.0
"""What the agent is given to report the last stop before the network goes."""


def begin(store: NodeStore, hypervisor: Hypervisor, config: Settings) -> int:
    """Announce the shutdown, wait until no VM of ours is here, and stop those that stay.

    Returns:
        How many had to be stopped.
    """
    report_surely(store, "HostShutdown", {"begins": True})
    left = _wait_until_empty(hypervisor, config.host_shutdown_timeout)
    for domain in left:
        log.warning("VM could not leave; its guest is asked to power off", domain=domain.name)
        try:
            hypervisor.shutdown(domain.uuid)
        except (HypervisorError, OutcomeUnknown) as error:
            log.warning("guest not asked", domain=domain.name, error=str(error))
    for domain in _wait_until_empty(hypervisor, config.host_shutdown_grace) if left else []:
        log.warning("guest did not power off; it is destroyed", domain=domain.name)
        try:
            hypervisor.destroy(domain.uuid)
        except (HypervisorError, OutcomeUnknown) as error:
            log.warning("not destroyed", domain=domain.name, error=str(error))
    if left:
        clock.wait(threading.Event(), _READ_S)
    return len(left)


def end(store: NodeStore) -> None:
    """Announce that the host is up."""
    report_surely(store, "HostShutdown", {"begins": False})


def _wait_until_empty(hypervisor: Hypervisor, seconds: float) -> list[Domain]:
    """Wait until no VM of ours runs here; gives those that still do when the time is over."""
    deadline, pause = clock.monotonic() + seconds, threading.Event()
    while True:
        try:
            left = [d for d in hypervisor.domains() if d.marker is not None and d.state is not DomainState.SHUTOFF]
        except HypervisorError as error:
            log.warning("the hypervisor does not answer", error=str(error))
            left = []
            if clock.monotonic() >= deadline:
                return left
        else:
            if not left or clock.monotonic() >= deadline:
                return left
        clock.wait(pause, _LOOK_EVERY_S)


def main() -> None:
    """Run `begin` or `end`, as the only argument says."""
    try:
        config = settings()
        logs.configure("shutdown")
        store = NodeStore.open()
        if sys.argv[1:] == ["end"]:
            end(store)
            return
        hypervisor = open_hypervisor(config)
    except VmherdError as error:
        raise SystemExit(f"vmherd: {error}") from None
    stopped = begin(store, hypervisor, config)
    log.info("no VM of ours is here any more", stopped=stopped)
    hypervisor.close()


if __name__ == "__main__":
    main()

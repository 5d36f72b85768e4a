"""The inventory: what this host has, reported as differences from what was reported before.

One thread reads and reports, in the order in which events come, so the node's counter orders what it says.
"""

import queue
import threading
import time
from typing import Any

from orchestrator.errors import HypervisorError, HypervisorUnavailable, StoreUnavailable
from orchestrator.logs import logger
from orchestrator.store.node_store import NodeStore
from workers.hypervisor.port import Domain, DomainEvent, DomainState, EventKind, Hypervisor
from workers.reporting import report_surely

log = logger(__name__)

_LIST_EVERY_S = 60.0
_ADDRESSES_EVERY_S = 10.0
_RETRY_S = 1.0


class Inventory:
    """Reports this host's domains.

    Args:
        store: This node's.
        hypervisor: This node's.
        facts: What is told of the host besides what the hypervisor knows: migration_uri.
        generation: Of this agent; new at each start.
        boot_id: Of this host's boot.
    """

    def __init__(
        self,
        store: NodeStore,
        hypervisor: Hypervisor,
        facts: dict[str, Any],
        generation: str,
        boot_id: str,
        stop: threading.Event,
    ) -> None:
        self._store = store
        self._hypervisor = hypervisor
        self._facts = facts
        self._generation = generation
        self._boot_id = boot_id
        self._stop = stop
        self._events: queue.SimpleQueue[DomainEvent | str] = queue.SimpleQueue()
        self._sent: dict[str, dict[str, Any]] = {}

    def note(self, event: DomainEvent) -> None:
        """Take an event of the hypervisor's."""
        self._events.put(event)

    def list_anew(self, order: str) -> None:
        """List everything anew and answer that order."""
        self._events.put(order)

    def run(self) -> None:
        """Report until stopped: a listing at first and every minute, and differences as they come."""
        due = addresses_due = 0.0
        wanted: str | None = ""
        while not self._stop.is_set():
            try:
                if wanted is not None or time.monotonic() >= due:
                    self._list(wanted or "")
                    wanted, due = None, time.monotonic() + _LIST_EVERY_S
                if time.monotonic() >= addresses_due:
                    self._look_for_addresses()
                    addresses_due = time.monotonic() + _ADDRESSES_EVERY_S
                item = self._next(due)
                if isinstance(item, str):
                    wanted = item
                elif item is not None and self._take(item):
                    wanted = ""
            except HypervisorUnavailable as error:
                log.warning("the hypervisor does not answer", error=str(error))
                report_surely(self._store, "HypervisorLost", {"message": str(error)}, self._stop)
                wanted = wanted or ""
                self._stop.wait(_RETRY_S)
            except (StoreUnavailable, HypervisorError) as error:
                log.warning("inventory: tried again", error=str(error))
                wanted = wanted or ""
                self._stop.wait(_RETRY_S)

    def _next(self, due: float) -> DomainEvent | str | None:
        try:
            return self._events.get(timeout=max(0.05, min(due - time.monotonic(), 1.0)))
        except queue.Empty:
            return None

    def _take(self, event: DomainEvent) -> bool:
        """Report one event's domain.

        Returns:
            Whether everything has to be listed anew.
        """
        match event.kind:
            case EventKind.RESYNC:
                return True
            case EventKind.LOST:
                report_surely(self._store, "HypervisorLost", {"message": "libvirtd's connection is gone"}, self._stop)
                return False
            case _:
                self._report(event)
                return False

    def _report(self, event: DomainEvent) -> None:
        domain = self._hypervisor.domain(event.uuid)
        if domain is None or (domain.state is DomainState.SHUTOFF and event.kind is EventKind.STOPPED):
            resumed = event.kind is EventKind.RESUMED
            was_inactive = self._sent.get(event.uuid, {}).get("state") == DomainState.SHUTOFF.value
            if event.kind is not EventKind.STOPPED and not resumed and not was_inactive:
                return  # it went since; only its STOPPED event, which is to come, tells how
            self._sent.pop(event.uuid, None)
            body = {
                "uuid": event.uuid,
                "domain": None,
                "detail": "" if resumed else event.detail,
                "reason": event.reason,
                "ran": resumed,
            }
            report_surely(self._store, "Domain", body, self._stop)
            return
        seen = self._describe(domain)
        if self._sent.get(event.uuid) == seen:
            return
        report_surely(self._store, "Domain", {"uuid": event.uuid, "domain": seen}, self._stop)
        self._sent[event.uuid] = seen

    def _report_waiting(self) -> None:
        """Report the events that came while a listing was read: they tell how a domain went that it does not show."""
        for _ in range(self._events.qsize()):
            item = self._events.get()
            if isinstance(item, DomainEvent) and item.uuid:
                self._report(item)
            else:
                self._events.put(item)

    def _look_for_addresses(self) -> None:
        """Look again at guests that run and show no address: no event tells of a lease or of ARP."""
        for uuid, sent in list(self._sent.items()):
            if sent["state"] == DomainState.RUNNING and not sent["addresses"]:
                self._report(DomainEvent(EventKind.CHANGED, uuid))

    def _list(self, order: str) -> None:
        began = self._store.counter()  # before the reading: what is reported after this number is newer than it
        host = self._hypervisor.host()
        domains = [self._describe(domain) for domain in self._hypervisor.domains()]
        body = {
            "host": {
                "hostname": host.hostname,
                "uuid": host.uuid,
                "cpus": host.cpus,
                "memory_mib": host.memory_mib,
                "cpu_model": host.cpu_model,
                "hypervisor_version": host.hypervisor_version,
                "libvirt_version": host.libvirt_version,
                **self._facts,
            },
            "generation": self._generation,
            "boot_id": self._boot_id,
            "began": began,
            "domains": domains,
            "order": order,
        }
        self._sent = {domain["uuid"]: domain for domain in domains}
        self._report_waiting()
        report_surely(self._store, "Listing", body, self._stop)

    def _describe(self, domain: Domain) -> dict[str, Any]:
        marker = domain.marker
        addresses: list[str] = []
        if domain.state is DomainState.RUNNING and not domain.has_job:
            addresses = self._hypervisor.addresses(domain.uuid)
        return {
            "uuid": domain.uuid,
            "name": domain.name,
            "state": domain.state.value,
            "reason": domain.reason,
            "vm": f"{marker.project}/{marker.name}" if marker else "",
            "incarnation": marker.incarnation if marker else 0,
            "epoch": marker.epoch if marker else 0,
            "memoryMib": domain.memory_mib,
            "vcpus": domain.vcpus,
            "job": domain.has_job and (domain.job is None or domain.job.outgoing),
            "addresses": addresses,
        }

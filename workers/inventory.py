"""The inventory: what this host has, reported as differences from what was reported before.

One thread reads and reports, in the order in which events come, so the node's counter orders what it says.
"""

import queue
import threading
from dataclasses import asdict
from typing import Any

from orchestrator.errors import HypervisorError, HypervisorUnavailable, StoreUnavailable
from orchestrator.logs import logger
from orchestrator.store.node_store import NodeStore
from workers import clock
from workers.hypervisor.port import Domain, DomainEvent, DomainState, EventKind, Hypervisor
from workers.preflight import Needs
from workers.reporting import report_surely

log = logger(__name__)

_LIST_EVERY_S = 60.0
_ADDRESSES_EVERY_S = 10.0
_RETRY_S = 1.0
_REBOOT_TOLD_S = 3.0
_KEEPALIVE_S = 10.0
"""A connection to a daemon that hangs is given up after so long: the news of it may come when the daemon is back."""


class Inventory:
    """Reports this host's domains.

    Args:
        store: This node's.
        hypervisor: This node's.
        facts: What is told of the host besides what the hypervisor knows: migration_uri.
        generation: Of this agent; new at each start.
        boot_id: Of this host's boot.
        needs: Tells what the domains need of a host to which they migrate.
    """

    def __init__(
        self,
        store: NodeStore,
        hypervisor: Hypervisor,
        facts: dict[str, Any],
        generation: str,
        boot_id: str,
        stop: threading.Event,
        needs: Needs,
    ) -> None:
        self._store = store
        self._hypervisor = hypervisor
        self._facts = facts
        self._generation = generation
        self._boot_id = boot_id
        self._stop = stop
        self._events: queue.SimpleQueue[DomainEvent | str] = queue.SimpleQueue()
        self._woken = threading.Event()  # set after each put: its wait is the clock's
        self._sent: dict[str, dict[str, Any]] = {}
        self._needs = needs
        self._rebooted_at: dict[str, float] = {}
        self._answered_at = -_KEEPALIVE_S

    def note(self, event: DomainEvent) -> None:
        """Take an event of the hypervisor's."""
        self._events.put(event)
        self._woken.set()

    def list_anew(self, order: str) -> None:
        """List everything anew and answer that order."""
        self._events.put(order)
        self._woken.set()

    def run(self) -> None:
        """Report until stopped: a listing at first and every minute, and differences as they come."""
        due = addresses_due = 0.0
        wanted: str | None = ""
        while not self._stop.is_set():
            try:
                if wanted is not None or clock.monotonic() >= due:
                    self._list(wanted or "")
                    wanted, due = None, clock.monotonic() + _LIST_EVERY_S
                if clock.monotonic() >= addresses_due:
                    self._look_for_addresses()
                    addresses_due = clock.monotonic() + _ADDRESSES_EVERY_S
                item = self._next(due)
                if isinstance(item, str):
                    wanted = item
                elif item is not None and self._take(item):
                    wanted = ""
            except HypervisorUnavailable as error:
                log.warning("the hypervisor does not answer", error=str(error))
                report_surely(self._store, "HypervisorLost", {"message": str(error)}, self._stop)
                wanted = wanted or ""
                clock.wait(self._stop, _RETRY_S)
            except (StoreUnavailable, HypervisorError) as error:
                log.warning("inventory: tried again", error=str(error))
                wanted = wanted or ""
                clock.wait(self._stop, _RETRY_S)

    def _next(self, due: float) -> DomainEvent | str | None:
        if self._events.empty():
            clock.wait(self._woken, max(0.05, min(due - clock.monotonic(), 1.0)))
            self._woken.clear()  # before the look: what is put after it sets this again
        try:
            return self._events.get_nowait()
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
                if clock.monotonic() - self._answered_at < _KEEPALIVE_S:
                    return True  # it may be old news: a listing tells at once whether the daemon is there
                report_surely(self._store, "HypervisorLost", {"message": "libvirtd's connection is gone"}, self._stop)
                return False
            case EventKind.REBOOTED:
                self._tell_reboot(event.uuid)
                return False
            case _:
                self._report(event)
                return False

    def _tell_reboot(self, uuid: str) -> None:
        """Report a guest's reboot once: libvirt tells each two or three times."""
        clock_s = clock.monotonic()
        is_news = clock_s - self._rebooted_at.get(uuid, -_REBOOT_TOLD_S) >= _REBOOT_TOLD_S
        self._rebooted_at = {known: at for known, at in self._rebooted_at.items() if clock_s - at < _REBOOT_TOLD_S}
        if is_news:
            self._rebooted_at[uuid] = clock_s
            report_surely(self._store, "Rebooted", {"uuid": uuid}, self._stop)

    def _report(self, event: DomainEvent) -> None:
        began = self._store.counter()  # before the reading: it may be overtaken by what is answered meanwhile
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
        needs = self._news(domain)
        if self._sent.get(event.uuid) == seen and needs is None:
            return
        told = {"uuid": event.uuid, "domain": {**seen, "needs": needs}, "began": began}
        report_surely(self._store, "Domain", told, self._stop)
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
        if order:
            self._needs.forget()  # what was told before may be lost, as the herd is in recovery
        found = self._hypervisor.domains()
        self._answered_at = clock.monotonic()
        domains = [self._describe(domain) for domain in found]
        needs = [self._news(domain) for domain in found]
        body = {
            "host": {
                "hostname": host.hostname,
                "uuid": host.uuid,
                "cpus": host.cpus,
                "memory_mib": host.memory_mib,
                "cpu_model": host.cpu_model,
                "hypervisor_version": host.hypervisor_version,
                "libvirt_version": host.libvirt_version,
                "domain_type": host.domain_type,
                "cpu": asdict(host.cpu),
                **self._facts,
            },
            "generation": self._generation,
            "boot_id": self._boot_id,
            "began": began,
            "domains": [{**seen, "needs": news} for seen, news in zip(domains, needs, strict=True)],
            "order": order,
        }
        self._sent = {domain["uuid"]: domain for domain in domains}
        self._report_waiting()
        report_surely(self._store, "Listing", body, self._stop)

    def _news(self, domain: Domain) -> dict[str, Any] | None:
        """What a domain needs, where that was not told; one that has just come is told of again."""
        came = self._sent.get(domain.uuid, {}).get("state") != DomainState.RUNNING
        return self._needs.news(domain, is_new=came)

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
            "persistent": domain.persistent,
            "agent": domain.agent if domain.state is DomainState.RUNNING else None,
        }

"""Adoption and release on a node: its domains are described, recorded, taken over, given back.

Every step looks first at what is there, so it may be done any number of times, and goes on where a worker died. What
is taken over was put on record before: only a domain whose definition is that of the record is touched. Those orders
that change something are carried out one at a time, and each is read again when its turn has come, so that a message
that comes late finds its order answered and does nothing.
"""

import threading
import xml.etree.ElementTree as ET  # what is parsed, libvirtd wrote
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import HypervisorError, HypervisorUnavailable, OutcomeUnknown
from orchestrator.logs import logger
from orchestrator.resources.adoption import (
    XML_MOST,
    AdoptionOrder,
    AdoptionOrderKind,
    FoundDomain,
    fingerprint,
    local_files,
)
from orchestrator.store.node_store import NodeStore
from workers.hypervisor.port import Definition, Domain, DomainState, Hypervisor, Marker
from workers.preflight import SHARED_FILE_SYSTEMS, Storage, file_system
from workers.reporting import report_surely

log = logger(__name__)

_one_at_a_time = threading.Lock()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an order.

    Attributes:
        outcome: `taken`, `gone`, `stopped`, `refused`; `released`, `failed`; `removed`, `kept`.
        message: For people.
        state: Of the domain afterwards; empty when the host does not have it.
    """

    outcome: str
    message: str = ""
    state: str = ""


def answer(
    store: NodeStore, hypervisor: Hypervisor, order: AdoptionOrder, storage: Storage, stop: threading.Event
) -> None:
    """Answer a question about definitions; the agent does this.

    Raises:
        HypervisorError: Not now; the order stays.
    """
    if order.kind is AdoptionOrderKind.RECORD:
        report_surely(store, "Adoption", {"order": order.id, **_record(hypervisor, order)}, stop)
        return
    count = 0
    for domain in hypervisor.domains():
        found = describe(hypervisor, domain, storage, order.names)
        body = {"order": order.id, "domain": found.model_dump(mode="json", by_alias=True)}
        report_surely(store, "Adoption", body, stop)
        count += 1
    report_surely(store, "Adoption", {"order": order.id, "count": count}, stop)


def describe(hypervisor: Hypervisor, domain: Domain, storage: Storage, names: tuple[str, ...] = ()) -> FoundDomain:
    """Describe one domain, without its secrets.

    Args:
        hypervisor: This node's.
        domain: As it was just read.
        storage: This node's.
        names: Domains whose XML is wanted, by name or UUID; empty: of all that bear no mark.
    """
    found = FoundDomain(
        uuid=domain.uuid,
        name=domain.name,
        state=domain.state.value,
        vm=f"{domain.marker.project}/{domain.marker.name}" if domain.marker else "",
        persistent=domain.persistent,
        vcpus=domain.vcpus,
        memory_mib=domain.memory_mib,
    )
    is_wanted = domain.name in names or domain.uuid in names if names else domain.marker is None
    if not is_wanted or not domain.persistent or domain.state is DomainState.SHUTOFF:
        return found
    plain, secure = hypervisor.definition(domain.uuid), hypervisor.definition(domain.uuid, secrets=True)
    if plain is None or secure is None or not plain.live_xml or not plain.inactive_xml or _is_too_long(secure):
        return found
    return found.with_(
        autostart=plain.autostart,
        snapshots=plain.snapshots,
        secrets=(plain.inactive_xml, plain.live_xml) != (secure.inactive_xml, secure.live_xml),
        is_read=True,
        inactive_xml=plain.inactive_xml,
        live_xml=plain.live_xml,
        local=_local(plain, domain.uuid, storage),
    )


def _is_too_long(definition: Definition) -> bool:
    return max(len(definition.inactive_xml), len(definition.live_xml)) > XML_MOST


def _local(plain: Definition, uuid: str, storage: Storage) -> dict[str, str]:
    """Name the files that no other host sees, each with the type of its file system."""
    try:
        roles = local_files(plain.inactive_xml, plain.live_xml, uuid)
    except ValueError:
        return {}  # broken XML is told as such by whoever plans the adoption
    mounts = Path("/proc/self/mountinfo").read_text()
    found: dict[str, str] = {}
    for path, role in roles.items():
        kind = file_system(str(Path(path).resolve()), mounts)
        # What is said of the images says nothing of the folders in which libvirt keeps a machine's state.
        is_shared = kind in SHARED_FILE_SYSTEMS if role in {"nvram", "tpm"} else storage.is_shared(path)
        if not is_shared:
            found[path] = kind
    return found


def _record(hypervisor: Hypervisor, order: AdoptionOrder) -> dict[str, Any]:
    domain = hypervisor.domain(order.uuid)
    if domain is None or domain.state is DomainState.SHUTOFF:
        return {"problem": "it does not run any more"}
    plain, secure = hypervisor.definition(order.uuid), hypervisor.definition(order.uuid, secrets=True)
    if plain is None or secure is None or not secure.inactive_xml:
        return {"problem": "its host has no definition of it any more"}
    if plain.snapshots:
        return {"problem": f"it has {plain.snapshots} snapshots or checkpoints, which go with its definition"}
    if _is_too_long(secure):
        return {"problem": f"its XML is longer than {XML_MOST // 1024} KiB"}
    return {
        "domain": domain.name,
        "plain": fingerprint(plain.inactive_xml),
        "inactive_xml": secure.inactive_xml,
        "live_xml": secure.live_xml,
        "autostart": secure.autostart,
    }


def run_adoption(store: NodeStore, hypervisor: Hypervisor, order_id: str) -> str:
    """Carry out an order that changes a domain's definition, and answer it; the lifecycle worker does this.

    Returns:
        What became of it, for Flower's list.

    Raises:
        HypervisorUnavailable: Not now; the order stays and is sent again.
    """
    with _one_at_a_time:
        order = store.adoption_order(order_id)
        if order is None:
            return f"{order_id}: answered already"
        began = store.counter()  # what is reported after this number may be newer than what is read from here on
        try:
            done = _carry_out(hypervisor, order)
        except HypervisorUnavailable:
            raise
        except (HypervisorError, OutcomeUnknown) as error:
            log.warning("definition: tried again", order=order_id, error=str(error))
            return f"{order_id}: not known yet: {error}"
        log.info("definition", order=order_id, outcome=done.outcome, message=done.message)
        report_surely(store, "Adoption", {"order": order_id, "began": began, **asdict(done)})
        return f"{order.vm}: {done.outcome} {done.message}".rstrip()


def _carry_out(hypervisor: Hypervisor, order: AdoptionOrder) -> Outcome:
    match order.kind:
        case AdoptionOrderKind.TAKE_OVER:
            return _take_over(hypervisor, order)
        case AdoptionOrderKind.RELEASE:
            return _release(hypervisor, order)
        case AdoptionOrderKind.UNDEFINE:
            return _undefine(hypervisor, order)
        case _:
            raise HypervisorError(f"order {order.id} is the agent's to answer")


def _take_over(hypervisor: Hypervisor, order: AdoptionOrder) -> Outcome:
    """Mark a domain and make it transient; it runs on."""
    domain = hypervisor.domain(order.uuid)
    if domain is None:
        return Outcome("gone", "it ended, and its host has no definition of it")
    if domain.persistent:
        if domain.state is DomainState.SHUTOFF:
            return Outcome("stopped", "it stopped meanwhile; its host has it as it was", domain.state.value)
        definition = hypervisor.definition(order.uuid, secrets=True)
        if definition is None or fingerprint(definition.inactive_xml) != order.fingerprint:
            return _leave(hypervisor, order, "its definition was changed meanwhile")
        if definition.snapshots:
            return _leave(hypervisor, order, "a snapshot or checkpoint of it was made meanwhile")
    try:
        if not _is_marked(domain, order):
            hypervisor.mark(order.uuid, _marker(order))
        hypervisor.undefine(order.uuid)
    except HypervisorUnavailable:
        raise
    except HypervisorError as error:
        return _leave(hypervisor, order, str(error))
    domain = hypervisor.domain(order.uuid)
    if domain is None:
        return Outcome("gone", "it ended, and its host has no definition of it")
    if domain.persistent:
        raise HypervisorError(f"domain {order.uuid} was defined again while it was taken over")
    return Outcome("taken", state=domain.state.value)


def _leave(hypervisor: Hypervisor, order: AdoptionOrder, why: str) -> Outcome:
    """Leave a domain as it was found: persistent and without our mark.

    Raises:
        HypervisorError: It can't be left so; the order stays.
    """
    domain = hypervisor.domain(order.uuid)
    if domain is None:
        return Outcome("gone", why)
    if not domain.persistent:
        raise HypervisorError(why)
    if domain.state is not DomainState.SHUTOFF and domain.marker is not None:
        hypervisor.unmark(order.uuid)
    return Outcome("refused", why, domain.state.value)


def _release(hypervisor: Hypervisor, order: AdoptionOrder) -> Outcome:
    """Take our mark off a domain and define it as it was. First the mark: what is ours is undefined again."""
    domain = hypervisor.domain(order.uuid)
    is_active = domain is not None and domain.state is not DomainState.SHUTOFF
    state = domain.state.value if domain is not None else ""
    if is_active and not order.runs:
        return Outcome("failed", f"it is {state} on its host, against what is on record", state)
    if order.runs and domain is None:
        return Outcome("failed", "it does not run on its host any more")
    if domain is not None and domain.marker is not None and not _is_marked(domain, order):
        return Outcome("failed", f"its host has incarnation {domain.marker.incarnation} of it", state)
    # libvirt knows a domain that runs by one name; one that vmherd started has the name that vmherd gave it.
    xml = with_name(order.inactive_xml, domain.name) if domain is not None else order.inactive_xml
    try:
        if is_active:
            hypervisor.unmark(order.uuid)
        hypervisor.define(xml, autostart=order.autostart)
    except HypervisorUnavailable:
        raise
    except HypervisorError as error:
        if is_active:
            hypervisor.mark(order.uuid, _marker(order))
        return Outcome("failed", str(error), state)
    domain = hypervisor.domain(order.uuid)
    if domain is None or not domain.persistent:
        raise HypervisorError(f"domain {order.uuid} was defined, and is not persistent")
    return Outcome("released", f"as domain {domain.name}", domain.state.value)


def _undefine(hypervisor: Hypervisor, order: AdoptionOrder) -> Outcome:
    """Make a domain of ours transient again that somebody defined behind our back."""
    domain = hypervisor.domain(order.uuid)
    if domain is None or domain.state is DomainState.SHUTOFF or not domain.persistent:
        return Outcome("kept", state=domain.state.value if domain is not None else "")
    if not _is_marked(domain, order):
        return Outcome("kept", "it does not bear the mark of its VM", domain.state.value)
    try:
        hypervisor.undefine(order.uuid)
    except HypervisorUnavailable:
        raise
    except HypervisorError as error:
        return Outcome("kept", str(error), domain.state.value)
    return Outcome("removed", state=domain.state.value)


def with_name(domain_xml: str, name: str) -> str:
    """Give a domain XML with another name; the same text where that is its name already."""
    if ET.fromstring(domain_xml).findtext("name") == name:  # noqa: S314
        return domain_xml
    head, _, rest = domain_xml.partition("<name>")
    _, _, tail = rest.partition("</name>")
    escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"{head}<name>{escaped}</name>{tail}"


def _marker(order: AdoptionOrder) -> Marker:
    project, _, name = order.vm.partition("/")
    return Marker(project, name, order.incarnation, order.epoch)


def _is_marked(domain: Domain, order: AdoptionOrder) -> bool:
    """Whether it bears the mark of the order's VM, of this incarnation."""
    marker = domain.marker
    return (
        marker is not None and f"{marker.project}/{marker.name}" == order.vm and marker.incarnation == order.incarnation
    )

"""How simulated machines are configured and whose they are: read, marked, defined and undefined; and preflight."""

from concurrent.futures import Future
from typing import Final
from xml.etree import ElementTree as ET

from orchestrator.errors import DomainNotFound, HypervisorError
from workers.hypervisor.domain_needs import needs_of
from workers.hypervisor.domain_xml import MARKER_NAMESPACE, identity_of, with_marker
from workers.hypervisor.port import Definition, DomainState, EventKind, Marker
from workers.hypervisor.simulated_cpu import cpu_problems
from workers.hypervisor.simulated_guest import describe, normalised, without_secrets
from workers.hypervisor.simulated_host import SimulatedHost, machine_problems
from workers.hypervisor.simulated_machine import Machine

_NOT_RUNNING: Final = "unknown"


def read_definition(host: SimulatedHost, uuid: str, *, secrets: bool) -> Definition | None:
    """Read how a domain is configured."""
    machine = host.machines.get(uuid)
    if machine is None:
        return None
    live, inactive = machine.xml if machine.is_active else "", machine.inactive_xml
    if not secrets:
        live, inactive = (without_secrets(xml) if xml else "" for xml in (live, inactive))
    return Definition(live, inactive, machine.autostart, machine.snapshots, secrets)


def mark(host: SimulatedHost, uuid: str, marker: Marker | None) -> "Future[None] | None":
    """Write a marker into a running domain's metadata, or remove it."""
    machine = host.machines.get(uuid)
    what = "unmarked" if marker is None else "marked"
    if machine is None or not machine.is_active:
        raise DomainNotFound(f"domain {uuid} does not run on {host.name}")
    if machine.has_job:
        raise HypervisorError(f"domain {uuid} is not {what} while a job is active on it ({machine.state})")
    if marker is None and machine.reading().marker is None:
        return None

    def write() -> None:
        machine.xml = _without_marker(machine.xml) if marker is None else with_marker(machine.xml, marker)[0]
        host.tell(EventKind.CHANGED, machine, "metadata")

    return host.when_it_answers(machine, "marking", write)


def _without_marker(domain_xml: str) -> str:
    root = ET.fromstring(domain_xml)  # noqa: S314  it was read here before
    metadata = root.find("metadata")
    for element in [] if metadata is None else list(metadata):
        if metadata is not None and element.tag.startswith(f"{{{MARKER_NAMESPACE}}}"):
            metadata.remove(element)
    return ET.tostring(root, encoding="unicode")


def define(host: SimulatedHost, domain_xml: str, *, autostart: bool) -> None:
    """Make a domain persistent."""
    uuid = identity_of(domain_xml)
    description, xml = describe(domain_xml), normalised(domain_xml)
    for machine in host.machines.values():
        if machine.description.name == description.name and machine.description.uuid != uuid:
            raise HypervisorError(
                f"domain {uuid} was not defined: domain '{description.name}' already exists with uuid "
                f"{machine.description.uuid}"
            )
    machine = host.machines.get(uuid) or Machine(host, xml, description, DomainState.SHUTOFF, _NOT_RUNNING)
    if machine.is_active and machine.description.name != description.name:
        raise HypervisorError(f"domain {uuid} was not defined: it runs here as '{machine.description.name}'")
    detail = "defined-updated" if machine.inactive_xml else "defined-added"
    host.machines[uuid] = machine
    machine.inactive_xml, machine.autostart = xml, autostart
    if not machine.is_active:
        machine.xml, machine.description = xml, description
    host.tell(EventKind.CHANGED, machine, detail)


def undefine(host: SimulatedHost, uuid: str) -> None:
    """Make a running persistent domain transient."""
    machine = host.machines.get(uuid)
    if machine is None or not machine.inactive_xml:
        return
    if not machine.is_active:
        raise HypervisorError(f"domain {uuid} is not undefined, as it does not run: nothing would be left of it")
    if machine.has_job:
        raise HypervisorError(f"domain {uuid} is not undefined while a job is active on it ({machine.state})")
    if machine.snapshots:
        raise HypervisorError(f"domain {uuid} is not undefined: its {machine.snapshots} snapshot(s) would be lost")
    machine.inactive_xml, machine.autostart = "", False
    host.tell(EventKind.CHANGED, machine, "undefined-removed")


def preflight(host: SimulatedHost, domain_xml: str, copied_disks: tuple[str, ...]) -> list[str]:
    """Say why a machine could not arrive here."""
    needs, spec = needs_of(domain_xml, copied_disks), host.spec
    problems = [*needs.problems, *cpu_problems(spec.cpu_model, needs)]
    problems += machine_problems(needs.machine)
    for file in needs.files:
        if not host.has_file(file.path) and not (file.is_copied and not file.is_block):
            problems.append(f"{file.what}: no such {'block device' if file.is_block else 'file'} {file.path}")
    problems += [
        f"bridge {name} is not there" for name in needs.bridges if spec.bridges is not None and name not in spec.bridges
    ]
    for name in needs.networks:
        if spec.networks is not None and name not in spec.networks:
            problems.append(f"network {name} is not there")
    for machine in host.machines.values():
        if machine.description.name == needs.name and machine.description.uuid != needs.uuid:
            problems.append(f"the name {needs.name} is taken here by domain {machine.description.uuid}")
    return problems

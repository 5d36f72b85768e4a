"""What becomes of a node's domains when they are adopted: pure, from what its agent found.

A domain that would lose something by it, or that vmherd could not start anew, is refused, each with its reasons. What
is no obstacle and yet good to know is a finding.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.dom import minidom
from xml.parsers.expat import ExpatError

from orchestrator.errors import VmherdError
from orchestrator.resources import ObjectMeta, RunPolicy, VirtualMachine, parse, render_domain
from orchestrator.resources.adoption import XML_MOST, FoundDomain, attribute_at, local_files
from orchestrator.resources.machine import Machine, record_machine, requested_cpu
from orchestrator.resources.names import DNS_LABEL
from orchestrator.resources.vm import VirtualMachineStatus
from orchestrator.resources.vm_spec import VirtualMachineSpec
from orchestrator.resources.xml_input import read_domain

LOCAL_NVRAM, LOCAL_TPM, LOCAL_DISKS = "LocalNvram", "LocalTpmState", "LocalDisks"
"""Reasons of the condition ColdStandby, when it is False."""

_DOMAIN_TYPES = ("kvm", "qemu", "hvf")
_HOST_INTERFACES = frozenset({"hostdev", "vdpa"})
_HOST_DISKS = frozenset({"nvme", "vhostvdpa", "vhostuser"})
_UNITS_KIB = {"KiB": 1, "k": 1, "MiB": 2**10, "M": 2**10, "GiB": 2**20, "G": 2**20}


@dataclass(frozen=True, slots=True)
class Planned:
    """What becomes of one domain.

    Attributes:
        domain: As it was found.
        name: The VM's.
        cores: vCPUs of the VM.
        memory: Of the VM, a quantity.
        core_fraction: Of the VM.
        disks: One an entry, `vda=/srv/vm/web.qcow2`.
        refusals: Why it is not adopted; empty when it can be.
        findings: What else is to be known.
        standing: Reason and message of ColdStandby=False; None where nothing speaks against a start elsewhere.
        spec: Of the VM; None when it is refused.
        machine: What the guest has now, which later starts give it again.
    """

    domain: FoundDomain
    name: str
    cores: int
    memory: str
    core_fraction: str
    disks: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    standing: tuple[str, str] | None = None
    spec: VirtualMachineSpec | None = None
    machine: Machine | None = None

    @property
    def is_refused(self) -> bool:
        """Whether it can't be adopted."""
        return bool(self.refusals)


@dataclass(frozen=True, slots=True)
class Around:
    """What the plan needs to know besides the domains.

    Attributes:
        node: Whose they are.
        namespace: Of the VMs.
        run_policy: Of the VMs.
        vms: Keys of the VMs that are there, by uid.
        capacity_millicores: What VMs may reserve of the node.
        reserved_millicores: What is reserved there by VMs and operations of ours.
    """

    node: str
    namespace: str
    run_policy: RunPolicy
    vms: Mapping[str, str]
    capacity_millicores: int
    reserved_millicores: int


def plan_adoption(found: Sequence[FoundDomain], names: Sequence[str], around: Around) -> tuple[Planned, ...]:
    """Say of each domain what becomes of it.

    Args:
        found: All domains of the node; those that are wanted with their XML.
        names: Domains that are wanted, each by its name or UUID; empty: all that bear no mark of ours.
        around: See there.

    Returns:
        The wanted ones, by name. Those that don't exist are left out (`missing`).
    """
    wanted = [d for d in found if _is_wanted(d, names)]
    fraction = core_fraction(
        around.capacity_millicores,
        around.reserved_millicores,
        sum(_cores(d) for d in found if not d.vm and d.state != "shutoff"),
    )
    taken = set(around.vms.values())
    plans: list[Planned] = []
    for domain in sorted(wanted, key=lambda d: (d.name, d.uuid)):
        planned = _plan(domain, around, taken, fraction)
        if not planned.is_refused:
            taken.add(f"{around.namespace}/{planned.name}")
        plans.append(planned)
    return tuple(plans)


def missing(found: Iterable[FoundDomain], names: Iterable[str]) -> tuple[str, ...]:
    """Name those that were asked for and are not there, in the order of asking."""
    known = {text for domain in found for text in (domain.name, domain.uuid)}
    return tuple(dict.fromkeys(name for name in names if name not in known))


def core_fraction(capacity_millicores: int, reserved_millicores: int, vcpus: int) -> int:
    """Give the percentage of each core that is reserved for a node's domains, so that all of them fit.

    One for the whole node, whether its domains are adopted together or one by one: what those that were adopted
    before have reserved is taken off on both sides.

    Args:
        capacity_millicores: What VMs may reserve of the node.
        reserved_millicores: What is reserved there already, by what is ours.
        vcpus: Of the domains that are not ours (yet), all together.

    Returns:
        1 to 100. With 1 they may not fit all the same; they run already, and nothing more is started there.
    """
    free = capacity_millicores - reserved_millicores
    if vcpus <= 0:
        return 100
    return max(1, min(100, free // (vcpus * 10)))


def vm_name(domain: str) -> str:
    """Make a DNS label of a domain's name; empty where nothing of it can stay."""
    label = re.sub(r"[^a-z0-9]+", "-", domain.lower()).strip("-")[:63].rstrip("-")
    return label if DNS_LABEL.fullmatch(label) else ""


def _is_wanted(domain: FoundDomain, names: Sequence[str]) -> bool:
    return domain.name in names or domain.uuid in names if names else not domain.vm


def _plan(domain: FoundDomain, around: Around, taken: set[str], fraction: int) -> Planned:
    name = vm_name(domain.name)
    refusals = _refuse_standing(domain, around, name, taken)
    if domain.is_read:
        try:
            inactive, live = read_domain(domain.inactive_xml), read_domain(domain.live_xml)
        except ValueError as error:
            refusals.append(f"its XML {error}")
        else:
            return _plan_machine(domain, around, name, fraction, refusals, (inactive, live))
    elif not refusals:
        refusals.append(f"its XML is longer than {XML_MOST // 1024} KiB")
    memory = f"{domain.memory_mib}Mi"
    return Planned(domain, name, domain.vcpus, memory, f"{fraction}%", refusals=tuple(refusals))


def _plan_machine(
    domain: FoundDomain,
    around: Around,
    name: str,
    fraction: int,
    refusals: list[str],
    roots: tuple[ET.Element, ET.Element],
) -> Planned:
    inactive, live = roots
    refusals = [*refusals, *_refuse_devices(roots)]
    findings = _ends(live)
    cores, memory = _cores(domain), _memory(inactive)
    if cores != domain.vcpus:
        findings.append(f"{domain.vcpus} of its {cores} vCPUs are online; vmherd starts it with all")
    if domain.secrets:
        findings.append("its console's password is kept apart; when vmherd starts it anew the console listens nowhere")
    standing = cold_standby(domain)
    if standing is not None:
        findings.append(f"ColdStandby=False: {standing[1]}")
    spec: VirtualMachineSpec | None = None
    machine: Machine | None = None
    if not refusals:
        try:
            spec = _spec(domain, around, (cores, memory, f"{fraction}%"))
            machine = _machine(domain, inactive)
            _try_to_render(domain, around, name, spec, machine)
        except VmherdError as error:
            refusals.append(f"vmherd could not start it anew: {error}")
    return Planned(
        domain=domain,
        name=name,
        cores=cores,
        memory=memory,
        core_fraction=f"{fraction}%",
        disks=tuple(f"{target}={source}" for target, source in _disks(inactive)),
        refusals=tuple(refusals),
        findings=tuple(findings),
        standing=standing,
        spec=None if refusals else spec,
        machine=machine,
    )


def _refuse_standing(domain: FoundDomain, around: Around, name: str, taken: set[str]) -> list[str]:
    """Why it can't be adopted, whatever its XML says."""
    known = around.vms.get(domain.uuid)
    if known is not None:
        return [f"it is VirtualMachine {known!r} already"]
    if domain.vm:
        return [f"it bears the mark of VirtualMachine {domain.vm!r}, which is not of this herd"]
    refusals: list[str] = []
    if domain.state != "running":
        refusals.append(f"it does not run: it is {domain.state}")
    if not domain.persistent:
        refusals.append("it is transient: its host has no definition of it that could be given back")
    if domain.snapshots:
        refusals.append(f"it has {domain.snapshots} snapshots or checkpoints, which go with its definition")
    if not name:
        refusals.append("its name has nothing that a VM's name may have (a-z, 0-9, -)")
    elif f"{around.namespace}/{name}" in taken:
        refusals.append(
            f"there is a VirtualMachine {name!r} in namespace {around.namespace!r}: choose another namespace"
        )
    return refusals


def _refuse_devices(roots: tuple[ET.Element, ET.Element]) -> list[str]:
    """What it has that would be lost, or that no other host can give it."""
    inactive, live = roots
    refusals: list[str] = []
    if inactive.tag != "domain" or inactive.get("type") not in _DOMAIN_TYPES:
        refusals.append(f"vmherd does not start domains of type {inactive.get('type')!r}")
    devices = {text: None for root in roots for text in _host_devices(root)}
    if devices:
        refusals.append(f"it has devices of its host: {', '.join(devices)}")
    if any(
        backend.get("type") == "emulator" and backend.get("persistent_state") != "yes"
        for backend in live.iterfind("devices/tpm/backend")
    ):
        refusals.append("its TPM has no persistent_state='yes': a transient domain's TPM is emptied when it stops")
    return refusals


def _ends(live: ET.Element) -> list[str]:
    """Say where its guest's reboot, poweroff or crash does not come to what vmherd gives a domain at a start.

    What runs keeps these until then: libvirt can't change them of a running domain.
    """
    texts = {
        ("on_reboot", "destroy"): "a reboot counts as a power-off",
        ("on_reboot", "preserve"): "a reboot counts as a power-off",
        ("on_poweroff", "restart"): "a guest that powers itself off is booted again",
        ("on_crash", "preserve"): "a guest that crashes stays on its node until it is restarted",
        ("on_crash", "restart"): "a guest that crashes is booted again by its host, and nothing tells of it",
    }
    found = ((event, (live.findtext(event) or "").strip().removeprefix("coredump-")) for event, _ in texts)
    return [
        f"its {event} is {action}: {texts[event, action]}, until its next start by vmherd"
        for event, action in dict.fromkeys(found)
        if (event, action) in texts
    ]


def _host_devices(root: ET.Element) -> list[str]:
    found = [f"hostdev ({device.get('type', 'unknown')})" for device in root.iterfind("devices/hostdev")]
    found += [
        f"interface ({interface.get('type')})"
        for interface in root.iterfind("devices/interface")
        if interface.get("type") in _HOST_INTERFACES
    ]
    found += [f"disk ({d.get('type')})" for d in root.iterfind("devices/disk") if d.get("type") in _HOST_DISKS]
    found += ["TPM (passthrough)" for b in root.iterfind("devices/tpm/backend") if b.get("type") == "passthrough"]
    return found


def cold_standby(domain: FoundDomain) -> tuple[str, str] | None:
    """Say why it could not be started on another host: reason and message; None where nothing is known against it."""
    roles = local_files(domain.inactive_xml, domain.live_xml, domain.uuid)
    texts: dict[str, list[str]] = {LOCAL_NVRAM: [], LOCAL_TPM: [], LOCAL_DISKS: []}
    for path, kind in sorted(domain.local.items()):
        where = f"{path} is on a file system of this host alone ({kind})"
        match roles.get(path):
            case None:
                continue
            case "nvram":
                texts[LOCAL_NVRAM].append(f"its NVRAM {where}")
            case "tpm":
                texts[LOCAL_TPM].append(f"its TPM's state {where}")
            case target:
                texts[LOCAL_DISKS].append(f"its disk {target} {where}")
    reason = next((reason for reason, found in texts.items() if found), None)
    if reason is None:
        return None
    return reason, "; ".join(text for found in texts.values() for text in found)


def _cores(domain: FoundDomain) -> int:
    """All its vCPUs, those that are offline too: a topology in its XML is for all of them."""
    if not domain.is_read:
        return domain.vcpus
    try:
        text = read_domain(domain.inactive_xml).findtext("vcpu", "")
    except ValueError:
        return domain.vcpus
    return int(text) if text.strip().isdecimal() else domain.vcpus


def _memory(root: ET.Element) -> str:
    element = root.find("memory")
    text = "" if element is None else (element.text or "").strip()
    if element is None or not text.isdecimal():
        return "0Ki"
    kib = int(text) * _UNITS_KIB.get(element.get("unit", "KiB"), 0)
    for factor, unit in ((2**20, "Gi"), (2**10, "Mi")):
        if kib and kib % factor == 0:
            return f"{kib // factor}{unit}"
    return f"{kib}Ki"


def _disks(root: ET.Element) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for disk in root.iterfind("devices/disk"):
        source = disk.find("source")
        target = attribute_at(disk, "target", "dev")
        if source is None:
            continue
        place = next((source.get(a, "") for a in ("file", "dev", "dir", "name", "volume") if source.get(a)), "")
        if place:
            found.append((target, place))
    return found


def _spec(domain: FoundDomain, around: Around, size: tuple[int, str, str]) -> VirtualMachineSpec:
    cores, memory, fraction = size
    return parse(
        VirtualMachineSpec,
        {
            "runPolicy": around.run_policy,
            "cpu": {"cores": cores, "coreFraction": fraction},
            "memory": {"size": memory},
            "domainTemplate": template(domain),
        },
    )


def _machine(domain: FoundDomain, inactive: ET.Element) -> Machine:
    """What the guest has now: as if vmherd had given it that at a start of its own."""
    return record_machine(domain.live_xml).with_(cpu_from=requested_cpu(inactive.find("cpu")))


def _try_to_render(domain: FoundDomain, around: Around, name: str, spec: VirtualMachineSpec, machine: Machine) -> None:
    meta = ObjectMeta(name=name, namespace=around.namespace, uid=domain.uuid)
    render_domain(VirtualMachine(metadata=meta, spec=spec, status=VirtualMachineStatus(machine=machine)))


def template(domain: FoundDomain) -> str:
    """Give the domain XML that later starts are made from: its definition, without its secrets.

    Two things differ. Firmware variables that libvirt chose a place for by the domain's name keep that place, since
    vmherd gives it another name. A console whose password is left out would be open to all: it listens nowhere.
    """
    try:
        document = minidom.parseString(domain.inactive_xml)  # noqa: S318 - keeps others' namespace prefixes
        live = minidom.parseString(domain.live_xml)  # noqa: S318
    except ExpatError:
        return domain.inactive_xml
    has_changed = _keep_nvram(document, live)
    if domain.secrets:
        for graphics in document.getElementsByTagName("graphics"):
            _close_console(document, graphics)
            has_changed = True
    root = document.documentElement
    return root.toxml() if has_changed and root is not None else domain.inactive_xml


def _keep_nvram(document: minidom.Document, live: minidom.Document) -> bool:
    there, wanted = document.getElementsByTagName("nvram"), live.getElementsByTagName("nvram")
    systems = document.getElementsByTagName("os")
    if not wanted or not systems or any(_has_place(element) for element in there):
        return False
    for element in list(there):
        if element.parentNode is not None:
            element.parentNode.removeChild(element)
    systems[0].appendChild(document.importNode(wanted[0], deep=True))
    return True


def _has_place(nvram: minidom.Element) -> bool:
    text = "".join(node.data for node in nvram.childNodes if isinstance(node, minidom.Text)).strip()
    return bool(text) or bool(nvram.getElementsByTagName("source"))


def _close_console(document: minidom.Document, graphics: minidom.Element) -> None:
    for name in ("listen", "port", "autoport", "tlsPort", "websocket", "socket", "passwd", "passwdValidTo"):
        if graphics.hasAttribute(name):
            graphics.removeAttribute(name)
    for old in list(graphics.getElementsByTagName("listen")):
        graphics.removeChild(old)
    nowhere = document.createElement("listen")
    nowhere.setAttribute("type", "none")
    graphics.insertBefore(nowhere, graphics.firstChild)

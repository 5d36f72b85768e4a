"""`vmherd describe`: all about one resource, for a person."""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from orchestrator.cli import terminal
from orchestrator.cli.acting import open_client
from orchestrator.cli.ages import UNKNOWN, age, memory
from orchestrator.cli.arguments import KindName, Names, Namespace, parse_targets
from orchestrator.cli.output import AsDocument, document
from orchestrator.cli.tables import clean, paint
from orchestrator.cli.terminal import Failures
from orchestrator.client import Client
from orchestrator.errors import NotFound
from orchestrator.planner.convergence import describe_outcome, describe_prediction
from orchestrator.resources import (
    DEFAULT_NAMESPACE,
    Condition,
    Event,
    Maintenance,
    Node,
    NodeDrain,
    NodeFencing,
    RebalancePolicy,
    Resource,
    VirtualMachine,
    VirtualMachineClass,
    VirtualMachineOperation,
    make_key,
)
from orchestrator.resources.machine import Machine
from orchestrator.resources.node import HypervisorInfo
from orchestrator.resources.scheduling import Toleration

EXAMPLES = """Examples:

$ vmherd describe vm linux-vm

$ vmherd describe vmop evict-linux-vm-4f1c9

$ vmherd describe node node-1 -o json
"""

Fact = tuple[str, str]
_LATEST = 5


def describe(
    kind: KindName,
    names: Names = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    output: AsDocument = None,
) -> None:
    """Tell all about resources, with their conditions and events.

    As a document, each is told as it is stored, beside its events and what else is told here.
    """
    what, chosen = parse_targets(kind, names, needs_name=True)
    failures = Failures()
    with open_client() as client:
        texts: list[str] = []
        told: list[dict[str, Any]] = []
        for name in chosen:
            try:
                found = client.get(what, make_key(name, namespace if what.namespaced else ""))
            except NotFound as error:
                failures.add(str(error))
            else:
                if output is None:
                    texts.append("\n".join(_describe(client, found, datetime.now(UTC))))
                else:
                    told.append(_as_data(client, found))
        if output is None:
            terminal.write("\n\n\n".join(texts))
        elif len(chosen) > 1:
            terminal.write(document(told, output))
        elif told:
            terminal.write(document(told[0], output))
    failures.end()


def _as_data(client: Client, resource: Resource) -> dict[str, Any]:
    data: dict[str, Any] = {"resource": resource.manifest()}
    if isinstance(resource, VirtualMachine):
        data["operations"] = [operation.manifest() for operation in _latest(client, resource)]
    if isinstance(resource, Node):
        data["virtualMachines"] = [vm.key for vm in _vms_of(client, resource)]
    if not isinstance(resource, Event):
        data["events"] = [event.manifest() for event in _events(client, resource)]
    return data


def _describe(client: Client, resource: Resource, now: datetime) -> list[str]:
    colour = terminal.has_colour()
    lines = facts([*_common(resource, now), *_own(client, resource, now)], colour=colour)
    conditions = getattr(getattr(resource, "status", None), "conditions", ())
    if conditions:
        lines += ["Conditions:", *grid(("Type", "Status", "Reason", "Since", "Message"), _conditions(conditions, now))]
    if isinstance(resource, NodeDrain):
        lines += _drained(resource)
    if isinstance(resource, Maintenance):
        lines += _turns(resource, now)
    if isinstance(resource, VirtualMachine):
        lines += _pending(resource)
        lines += _operations(client, resource, now)
    if not isinstance(resource, Event):
        events = _events(client, resource)
        rows = [(age(e.last_timestamp, now), e.type, e.reason, e.message) for e in events]
        lines += ["Events:", *grid(("Age", "Type", "Reason", "Message"), rows)] if rows else ["Events:  " + UNKNOWN]
    return lines


def _drained(drain: NodeDrain) -> list[str]:
    rows = [
        (key, vm.state.value, memory(vm.memory_mib), vm.target, vm.operation, vm.message)
        for key, vm in sorted(drain.vms.items())
    ]
    return ["VMs:", *grid(("VM", "State", "Memory", "Target", "Operation", "Message"), rows)] if rows else []


def _turns(maintenance: Maintenance, now: datetime) -> list[str]:
    rows = []
    for name in maintenance.spec.nodes:
        node = maintenance.node(name)
        code = "" if node.exit_code is None else str(node.exit_code)
        rows.append((name, node.stage.value, age(node.since, now), str(node.attempts), code, node.message))
    return ["Nodes:", *grid(("Node", "Stage", "Since", "Runs", "Exit Code", "Message"), rows)]


def _common(resource: Resource, now: datetime) -> list[Fact]:
    meta = resource.metadata
    found = [("Name", meta.name)]
    if resource.namespaced:
        found.append(("Namespace", meta.namespace))
    found += [("Labels", _pairs(meta.labels)), ("Annotations", _pairs(meta.annotations)), ("UID", meta.uid)]
    found.append(("Created", _when(meta.creation_timestamp, now)))
    if meta.deletion_timestamp is not None:
        found.append(("Deleted", _when(meta.deletion_timestamp, now)))
    return found


def _own(client: Client, resource: Resource, now: datetime) -> list[Fact]:
    match resource:
        case VirtualMachine():
            return _vm(resource, now)
        case VirtualMachineOperation():
            return _operation(resource, now)
        case VirtualMachineClass():
            return _class(resource)
        case Node():
            return _node(client, resource)
        case NodeDrain():
            status = resource.status
            return [
                ("Phase", status.phase.value),
                ("Asked For By", resource.spec.requested_by),
                ("VMs Selected By", resource.spec.selector),
                ("Begun", _when(status.started_at, now)),
                ("Ended", _when(status.finished_at, now)),
                ("Message", status.message),
            ]
        case Maintenance():
            return [
                ("Phase", resource.status.phase.value),
                ("Asked For By", resource.spec.requested_by),
                ("Hook", resource.spec.hook),
                ("At A Time", str(resource.spec.parallel or "as many as can be spared")),
                ("Message", resource.status.message),
            ]
        case RebalancePolicy():
            return _policy(resource, now)
        case NodeFencing():
            return _fencing(resource, now)
        case Event():
            about = resource.involved_object
            return [
                ("Object", f"{about.kind}/{about.name}"),
                ("Type", resource.type),
                ("Reason", resource.reason),
                ("Message", resource.message),
                ("Last Seen", _when(resource.last_timestamp, now)),
            ]
        case _:
            return []


def _policy(policy: RebalancePolicy, now: datetime) -> list[Fact]:
    spec, status = policy.spec, policy.status
    found = [
        ("Enabled", "yes" if spec.enabled else "no"),
        ("Interval", f"{spec.interval_seconds} s"),
        ("Thresholds", f"CPU {spec.thresholds.cpu} %, memory {spec.thresholds.memory} %"),
        ("Evens Out", f"yes, beyond {spec.deadband_percent} %" if spec.even_out else "no"),
        ("One Scan", f"{spec.max_moves} moves, {spec.max_gib} GiB"),
        ("Cooldown", f"{spec.cooldown_seconds} s"),
        ("Last News", _when(status.scanned_at, now)),
        ("Over", ", ".join(sorted(status.over))),
    ]
    return found + [("Unresolved", f"{what}: {why}") for what, why in sorted(status.unresolved.items())]


def _fencing(fencing: NodeFencing, now: datetime) -> list[Fact]:
    spec, status, bmc = fencing.spec, fencing.status, fencing.spec.bmc
    said = {None: "as the node's label says", True: "yes", False: "no"}[spec.enabled]
    found = [("Enabled", said), ("BMC", bmc.agent if bmc else "")]
    if bmc is not None:
        found.append(("BMC's Options", _pairs(bmc.options)))
        found.append(
            ("Password From", bmc.password_file or (f"variable {bmc.password_env}" if bmc.password_env else ""))
        )
    evidence = status.evidence
    return [
        *found,
        ("Afterwards", spec.afterwards),
        ("Phase", status.phase.value),
        ("Since", _when(status.since, now)),
        ("Reason", status.reason),
        ("Message", status.message),
        ("Evidence", f"{evidence.level.value}: {evidence.text}" if evidence else ""),
        ("BMC Distrusted", status.bmc_distrust),
    ]


def _vm(vm: VirtualMachine, now: datetime) -> list[Fact]:
    spec, status = vm.spec, vm.status
    found = [
        ("Phase", status.phase.value),
        ("Node", status.node_name),
        ("IP Address", status.ip_address),
        ("Run Policy", spec.run_policy.value),
        ("Class", spec.virtual_machine_class_name or ""),
        ("CPU", f"{spec.cpu.cores} cores, {spec.cpu.core_fraction} reserved ({spec.cpu_millicores} millicores)"),
        ("Memory", spec.memory.size),
        ("Node Selector", _pairs(spec.node_selector)),
        ("Live Migration", spec.live_migration_policy.value),
        ("Incarnation", str(status.incarnation)),
    ]
    if spec.tolerations:
        found.append(("Tolerations", _tolerations(spec.tolerations)))
    if status.machine is not None:
        found.append(("Machine", _machine(status.machine)))
    if status.elsewhere:
        found.append(("Also Seen On", status.elsewhere))
    move = status.migration_state
    if move is not None:
        at = move.end_timestamp or move.start_timestamp
        found.append(
            (
                "Last Migration",
                f"{move.source.node} -> {move.target.node}, {move.result or 'under way'}, {_when(at, now)}",
            )
        )
    return found


def _operation(operation: VirtualMachineOperation, now: datetime) -> list[Fact]:
    spec, status = operation.spec, operation.status
    found = [
        ("Type", spec.type.value),
        ("Virtual Machine", spec.virtual_machine_name),
        ("Phase", status.phase.value),
        ("Progress", f"{status.progress}%"),
        ("Priority", operation.priority.name.capitalize()),
        ("Source", status.source_node),
        ("Target", status.target_node),
        ("Attempts", str(status.attempts)),
        ("Started", _when(status.started_at, now)),
        ("Finished", _when(status.finished_at, now)),
    ]
    if spec.migrate is not None:
        found.insert(2, ("To", spec.migrate.node_name or _pairs(spec.migrate.node_selector)))
    if spec.force is not None:
        found.insert(2, ("Force", str(spec.force).lower()))
    if status.downtime_ms is not None:
        found.append(("Guest Stopped", f"{status.downtime_ms} ms"))
    if status.prediction is not None:
        found.append(("Predicted", describe_prediction(status.prediction)))
    if status.outcome is not None:
        found.append(("Measured", describe_outcome(status.outcome)))
    if status.avoid:
        found.append(("Avoids", ", ".join(status.avoid)))
    grant = status.grant
    if grant is not None:
        found.append(("Grant", f"{grant.state.value}, epoch {grant.epoch}, to node {grant.node}"))
        if grant.settlement is not None and grant.settlement.orders:
            found.append(("Waits For", ", ".join(sorted(grant.settlement.orders))))
    return found


def _vms_of(client: Client, node: Node) -> list[VirtualMachine]:
    here = [vm for vm in client.all(VirtualMachine) if vm.status.node_name == node.name]
    return [vm for vm in here if vm.status.phase.occupies_node]


def _node(client: Client, node: Node) -> list[Fact]:
    capacity, hypervisor = node.status.capacity, node.status.hypervisor
    vms = _vms_of(client, node)
    reserved = sum(vm.running_spec.cpu_millicores for vm in vms)
    given = sum(vm.running_spec.memory_mib for vm in vms)
    return [
        ("Ready", "yes" if node.is_ready else "no"),
        ("Unschedulable", "yes" if node.spec.unschedulable else "no"),
        ("Taints", ", ".join(str(taint) for taint in node.spec.taints)),
        ("CPU", f"{capacity.cpu}, {reserved} millicores reserved by VMs"),
        ("Memory", f"{memory(capacity.memory_mib)}, {memory(given)} given to VMs"),
        ("CPU Model", hypervisor.cpu_model),
        ("Guests' CPU", _guests_cpu(hypervisor)),
        ("Hypervisor", hypervisor.version),
        ("Libvirt", hypervisor.libvirt_version),
        ("Migration URI", hypervisor.migration_uri),
        ("Host UUID", hypervisor.host_uuid),
        ("VMs", ", ".join(vm.key for vm in vms)),
    ]


def _guests_cpu(hypervisor: HypervisorInfo) -> str:
    cpu = hypervisor.cpu
    by = "KVM" if hypervisor.domain_type == "kvm" else "emulation"
    return f"{cpu.vendor} {cpu.model}, {len(cpu.features)} features, by {by}" if cpu else f"not known, by {by}"


def _class(vm_class: VirtualMachineClass) -> list[Fact]:
    spec, status = vm_class.spec, vm_class.status
    cpu = status.cpu
    return [
        ("Phase", status.phase.value),
        ("CPU Type", spec.cpu.type.value),
        ("CPU Model", (cpu.model or cpu.mode) if cpu else ""),
        ("CPU Vendor", cpu.vendor if cpu else ""),
        ("CPU Features", " ".join(sorted(cpu.features)) if cpu else ""),
        ("Without Features", " ".join(sorted(cpu.disabled)) if cpu else ""),
        ("Node Selector", _pairs(spec.node_selector.match_labels)),
        ("Node Expressions", ", ".join(str(part) for part in spec.node_selector.match_expressions)),
        ("Tolerations", _tolerations(spec.tolerations)),
        ("Available Nodes", ", ".join(status.available_nodes)),
    ]


def _tolerations(tolerations: tuple[Toleration, ...]) -> str:
    return ", ".join(
        f"{t.key or '*'}{'=' + t.value if t.operator == 'Equal' else ''}{':' + t.effect if t.effect else ''}"
        for t in tolerations
    )


def _pending(vm: VirtualMachine) -> list[str]:
    changes = vm.status.restart_awaiting_changes
    if not changes:
        return []
    rows = [(c.path, _value(c.current_value), _value(c.desired_value)) for c in changes]
    return ["Changes that wait for a restart:", *grid(("Field", "Runs With", "Wanted"), rows)]


def _value(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _machine(machine: Machine) -> str:
    cpu = machine.cpu
    shown = "" if cpu is None else f", CPU {cpu.model or cpu.mode}"
    macs = ", ".join(device.mac for device in machine.devices if device.mac)
    return f"{machine.type} ({machine.domain_type}){shown}" + (f", MAC {macs}" if macs else "")


def _latest(client: Client, vm: VirtualMachine) -> list[VirtualMachineOperation]:
    of_vm = [o for o in client.all(VirtualMachineOperation, vm.metadata.namespace) if o.vm_key == vm.key]
    return sorted(of_vm, key=lambda o: o.created_version)[-_LATEST:]


def _operations(client: Client, vm: VirtualMachine, now: datetime) -> list[str]:
    latest = _latest(client, vm)
    if not latest:
        return []
    rows = [
        (
            o.name,
            o.spec.type.value,
            o.status.phase.value,
            f"{o.status.progress}%",
            age(o.metadata.creation_timestamp, now),
        )
        for o in latest
    ]
    return ["Operations:", *grid(("Name", "Type", "Phase", "Progress", "Age"), rows)]


def _events(client: Client, resource: Resource) -> list[Event]:
    def is_about(event: Event) -> bool:
        about = event.involved_object
        same = (about.kind, about.name, about.namespace) == (
            resource.kind_name,
            resource.name,
            resource.metadata.namespace,
        )
        return same and about.uid in {"", resource.metadata.uid}

    return sorted(
        (event for event in client.all(Event, resource.metadata.namespace or DEFAULT_NAMESPACE) if is_about(event)),
        key=lambda e: (e.last_timestamp, e.created_version),
    )


def _conditions(conditions: Iterable[Condition], now: datetime) -> list[Sequence[str]]:
    return [(c.type, c.status, c.reason, age(c.last_transition_time, now), c.message) for c in conditions]


def _when(at: datetime | None, now: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC ({age(at, now)} ago)" if at is not None else ""


def _pairs(pairs: dict[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(pairs.items()))


def facts(found: Sequence[Fact], *, colour: bool) -> list[str]:
    """Write facts under each other; phases in colour."""
    width = max(len(title) for title, _ in found) + 3
    lines = []
    for title, value in found:
        text = clean(value) or UNKNOWN
        shown = paint(text, text) if colour and title == "Phase" else text
        lines.append(f"{title}:".ljust(width) + shown)
    return lines


def grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Write rows under titles and a rule, indented."""
    cells = [[clean(cell) or UNKNOWN for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(titles), *cells]) for i in range(len(titles))]
    rule = ["-" * len(title) for title in titles]
    lines = [list(titles), rule, *cells]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]

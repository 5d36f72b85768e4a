"""Whether a running VM can arrive at a node: what is known of that, and what is to be asked before it is granted.

A node is asked at most once about the same machine for as long as its answer counts. What is not known costs one round
trip, and no slot: the question goes out while the operation still waits for its turn, where it has to wait. A machine
that needs nothing but a CPU needs no question between hosts that report the same one.

An answer that names a problem counts for a short while, since people repair such things, and keeps refusing its node
until the next answer is there: an operation does not change its reason back and forth while it asks again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum

from orchestrator.planner.placement import Choice, Demand, choose_node, refusal
from orchestrator.planner.snapshot import NodeState
from orchestrator.resources import Condition, VirtualMachine, VirtualMachineOperation
from orchestrator.resources.domain_xml import local_disks
from orchestrator.resources.migratable import (
    DISKS_NOT_MIGRATABLE,
    HOST_DEVICES_NOT_MIGRATABLE,
    NON_MIGRATABLE,
    migratable,
)
from orchestrator.resources.needs import (
    DISK_PROBLEM,
    STORAGE_COPY_ANNOTATION,
    MachineNeeds,
    Question,
    Questions,
)

GOOD_FOR = timedelta(minutes=5)
"""So long an answer counts that there is no problem; and so long one with problems refuses its node unrepeated."""
BAD_FOR = timedelta(seconds=20)
"""After so long a node with problems is asked again, if no other is left."""
PATIENCE = timedelta(seconds=5)
"""A node that is silent for longer gives way to the next best; its answer still counts when it comes."""
_AGAIN_AT_A_TIME = 8
_AHEAD_AT_A_TIME = 2


DISKS_ARE_COPIED = "VirtualMachineDisksShouldBeMigrating"
"""Reason of the condition Migratable (the platform's name); the others are in `resources.migratable`."""


def known_needs(vm: VirtualMachine) -> MachineNeeds | None:
    """Give what a VM needs; None when nobody has told of this incarnation."""
    needs = vm.status.needs
    return needs if needs is not None and needs.incarnation == vm.status.incarnation else None


def local_images(vm: VirtualMachine) -> tuple[str, ...]:
    """Name the disks that only a VM's own host has: those that it told, and those that its spec says."""
    needs = known_needs(vm)
    told = [disk.target for disk in needs.local_disks] if needs is not None else []
    return tuple(dict.fromkeys((*told, *local_disks(vm))))


def copied_disks(vm: VirtualMachine) -> tuple[str, ...]:
    """Name the disks that are copied with a VM when it migrates: those that only its host has, if it may."""
    return local_images(vm) if is_copy_allowed(vm) else ()


def home_of(vm: VirtualMachine) -> str:
    """Name the only node on which a VM may be started, since the newest state of a disk is there alone; empty: any.

    A copy that was left elsewhere, by a migration that copied the disk away or by one that failed, looks like the disk.
    """
    needs = vm.status.needs
    return needs.home if needs is not None else ""


def copied_mib(vm: VirtualMachine) -> int:
    """Give the size of the disks that are copied with a VM, as far as its node told it, MiB."""
    needs, copied = known_needs(vm), copied_disks(vm)
    return sum(disk.size_mib for disk in needs.local_disks if disk.target in copied) if needs is not None else 0


def is_copy_allowed(vm: VirtualMachine) -> bool:
    """Whether a VM's disks may be copied to another host. It takes long, and is asked for by a person."""
    return vm.metadata.annotations.get(STORAGE_COPY_ANNOTATION) == "true"


def immovable(vm: VirtualMachine) -> tuple[str, str] | None:
    """Say what keeps a VM on its host, whatever the others are like; None when nothing is known to.

    Returns:
        The reason of the condition Migratable, and words for people.
    """
    needs = known_needs(vm)
    if needs is None:
        judged = migratable(vm)
        return (judged.reason, judged.message) if judged.status == "False" else None
    if needs.obstacles:
        is_device = any("host device" in text for text in needs.obstacles)
        return HOST_DEVICES_NOT_MIGRATABLE if is_device else NON_MIGRATABLE, "; ".join(needs.obstacles)
    if not is_copy_allowed(vm) and (targets := local_images(vm)):
        paths = {disk.target: f" ({disk.path})" for disk in needs.local_disks}
        disks = ", ".join(f"{DISK_PROBLEM}{target}{paths.get(target, '')}" for target in targets)
        leave = f'annotation {STORAGE_COPY_ANNOTATION}: "true" lets it be copied'
        return DISKS_NOT_MIGRATABLE, f"only its host has {disks}; {leave}"
    return None


def migratable_condition(vm: VirtualMachine) -> Condition:
    """Make a VM's condition Migratable: from what its node told of the machine, and from its spec."""
    if (found := immovable(vm)) is not None:
        return Condition(type="Migratable", status="False", reason=found[0], message=found[1])
    if disks := copied_disks(vm):
        message = f"disks that only its host has are copied: {', '.join(disks)}"
        return Condition(type="Migratable", status="True", reason=DISKS_ARE_COPIED, message=message)
    return migratable(vm)


def question_about(vm: VirtualMachine) -> str:
    """Name what a node is asked about: another machine, or other disks to be copied, is another question."""
    needs = known_needs(vm)
    return "+".join((needs.fingerprint, *copied_disks(vm))) if needs else ""


def asked(
    operation: VirtualMachineOperation,
    vm: VirtualMachine,
    nodes: tuple[str, ...],
    now: datetime,
    *,
    is_about_needs: bool = False,
) -> VirtualMachineOperation:
    """Give an operation on whose behalf nodes are asked; questions about another machine are dropped.

    Args:
        operation: Without a grant.
        vm: Its VM.
        nodes: Who is asked, besides those that are being asked the same.
        now: For how long an answer is waited for.
        is_about_needs: They are asked what the VM needs, not whether it can arrive.
    """
    old, needs = operation.status.questions or Questions(), known_needs(vm)
    new = Questions(
        count=old.count + len(nodes),
        about="" if is_about_needs else question_about(vm),
        uuid=vm.metadata.uid,
        incarnation=vm.status.incarnation,
        machine="" if is_about_needs or needs is None else needs.machine,
        copied_disks=() if is_about_needs else copied_disks(vm),
    )
    kept = old.open if (old.about, old.incarnation) == (new.about, new.incarnation) else {}
    fresh = {
        node: Question(id=f"{operation.key}#check.{number}", asked_at=now)
        for number, node in enumerate(nodes, old.count + 1)
    }
    return operation.with_status(questions=new.with_(open={**kept, **fresh}))


class Known(Enum):
    """What is known of a VM's arrival at a node."""

    FITS = 1
    REFUSED = 2
    ASKED = 3
    NOTHING = 4


@dataclass(frozen=True, slots=True)
class Look:
    """What is known, and since when; `question` is the open one, if there is one."""

    known: Known
    problems: tuple[str, ...] = ()
    answered_at: datetime | None = None
    question: Question | None = None


def look_at(
    vm: VirtualMachine, operation: VirtualMachineOperation, node: NodeState, source: NodeState, now: datetime
) -> Look:
    """Say what is known of a VM's arrival at a node.

    Args:
        vm: Its needs are known.
        operation: Whose questions count.
        node: Where it would go.
        source: Where it is.
        now: For what counts no more.
    """
    about = question_about(vm)
    asked = operation.status.questions
    question = asked.open.get(node.name) if asked is not None and asked.about == about else None
    needs = known_needs(vm)
    if needs is not None and needs.plain and node.platform and node.platform == source.platform:
        return Look(Known.FITS)
    arrival = vm.status.arrivals.get(node.name)
    counts = arrival is not None and (arrival.about, arrival.generation) == (about, node.generation)
    if arrival is not None and counts and now - arrival.answered_at < GOOD_FOR:
        known = Known.REFUSED if arrival.problems else Known.FITS
        return Look(known, arrival.problems, arrival.answered_at, question)
    return Look(Known.NOTHING if question is None else Known.ASKED, question=question)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a VM may migrate, or what is to be asked first.

    Attributes:
        choice: Among all nodes; those that are known not to be able to take it are refused with their problem.
        node: Granted now; None: not yet.
        ask: Nodes to be asked now.
        silent: Nodes that were asked and have not answered.
        is_patient: Whether the answer is expected any moment.
        is_disk: Whether a disk keeps it from a node that fits otherwise.
    """

    choice: Choice
    node: str | None = None
    ask: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    is_patient: bool = False
    is_disk: bool = False


def find_target(
    nodes: Mapping[str, NodeState],
    demand: Demand,
    vm: VirtualMachine,
    operation: VirtualMachineOperation,
    now: datetime,
) -> Target:
    """Choose the best node that is known to be able to take a VM, or say whom to ask.

    Args:
        nodes: By name; the VM's own among them.
        demand: Of the VM, which is not to stay where it is.
        vm: Its needs are known.
        operation: The migration.
        now: For answers that count no more.
    """
    source = nodes[vm.status.node_name]
    refused: dict[str, Look] = {}
    for name in vm.status.arrivals:
        if name in nodes and (look := look_at(vm, operation, nodes[name], source, now)).known is Known.REFUSED:
            refused[name] = look
    unfit = {name: f"unfit ({'; '.join(look.problems)})" for name, look in refused.items()}
    exclude = {**unfit, **(demand.exclude or {})}
    silent: list[str] = []
    while (choice := choose_node(nodes, replace(demand, exclude=exclude))).node is not None:
        look = look_at(vm, operation, nodes[choice.node], source, now)
        if look.known is Known.FITS:
            return Target(choice, choice.node)
        if look.question is None:
            return Target(choice, ask=(choice.node,), silent=tuple(silent), is_patient=True)
        silent.append(choice.node)
        if now - look.question.asked_at < PATIENCE:
            return Target(choice, silent=tuple(silent), is_patient=True)
        exclude[choice.node] = "asked, with no answer so far"
    fitting = [name for name in sorted(refused) if not refusal(nodes[name], demand)]
    again = [name for name in fitting if _is_to_ask_again(refused[name], now)]
    is_disk = any(text.startswith(DISK_PROBLEM) for name in fitting for text in refused[name].problems)
    return Target(choice, ask=tuple(again[:_AGAIN_AT_A_TIME]), silent=tuple(silent), is_disk=is_disk)


def _is_to_ask_again(look: Look, now: datetime) -> bool:
    if look.question is not None or look.answered_at is None:
        return False
    return now - look.answered_at >= BAD_FOR


def nodes_to_ask_ahead(
    nodes: Mapping[str, NodeState],
    demand: Demand,
    vm: VirtualMachine,
    operation: VirtualMachineOperation,
    now: datetime,
) -> tuple[str, ...]:
    """Name the nodes that a VM whose turn has not come may go to, if they are worth asking by now; 0 to 2.

    Args:
        nodes: By name; the VM's own among them.
        demand: Of the VM.
        vm: Its needs are known.
        operation: The migration.
        now: For answers that count no more.
    """
    needs, asked = known_needs(vm), operation.status.questions
    if needs is None or needs.plain or (asked is not None and asked.open):
        return ()
    source = nodes[vm.status.node_name]
    looks = (look_at(vm, operation, nodes[name], source, now) for name in vm.status.arrivals if name in nodes)
    if any(look.known is Known.FITS for look in looks):
        return ()
    exclude = dict(demand.exclude or {})
    found: list[str] = []
    while len(found) < _AHEAD_AT_A_TIME:
        choice = choose_node(nodes, replace(demand, exclude=exclude, inbound=0))
        if choice.node is None:
            break
        exclude[choice.node] = "asked"
        if look_at(vm, operation, nodes[choice.node], source, now).known is Known.NOTHING:
            found.append(choice.node)
    return tuple(found)

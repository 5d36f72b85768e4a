"""Adoption and release: a running domain of a plain libvirt host becomes a VM, and is given back.

State first, message second. The VM is on record, as running where it runs, before its node is asked for anything, so no
policy starts it anywhere else; and its definition, secrets included, is on record before the node removes it. While an
adoption or a release is open, no operation of the VM is granted and no report changes it: the node's answer, and what
it reported meanwhile, do (`adoption_answers`). A node that does not answer is asked again, for as long as it takes.
"""

from datetime import datetime
from typing import cast

from orchestrator.errors import AlreadyExists, Invalid, RecoveryMode, Refused
from orchestrator.planner.adoption import Around, Planned, missing, plan_adoption
from orchestrator.planner.flow import Note
from orchestrator.resources import (
    Condition,
    Node,
    NodeInventory,
    ObjectMeta,
    RunPolicy,
    SeenDomain,
    VirtualMachine,
    VmPhase,
    find_condition,
    new_metadata,
    with_condition,
)
from orchestrator.resources.adoption import Adoption, AdoptionStep, RecordedDefinition, fingerprint
from orchestrator.resources.names import check_name
from orchestrator.resources.vm import VirtualMachineStatus
from orchestrator.services.adoption_orders import (
    RUNS,
    drop_undefine,
    find_record,
    put_order,
    send_order,
    with_adoption,
)
from orchestrator.services.context import Context, add_notes, deciding
from orchestrator.services.definitions import ask_definitions
from orchestrator.services.herd import node_capacity
from orchestrator.store import Refusal, keys
from orchestrator.store.connection import redis_errors

COLD_STANDBY = "ColdStandby"

_STOPPED = frozenset({VmPhase.STOPPED, VmPhase.PENDING})


def plan(
    ctx: Context,
    node: str,
    names: tuple[str, ...] = (),
    *,
    namespace: str,
    run_policy: RunPolicy = RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY,
    timeout_s: float = 30.0,
) -> tuple[tuple[Planned, ...], tuple[str, ...]]:
    """Say what would become of a node's domains; nothing is changed.

    Args:
        node: Its name.
        names: Domains, by name or UUID; empty: all that are not VMs yet.
        namespace: Of the VMs.
        run_policy: Of the VMs.
        timeout_s: For the answer of the node's agent.

    Returns:
        What becomes of each, by name; and the names that the node has no domain for.

    Raises:
        Invalid: The namespace can't be one, or the policy would stop what is adopted.
        Refused, WaitTimeout: As `ask_definitions`.
    """
    try:
        check_name(namespace)
    except ValueError as error:
        raise Invalid(f"namespace: {error}") from error
    if run_policy is RunPolicy.ALWAYS_OFF:
        raise Invalid(f"run policy {run_policy}: it would stop what is adopted")
    found = ask_definitions(ctx, node, names, timeout_s)
    around = Around(
        node=node,
        namespace=namespace,
        run_policy=run_policy,
        vms={vm.metadata.uid: str(vm.key) for vm in ctx.store.all(VirtualMachine)},
        capacity_millicores=node_capacity(ctx.store, ctx.store.get(Node, node))[1],
        reserved_millicores=_reserved_by_us(ctx, node),
    )
    return plan_adoption(found, names, around), missing(found, names)


def _reserved_by_us(ctx: Context, node: str) -> int:
    with redis_errors(ctx.store.redis):
        claims = cast("dict[str, str]", ctx.store.redis.hgetall(keys.claims(node)))
    return sum(int(demand.split()[1]) for claim, demand in claims.items() if not claim.startswith("domain/"))


def adopt(ctx: Context, node: str, planned: Planned, namespace: str) -> VirtualMachine:
    """Begin to adopt one domain.

    Returns:
        The VM: Running, with the condition Adopting until the node has answered.

    Raises:
        Refused: It can't be adopted, or is not any more what was planned.
        AlreadyExists: There is a VM of that name.
        RecoveryMode: Not now.
    """
    if planned.is_refused or planned.spec is None:
        raise Refused(f"domain {planned.domain.name!r}: {'; '.join(planned.refusals)}")

    def decide() -> VirtualMachine:
        inventory = ctx.store.find(NodeInventory, node)
        seen = inventory.domains.get(planned.domain.uuid) if inventory is not None else None
        if inventory is None or seen is None or seen.vm or seen.state != "running":
            raise Refused(f"domain {planned.domain.name!r} of node {node!r} has changed since it was looked at")
        at = ctx.now()
        vm = _adopting_vm(ctx, node, planned, seen, namespace, at)
        batch = ctx.store.batch().check("identity").create(vm)
        # From the same commit on the domain counts as the VM's: not twice.
        claimed = seen.with_(vm=vm.key, incarnation=vm.status.incarnation)
        batch.put(inventory, inventory.with_(domains={**inventory.domains, vm.metadata.uid: claimed}))
        put_order(ctx, batch, vm)
        note = Note("AdoptionStarted", f"domain {planned.domain.name} of node {node} is adopted")
        add_notes(batch, (vm,), (note,), at)
        answer = ctx.store.commit(batch)
        if isinstance(answer, Refusal):
            raise _refused(planned, answer)
        return answer[0]  # type: ignore[return-value]

    return deciding(decide)


def _refused(planned: Planned, refusal: Refusal) -> Exception:
    if refusal.check == "identity":
        return RecoveryMode("Redis was restarted: nothing is adopted until each node has listed its domains anew")
    return AlreadyExists(f"domain {planned.domain.name!r} is VirtualMachine {refusal.detail!r} already")


def _adopting_vm(
    ctx: Context, node: str, planned: Planned, seen: SeenDomain, namespace: str, at: datetime
) -> VirtualMachine:
    assert planned.spec is not None  # noqa: S101 - the caller looked
    meta = ObjectMeta(name=planned.name, namespace=namespace, uid=planned.domain.uuid)
    adoption = Adoption(
        step=AdoptionStep.RECORDING,
        node=node,
        epoch=ctx.store.next_epochs(1)[0],
        fingerprint=fingerprint(planned.domain.inactive_xml),
    )
    conditions = with_condition((), Condition(type="Running", status="True", reason="Running"), at)
    if planned.standing is not None:
        reason, message = planned.standing
        standing = Condition(type=COLD_STANDBY, status="False", reason=reason, message=message)
        conditions = with_condition(conditions, standing, at)
    status = VirtualMachineStatus(
        phase=VmPhase.RUNNING,
        node_name=node,
        incarnation=1,
        counter=seen.counter,
        started_at=at,
        ip_address=planned.spec.ip_address or (seen.addresses[0] if seen.addresses else ""),
        conditions=conditions,
        machine=planned.machine,
    )
    vm = VirtualMachine(metadata=new_metadata(meta, namespaced=True, now=at), spec=planned.spec, status=status)
    return with_adoption(vm, adoption, at)


def release(ctx: Context, key: str) -> VirtualMachine:
    """Begin to give a VM back: it is defined as it was on the node on which it is, and runs on if it does.

    Returns:
        The VM, with the condition Releasing until its node has answered. Then it is removed.

    Raises:
        NotFound: No such VM.
        Refused: It was not adopted, or something is under way with it.
        RecoveryMode: Not now.
    """

    def decide() -> VirtualMachine:
        vm = ctx.store.get(VirtualMachine, key)
        _check_free(vm)
        record = find_record(ctx, vm)
        if record is None:
            raise Refused(f"VirtualMachine {vm.name!r} was not adopted: there is no definition to give back")
        node = _place(ctx, vm, record)
        at = ctx.now()
        step = Adoption(step=AdoptionStep.RELEASING, node=node, epoch=ctx.store.next_epochs(1)[0])
        releasing = with_adoption(vm, step, at)
        batch = ctx.store.batch().check("identity").put(vm, releasing)
        for index in (keys.ACTIVE_OPERATIONS, keys.OPEN_GRANTS):
            batch.check("field", index, key, "")
        drop_undefine(batch, vm)
        put_order(ctx, batch, releasing, record)
        add_notes(batch, (releasing,), (Note("ReleaseStarted", f"node {node} defines it as it was"),), at)
        answer = ctx.store.commit(batch)
        if isinstance(answer, Refusal) and answer.check == "identity":
            raise RecoveryMode("Redis was restarted: nothing is released until each node has listed its domains anew")
        if isinstance(answer, Refusal):
            operation = answer.detail.rpartition("/")[2]
            raise Refused(f"VirtualMachine {vm.name!r}: operation {operation!r} should finish first")
        return answer[0]  # type: ignore[return-value]

    vm = deciding(decide)
    send_order(ctx, vm)
    return vm


def _check_free(vm: VirtualMachine) -> None:
    """Refuse a VM with which something is under way."""
    status = vm.status
    if status.adoption is not None:
        does = "released" if status.adoption.step is AdoptionStep.RELEASING else "adopted"
        raise Refused(f"VirtualMachine {vm.name!r} is being {does}: node {status.adoption.node} has not answered yet")
    if vm.metadata.deletion_timestamp is not None:
        raise Refused(f"VirtualMachine {vm.name!r} is being deleted")
    running = find_condition(status.conditions, "Running")
    is_unknown = running is not None and running.status == "Unknown"
    if status.elsewhere or status.outdated or is_unknown or status.phase not in RUNS | _STOPPED:
        raise Refused(f"VirtualMachine {vm.name!r} is {status.phase}: it can be released when it runs or is stopped")


def _place(ctx: Context, vm: VirtualMachine, record: RecordedDefinition) -> str:
    """Name the node on which a VM is defined again.

    Raises:
        Refused: It is not Ready.
    """
    name = vm.status.node_name or record.node
    node = ctx.store.find(Node, name)
    if node is None or not node.is_ready:
        raise Refused(f"VirtualMachine {vm.name!r} is on node {name!r}, which is not Ready")
    return name

"""Nodes and their inventories, from what agents report.

`NodeInventory` holds what a host has, managed or not; a VM's status follows from it while no grant is open on the VM
(`planner.observation`). While one is open, reports are only recorded: the settlement reads for itself.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from orchestrator.errors import Invalid
from orchestrator.planner.flow import Note
from orchestrator.planner.observation import ABSENT, Observation, observe, with_agent
from orchestrator.resources import (
    Condition,
    GrantState,
    Key,
    Node,
    NodeInventory,
    ObjectMeta,
    SeenDomain,
    VirtualMachine,
    VirtualMachineOperation,
    find_condition,
    new_metadata,
    with_condition,
)
from orchestrator.resources.cpu import NodeCpu
from orchestrator.resources.node import HYPERVISOR_LABEL, Capacity, HypervisorInfo
from orchestrator.services import adoption_orders, migrations, preflight, returning, settling
from orchestrator.services.context import Context, add_notes
from orchestrator.store import Batch, keys
from orchestrator.store.connection import redis_errors
from orchestrator.store.node_store import Report

AGENT_ALIVE = "AgentAlive"
"""The condition that a node's agent gives signs of life; see `services.agents`."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a report came to.

    Attributes:
        is_news: Whether it says anything new: `grant` is woken.
        stopped: VMs that stopped, or whose policy may ask for something now.
    """

    is_news: bool = False
    stopped: tuple[str, ...] = ()


def take_listing(ctx: Context, batch: Batch, node: str, report: Report, at: datetime) -> Seen:
    """Take a full listing: what the host is, and every domain it has.

    `began` is the node's counter when the listing began: a domain that is not in it and was last reported at or before
    that number is gone. So is one that was never reported, of a VM that is on record here.

    Returns:
        What it came to. What says nothing new is not committed: a herd at rest wakes no watcher.
    """
    body = report.body
    is_admitted, returned = returning.admit(ctx, batch, node, body, at)
    if not is_admitted:
        return Seen()
    _take_host(ctx, batch, node, body, at, returned)
    old = ctx.store.find(NodeInventory, node)
    before = old.domains if old else {}
    began = int(body["began"])
    domains = dict(_seen(ctx, item, report, before.get(str(item["uuid"]))) for item in body["domains"])
    newer = {uuid: known for uuid, known in before.items() if known.counter > began}
    domains |= newer  # reported while the listing was read: the listing is older news of them
    named = {seen.vm for seen in (*before.values(), *domains.values()) if seen.vm}
    vms = _load_vms(ctx, named | on_record(ctx, node))
    for uuid, known in before.items():
        if uuid in domains:
            continue
        is_held = known.vm in vms and vms[Key(known.vm)].is_held
        if known.state == ABSENT and is_held:
            domains[uuid] = known  # its settlement may ask how it went
        elif known.state != ABSENT and known.vm:
            domains[uuid] = known.with_(state=ABSENT, reason="", job=False, counter=report.number, began=began)
    unseen = {
        vm.metadata.uid: SeenDomain(
            name=vm.domain_name,
            state=ABSENT,
            vm=vm.key,
            incarnation=vm.status.incarnation,
            counter=report.number,
            began=began,
        )
        for vm in (loaded.vm for loaded in vms.values())
        if vm.metadata.uid not in domains and vm.status.node_name == node and vm.status.counter <= began
    }
    told = {str(item["uuid"]): item.get("needs") for item in body["domains"]}
    stopped = _apply(ctx, batch, node, {**unseen, **domains}, vms, told, at)
    is_answer = old is not None and bool(old.listing_order) and body.get("order") == old.listing_order
    is_same = {uuid: _uncounted(seen) for uuid, seen in domains.items()} == {
        uuid: _uncounted(seen) for uuid, seen in before.items()
    }
    if old is not None and not is_answer and is_same:
        return Seen(bool(batch.writes), stopped)
    new = NodeInventory(
        metadata=old.metadata if old else ObjectMeta(name=node, creation_timestamp=at),
        domains=domains,
        counter=report.number,
        full_counter=began,
        listed_at=at,
        listing_order="" if old is None or body.get("order") == old.listing_order else old.listing_order,
        created_version=old.created_version if old else 0,
    )
    if old is None:
        batch.create(new)
    else:
        batch.put(old, new)
    return Seen(is_news=True, stopped=stopped)


def take_domain(ctx: Context, batch: Batch, node: str, report: Report, at: datetime) -> Seen:
    """Take the report on one domain: a reading, or how it went."""
    old = ctx.store.find(NodeInventory, node)
    if old is None or returning.is_away(ctx, node):
        return Seen()  # no listing yet: it will tell
    body = report.body
    uuid = str(body["uuid"])
    known = old.domains.get(uuid)
    domains = dict(old.domains)
    told: dict[str, Any] = {}
    if body.get("domain") is None:
        if known is None or known.state == ABSENT:
            # A copy that ended before it was first reported: what is on record here may be the one before it.
            newer = _unreported(ctx, uuid)
            known = newer if newer and (known is None or newer.incarnation > known.incarnation) else known
        if known is None:
            return Seen()
        how = str(body.get("detail", ""))
        if how == "shutdown":
            how = f"shutdown/{body.get('reason') or 'guest'}"
        if body.get("ran"):  # it ran, and is gone since: its stop event, which is to come, tells how it went
            seen = known.with_(ran=True, counter=report.number, began=report.number)
        else:
            ran = known.ran and not how.startswith("migrated")
            by_host = _is_shutting_down(ctx, node)
            seen = known.with_(state=ABSENT, reason=how, job=False, ran=ran, by_host=by_host)
            seen = seen.with_(counter=report.number, began=report.number)
        if known.state == ABSENT and not how and seen.ran == known.ran:
            return Seen()  # it is known how it went
        if seen.vm:
            domains[uuid] = seen
        else:
            del domains[uuid]
    else:
        uuid, seen = _seen(ctx, body["domain"], report, known)
        told = {uuid: body["domain"].get("needs")}
        if known is not None and _uncounted(known) == _uncounted(seen) and not told[uuid]:
            return Seen()  # no commit for the watchers, only the cursor moves
        domains[uuid] = seen
    batch.put(old, old.with_(domains=domains, counter=report.number))
    stopped = _apply(ctx, batch, node, {uuid: seen}, _load_vms(ctx, {seen.vm} if seen.vm else set()), told, at)
    return Seen(is_news=True, stopped=stopped)


def take_reboot(ctx: Context, batch: Batch, node: str, uuid: str, at: datetime) -> None:
    """A guest rebooted itself. Its QEMU goes on, whatever the runPolicy: it is told, and nothing else follows."""
    inventory = ctx.store.find(NodeInventory, node)
    seen = inventory.domains.get(uuid) if inventory else None
    vm = ctx.store.find(VirtualMachine, seen.vm) if seen is not None and seen.vm else None
    if vm is not None and vm.metadata.uid == uuid and vm.status.node_name == node:
        add_notes(batch, (vm,), (Note("GuestRebooted", f"the guest rebooted on node {node}"),), at)


def take_loss(ctx: Context, batch: Batch, node: str, message: str, at: datetime) -> None:
    """The agent lost its hypervisor's daemon. Its guests may well run; nothing may start or land there."""
    old = ctx.store.find(Node, node)
    if old is None:
        return
    condition = Condition(type="HypervisorAvailable", status="False", reason="ConnectionLost", message=message)
    put_node(batch, old, old, (condition,), at)


def take_shutdown(ctx: Context, batch: Batch, node: str, at: datetime, *, begins: bool) -> bool:
    """A host's orderly shutdown begins (nothing starts or lands there, its VMs leave), or the host is up again.

    Returns:
        Whether that is new.
    """
    old = ctx.store.find(Node, node)
    if old is None or old.is_shutting_down == begins:
        return False
    condition = Condition(
        type="ShuttingDown",
        status="True" if begins else "False",
        reason="HostShutdown" if begins else "HostUp",
        message="its host shuts down: its VMs leave, or are stopped" if begins else "its host is up",
    )
    put_node(batch, old, old, (condition,), at)
    note = Note("NodeShuttingDown", condition.message, warning=True) if begins else Note("NodeUp", condition.message)
    add_notes(batch, (old,), (note,), at)
    return True


def put_node(batch: Batch, old: Node | None, new: Node, changed: tuple[Condition, ...], at: datetime) -> None:
    """Put a node with changed conditions, and tell when Ready changes: of its lease, its agent and its hypervisor."""
    conditions = new.status.conditions
    for condition in changed:
        conditions = with_condition(conditions, condition, at)
    ready = _ready(conditions)
    new = new.with_status(conditions=with_condition(conditions, ready, at))
    if new == old:
        return
    if old is None:
        batch.create(new)
    else:
        batch.put(old, new)
    if old is None or new.is_ready != old.is_ready:
        note = Note("NodeReady" if new.is_ready else "NodeNotReady", ready.message, warning=not new.is_ready)
        add_notes(batch, (new,), (note,), at)


def _ready(conditions: tuple[Condition, ...]) -> Condition:
    lease = find_condition(conditions, "LeaseFresh")
    hypervisor = find_condition(conditions, "HypervisorAvailable")
    agent = find_condition(conditions, AGENT_ALIVE)
    if lease is not None and lease.status != "True":
        return Condition(type="Ready", status="Unknown", reason="LeaseExpired", message=lease.message)
    if hypervisor is None or hypervisor.status != "True":
        message = f"its hypervisor does not answer: {hypervisor.message if hypervisor else ''}"
        return Condition(type="Ready", status="False", reason="HypervisorUnavailable", message=message)
    if agent is not None and agent.status != "True":
        return Condition(type="Ready", status="Unknown", reason=agent.reason, message=agent.message)
    return Condition(type="Ready", status="True", reason="NodeReady", message="lease renewed, hypervisor answers")


def _take_host(
    ctx: Context, batch: Batch, node: str, body: dict[str, Any], at: datetime, returned: Node | None
) -> None:
    old = ctx.store.find(Node, node)
    facts = body["host"]
    labels = {"kubernetes.io/hostname": node}
    named = (
        old or returned or Node(metadata=new_metadata(ObjectMeta(name=node, labels=labels), namespaced=False, now=at))
    )
    new = named.with_status(
        capacity=Capacity(cpu=facts["cpus"], memory_mib=facts["memory_mib"]),
        hypervisor=HypervisorInfo(
            migration_uri=facts["migration_uri"],
            host_uuid=facts["uuid"],
            cpu_model=facts["cpu_model"],
            version=facts["hypervisor_version"],
            libvirt_version=facts["libvirt_version"],
            domain_type=facts.get("domain_type", "kvm"),
            cpu_shares=facts.get("cpu_shares", True),
            cpu=_cpu(facts.get("cpu")),
        ),
        boot_id=body.get("boot_id", ""),
        generation=body.get("generation", ""),
    )
    if number := new.status.hypervisor.number:
        new = new.with_(metadata=new.metadata.with_(labels={**new.metadata.labels, HYPERVISOR_LABEL: number}))
    available = Condition(type="HypervisorAvailable", status="True", reason="Connected")
    fresh = (Condition(type="LeaseFresh", status="True", reason="Registered"),) if old is None else ()
    put_node(batch, old, new, (available, *fresh), at)


def _cpu(facts: dict[str, Any] | None) -> NodeCpu | None:
    """Read what a host tells of its CPU; None when it does not know."""
    return NodeCpu.model_validate(facts) if facts and (facts.get("features") or facts.get("models")) else None


def _seen(ctx: Context, item: dict[str, Any], report: Report, known: SeenDomain | None) -> tuple[str, SeenDomain]:
    """Read one domain of a report; `known` is what was known of it here before."""
    try:
        fields = {k: v for k, v in item.items() if k not in {"uuid", "needs"}}
        counted = {"counter": report.number, "began": report.body.get("began", report.number)}
        seen = SeenDomain.model_validate(fields | counted)
    except ValueError as error:
        raise Invalid(f"report {report.number}: {error}") from error
    ran = seen.state == "running" or (known is not None and known.ran and seen.state != "incoming")
    return str(item["uuid"]), adoption_orders.still_claimed(ctx, seen.with_(ran=ran), known)


def _unreported(ctx: Context, uuid: str) -> SeenDomain | None:
    """What can be said of a domain that ended before it was first reported; None when it is not one of ours."""
    with redis_errors(ctx.store.redis):
        key = cast("str | None", ctx.store.redis.hget(keys.VM_UIDS, uuid))
    vm = ctx.store.find(VirtualMachine, key) if key else None
    if vm is None:
        return None
    return SeenDomain(name=vm.domain_name, state="", vm=vm.key, incarnation=vm.status.incarnation)


def _uncounted(seen: SeenDomain) -> SeenDomain:
    return seen.with_(counter=0, began=0)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A VM, and the operation that has an open grant on it."""

    vm: VirtualMachine
    holder: VirtualMachineOperation | None

    @property
    def is_held(self) -> bool:
        """Whether a grant, an adoption or a release is open on it."""
        return self.holder is not None or self.vm.status.adoption is not None


def on_record(ctx: Context, node: str) -> set[str]:
    """Name the VMs that are on record on a node: each has its claim there."""
    with redis_errors(ctx.store.redis):
        claims = cast("list[str]", ctx.store.redis.hkeys(keys.claims(node)))
    return {claim.removeprefix("vm/") for claim in claims if claim.startswith("vm/")}


def _load_vms(ctx: Context, names: set[str]) -> dict[Key, _Loaded]:
    """Load VMs by name; those that don't exist are left out."""
    vms = ctx.store.many(VirtualMachine, sorted(names))
    if not vms:
        return {}
    with redis_errors(ctx.store.redis):
        found = cast("list[str | None]", ctx.store.redis.hmget(keys.OPEN_GRANTS, list(vms)))
    operations = ctx.store.many(VirtualMachineOperation, (name for name in found if name))
    holders = {operation.vm_key: operation for operation in operations.values() if operation.status.grant is not None}
    return {key: _Loaded(vm, holders.get(key)) for key, vm in vms.items()}


def _apply(
    ctx: Context,
    batch: Batch,
    node: str,
    domains: dict[str, SeenDomain],
    vms: dict[Key, _Loaded],
    told: dict[str, Any],
    at: datetime,
) -> tuple[str, ...]:
    """Let the VMs follow what is seen, but for those with an open grant.

    Args:
        told: What domains need of a host, by UUID, where that was told.

    Returns:
        The VMs whose policy is to be looked at.
    """
    changed: list[str] = []
    for uuid, seen in domains.items():
        loaded = vms.get(Key(seen.vm)) if seen.vm else None
        if loaded is None or loaded.vm.metadata.uid != uuid:
            continue
        vm, holder = loaded.vm, loaded.holder
        if holder is not None and _is_awaited(holder, node, seen):
            how = "" if seen.reason.startswith("shutdown") else f"its domain is gone ({seen.reason or 'not known how'})"
            settling.begin(ctx, batch, holder, "its domain is gone", kill=False, message=how)
        elif holder is not None and (turn := migrations.switch_over(holder, node, seen, at)) is not None:
            batch.put(holder, turn)
        observation = Observation() if loaded.is_held else observe(vm, node, seen, at)
        if not loaded.is_held:
            adoption_orders.order_undefine(batch, node, observation.vm or vm, seen)
        new = observation.vm or vm
        if node in {new.status.node_name, _target(holder)}:
            new = preflight.with_needs(new, told.get(uuid), node, at)
        if not loaded.is_held:
            new = with_agent(new, node, seen, at)
        if observation.vm is not None:
            changed.append(vm.key)
        if new is not vm:
            batch.put(vm, new)
        else:
            # A grant that is given or ends meanwhile writes the VM, or checks that it is unchanged: one of both commits
            # is decided again. Else what is seen here could be overlooked by both.
            batch.check("unchanged", VirtualMachine.kind_name, vm.key, vm.version)
        if observation.notes:
            add_notes(batch, (observation.vm or vm,), observation.notes, at)
    return tuple(changed)


def _target(holder: VirtualMachineOperation | None) -> str:
    """Where the operation that holds a VM brings it."""
    grant = holder.status.grant if holder is not None else None
    return grant.target if grant is not None else ""


def _is_awaited(holder: VirtualMachineOperation, node: str, seen: SeenDomain) -> bool:
    """Whether a guest that was asked to power off has gone."""
    grant = holder.status.grant
    return grant is not None and grant.state is GrantState.ASKED and grant.node == node and seen.state == ABSENT


def _is_shutting_down(ctx: Context, node: str) -> bool:
    found = ctx.store.find(Node, node)
    return found is not None and found.is_shutting_down

"""A node that was fenced comes back: it destroys what the control plane lists, and only then is in the herd again.

After a boot it has no domain of ours, as they are transient. One that never went off (a person's word was wrong) may
have guests that run elsewhere by now: each copy of a lower incarnation than the record's is listed for it, as orders to
its lifecycle worker. Until a listing shows none of them, it is no node of the herd: nothing starts there, and its boot
renews no lease. Then it gets its labels, annotations, cordon and taints back, and is watched as any other.

What a node reported before the evidence may still be unread when it is recovered. So only the listing counts that
answers the order which its recovery put out; everything else that it reports of its domains is dropped until then.
"""

from datetime import datetime
from typing import Any

from orchestrator.planner.flow import Note
from orchestrator.queues import Message, Task, lifecycle_queue
from orchestrator.resources import Key, Node, NodeFencing, ObjectMeta, Order, VirtualMachine, new_metadata
from orchestrator.resources.fencing import FencePhase, NodeFencingStatus
from orchestrator.resources.node import NodeSpec
from orchestrator.resources.outdated import destroy_outdated
from orchestrator.services.context import Context, add_notes
from orchestrator.store import Batch, keys

HOSTNAME_LABEL = "kubernetes.io/hostname"


def admit(ctx: Context, batch: Batch, name: str, body: dict[str, Any], at: datetime) -> tuple[bool, Node | None]:
    """Decide on a listing of a node, which may have been fenced.

    Returns:
        Whether the listing is to be taken; and, of a node that comes back now, the node as it is to be.
    """
    fencing = ctx.store.find(NodeFencing, name)
    if fencing is None or not fencing.status.phase.has_evidence:
        return True, None
    is_answer = body.get("order") == fencing.status.listing_order
    if fencing.status.phase is not FencePhase.RECOVERED or not is_answer:
        batch.check("unchanged", NodeFencing.kind_name, name, fencing.version)
        return False, None  # first its VMs are settled; and what it reported before the evidence may come now
    outdated = _outdated(ctx, name, body)
    if outdated:
        again = f"{fencing.status.listing_order.partition('.')[0]}.{ctx.store.next_epochs(1)[0]}"
        batch.put(fencing, fencing.with_status(orders=outdated, listing_order=again))
        batch.wake(name, "listing")
        if outdated.keys() != fencing.status.orders.keys():
            told = f"node {name} is back with {len(outdated)} outdated guests: it destroys them"
            add_notes(batch, (fencing,), (Note("OutdatedGuests", told, warning=True),), at)
        for order in outdated.values():
            ctx.messenger.send(Message(Task.NODE_SETTLE, lifecycle_queue(name), (name, order.id, order.kind.value)))
        return False, None
    kept = fencing.status.kept
    said, distrust = "it came back and joined again", fencing.status.bmc_distrust
    status = NodeFencingStatus(since=at, reason="Returned", message=said, bmc_distrust=distrust)
    back = fencing.with_(status=status)
    batch.put(fencing, back)
    batch.check("value", keys.fencing(name), "")  # a hung fence agent ends before its node is back
    batch.effect("DEL", keys.taken_over(name))
    batch.tell("fencing", node=name, phase=f"{FencePhase.RECOVERED} => {FencePhase.IDLE}", why="Returned")
    labels = {**(kept.labels if kept else {}), HOSTNAME_LABEL: name}
    annotations = kept.annotations if kept else {}
    node = Node(
        metadata=new_metadata(ObjectMeta(name=name, labels=labels, annotations=annotations), namespaced=False, now=at),
        spec=NodeSpec(unschedulable=kept.unschedulable, taints=kept.taints) if kept else NodeSpec(),
    )
    add_notes(batch, (node,), (Note("NodeReturned", "it was fenced, and is back with its labels and cordon"),), at)
    return True, node


def is_away(ctx: Context, name: str) -> bool:
    """Whether there is evidence about a node, and it is not back yet."""
    fencing = ctx.store.find(NodeFencing, name)
    return fencing is not None and fencing.status.phase.has_evidence


def _outdated(ctx: Context, name: str, body: dict[str, Any]) -> dict[str, Order]:
    """List what the node has to destroy: copies of ours that are of a lower incarnation than the record's."""
    domains = [item for item in body["domains"] if item.get("vm") and item.get("state") != "shutoff"]
    vms = ctx.store.many(VirtualMachine, {str(item["vm"]) for item in domains})
    orders: dict[str, Order] = {}
    for item in domains:
        uuid, vm = str(item["uuid"]), vms.get(Key(str(item["vm"])))
        if vm is None or vm.metadata.uid != uuid or int(item.get("incarnation", 0)) >= vm.status.incarnation:
            continue
        orders[uuid] = destroy_outdated(vm, f"return/{name}#{uuid}.{vm.status.incarnation}")
    return orders

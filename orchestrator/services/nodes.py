"""What people say of nodes: cordon, labels, taints."""

from collections.abc import Callable, Iterable, Mapping
from typing import cast

from orchestrator.errors import Invalid, Refused
from orchestrator.lease import read_lease
from orchestrator.planner.flow import Note
from orchestrator.resources import Condition, Node, NodeFencing, NodeInventory, ObjectMeta, new_metadata, parse
from orchestrator.resources.node import HYPERVISOR_LABEL, NodeSpec
from orchestrator.resources.scheduling import NodeLabels, Taint
from orchestrator.services import drains
from orchestrator.services.classes import check_version
from orchestrator.services.context import Context, add_notes, deciding, wake_grant
from orchestrator.services.inventory import put_node
from orchestrator.store import access, keys
from orchestrator.store.connection import redis_errors

HOSTNAME_LABEL = "kubernetes.io/hostname"
_OWN_LABELS = {HOSTNAME_LABEL: "name", HYPERVISOR_LABEL: "word"}
"""Labels that only the node itself sets, and what they are of it."""


def set_unschedulable(ctx: Context, name: str, *, unschedulable: bool, bring_back: bool | None = None) -> bool:
    """Cordon or uncordon a node. Migrations under way go on; nothing new starts or lands on a cordoned node.

    Uncordoning ends a drain of it: what has not begun is dropped.

    Returns:
        Whether anything changed.

    Raises:
        NotFound: No such node.
    """
    if not unschedulable:
        return drains.uncordon(ctx, name, bring_back=bring_back)

    def decide() -> bool:
        old = ctx.store.get(Node, name)
        if old.spec.unschedulable:
            return False
        new = old.with_(spec=old.spec.with_(unschedulable=True))
        batch = ctx.store.batch().put(old, new)
        add_notes(batch, (new,), (Note("NodeCordoned", "no VM starts or lands here"),), ctx.now())
        ctx.store.must_commit(batch)
        return True

    changed = deciding(decide)
    if changed:
        drains.step(ctx, name)
        wake_grant(ctx)
    return changed


def add_witness(ctx: Context, name: str) -> None:
    """Put a witness on record; nothing happens when it is there.

    Raises:
        Refused: A node of that name has VMs, or may have.
    """

    def decide() -> None:
        old = ctx.store.find(Node, name)
        if old is not None:
            if not old.spec.witness:
                raise Refused(f"node {name!r} is a hypervisor: a witness needs a name of its own")
            return
        at = ctx.now()
        metadata = new_metadata(ObjectMeta(name=name, labels={HOSTNAME_LABEL: name}), namespaced=False, now=at)
        new = Node(metadata=metadata, spec=NodeSpec(witness=True))
        message = "it has not renewed its lease yet"
        lease = Condition(type="LeaseFresh", status="False", reason="NotRenewed", message=message)
        hypervisor = Condition(type="HypervisorAvailable", status="True", reason="Witness", message="it runs no VMs")
        batch = ctx.store.batch()
        put_node(batch, None, new, (lease, hypervisor), at)
        ctx.store.must_commit(batch)

    deciding(decide)


def check_no_witness(ctx: Context, name: str) -> None:
    """Check that a host may join under a name.

    Raises:
        Refused: It is a witness's.
    """
    old = ctx.store.find(Node, name)
    if old is not None and old.spec.witness:
        raise Refused(f"node {name!r} is a witness: vmherd node expel {name} first, or take another name")


def is_armed(ctx: Context, name: str) -> bool:
    """Whether a node's lease, fresh or not, has it on record that its watchdog counts."""
    with redis_errors(ctx.store.redis):
        stored = read_lease(cast("str | None", ctx.store.redis.get(keys.lease(name))))
    return stored is not None and stored.lease.armed


def remove_witness(ctx: Context, name: str) -> None:
    """Remove a witness from record; nothing happens when there is none of that name."""

    def decide() -> None:
        old = ctx.store.find(Node, name)
        if old is not None and old.spec.witness:
            ctx.store.must_commit(ctx.store.batch().delete(old))

    deciding(decide)


def remove_node(ctx: Context, name: str) -> Node:
    """Take a host out of the herd: its Redis user, and what is on record of it. What its `NodeFencing` says stays.

    Returns:
        The node as it was.

    Raises:
        NotFound: No such node.
        Refused: It is Ready, its watchdog is armed, or something is on record there.
    """

    def decide() -> Node:
        old, fencing = ctx.store.get(Node, name), ctx.store.find(NodeFencing, name)
        if old.is_ready and not old.spec.witness:
            raise Refused(f"node {name!r} is Ready: drain it, and stop its agent and its heartbeat first")
        if is_armed(ctx, name):
            why = "its watchdog is armed, and would reset it: stop its heartbeat first"
            raise Refused(f"node {name!r}: {why} (systemctl stop vmherd-heartbeat)")
        if fencing is not None and fencing.status.phase.is_open:
            raise Refused(f"node {name!r} is being fenced: {fencing.status.message}")
        with redis_errors(ctx.store.redis):
            claims = cast("list[str]", ctx.store.redis.hkeys(keys.claims(name)))
        if held := sorted(claim for claim in claims if not claim.startswith("domain/")):
            raise Refused(f"node {name!r} has {', '.join(held)} on record: drain it, or have it fenced, first")
        batch = ctx.store.batch().delete(old)
        inventory = ctx.store.find(NodeInventory, name)
        if inventory is not None:
            batch.delete(inventory)
        batch.tell("node removed", node=name)
        ctx.store.must_commit(batch)
        return old

    removed = deciding(decide)
    if not ctx.store.is_dry:
        access.expel(ctx.store.redis, name)
    return removed


def set_labels(ctx: Context, name: str, changes: Mapping[str, str | None]) -> bool:
    """Set labels of a node, or remove those whose value is None.

    Returns:
        Whether anything changed.

    Raises:
        NotFound: No such node.
        Invalid: A key or a value can't be one, or the label is the node's own.
    """
    return _change(ctx, name, lambda old: with_labels(old, changes))


def with_labels(old: Node, changes: Mapping[str, str | None]) -> Node:
    """Give a node with its labels changed; raises `Invalid` as `set_labels`."""
    for label in _OWN_LABELS.keys() & changes.keys():
        raise _own_label(label)
    wanted = parse(NodeLabels, {"matchLabels": {key: value or "" for key, value in changes.items()}}).match_labels
    labels = {**old.metadata.labels, **wanted}
    kept = {key: value for key, value in labels.items() if changes.get(key, "") is not None}
    return old.with_(metadata=old.metadata.with_(labels=kept))


def set_taints(ctx: Context, name: str, wanted: Iterable[Taint], removed: Iterable[tuple[str, str]] = ()) -> bool:
    """Put taints on a node, each in place of one of its key and effect, or remove some.

    Args:
        ctx: To work with.
        name: The node's.
        wanted: To be put on.
        removed: Pairs of key and effect; an empty effect means all of the key.

    Returns:
        Whether anything changed.

    Raises:
        NotFound: No such node.
    """
    new, gone = tuple(wanted), tuple(removed)
    return _change(ctx, name, lambda old: with_taints(old, new, gone))


def with_taints(old: Node, wanted: Iterable[Taint], removed: Iterable[tuple[str, str]]) -> Node:
    """Give a node with its taints changed; arguments are those of `set_taints`."""
    new, gone = {(taint.key, taint.effect.value): taint for taint in wanted}, set(removed)
    taints = {(taint.key, taint.effect.value): taint for taint in old.spec.taints} | new
    kept = tuple(
        taint for (key, effect), taint in taints.items() if not {(key, ""), (key, effect)} & (gone - new.keys())
    )
    return old.with_(spec=old.spec.with_(taints=kept))


def update_node(ctx: Context, wanted: Node) -> Node:
    """Replace what people say of a node: its labels, annotations, taints, and whether it is cordoned.

    Args:
        ctx: To work with.
        wanted: Its status counts for nothing.

    Returns:
        The node; as it was when nothing differs.

    Raises:
        NotFound: No such node.
        Invalid: A label can't be one, or is the node's own.
        ChangedMeanwhile: `metadata.resourceVersion` is given, and another one is stored.
    """
    labels = parse(NodeLabels, {"matchLabels": wanted.metadata.labels}).match_labels

    def decide() -> tuple[Node, bool]:
        old = ctx.store.get(Node, wanted.name)
        check_version(old, wanted)
        for label in _OWN_LABELS:
            if labels.get(label) != old.metadata.labels.get(label):
                raise _own_label(label)
        meta = old.metadata.with_(labels=labels, annotations=wanted.metadata.annotations)
        # A cordon is a step of its own below, where what follows from it for a drain of the node is done too.
        new = old.with_(metadata=meta, spec=wanted.spec.with_(unschedulable=old.spec.unschedulable))
        if new == old:
            return old, False
        return ctx.store.must_commit(ctx.store.batch().put(old, new))[0], True  # type: ignore[return-value]

    node, is_changed = deciding(decide)
    if is_changed:
        wake_grant(ctx)
    if node.spec.unschedulable == wanted.spec.unschedulable:
        return node
    if ctx.store.is_dry:
        return node.with_(spec=wanted.spec)
    set_unschedulable(ctx, wanted.name, unschedulable=wanted.spec.unschedulable)
    return ctx.store.get(Node, wanted.name)


def _change(ctx: Context, name: str, change: Callable[[Node], Node]) -> bool:
    def decide() -> bool:
        old = ctx.store.get(Node, name)
        new = change(old)
        if new == old:
            return False
        ctx.store.must_commit(ctx.store.batch().put(old, new))
        return True

    changed = deciding(decide)
    if changed:
        wake_grant(ctx)
    return changed


def _own_label(label: str) -> Invalid:
    path, why = f"metadata.labels.{label}", f"is the node's own {_OWN_LABELS[label]}, and can't be changed"
    return Invalid(f"{path}: {why}", ((path, why),))

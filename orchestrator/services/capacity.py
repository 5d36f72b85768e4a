"""The capacity watch: each node says whether the herd could lose it now."""

from orchestrator.errors import NotFound
from orchestrator.planner.capacity import (
    DOMAIN_READY,
    FAILOVER_READY,
    Failure,
    domain_failures,
    failover_condition,
    plan_failures,
    single_failures,
)
from orchestrator.resources import Condition, Node, find_condition, with_condition
from orchestrator.services.context import Context, deciding
from orchestrator.services.herd import Herd


def watch(ctx: Context, herd: Herd) -> int:
    """Look at the loss of each node and of each rack or zone, and write what is new to the nodes.

    Returns:
        How many nodes could not be lost.
    """
    snapshot = herd.snapshot(whole=True)
    domains = domain_failures(snapshot)
    failures = plan_failures(snapshot, {**single_failures(snapshot), **domains})
    bad = 0
    for node in sorted(herd.follower.all(Node), key=lambda node: node.name):
        if node.name not in failures:
            continue  # it joined since
        conditions = [failover_condition(FAILOVER_READY, [failures[node.name]])]
        within = [failures[domain] for domain, nodes in domains.items() if node.name in nodes]
        if within:
            conditions.append(failover_condition(DOMAIN_READY, within))
        bad += conditions[0].status == "False"
        is_over = not within and find_condition(node.status.conditions, DOMAIN_READY) is not None
        if is_over or any(_is_news(node, condition) for condition in conditions):
            _write(ctx, node.name, conditions)
    return bad


def failures_of(herd: Herd, nodes: list[str]) -> dict[str, Failure]:
    """Say what would come of the loss of each of some nodes; of none named: of each node, rack and zone.

    Raises:
        NotFound: No such node.
    """
    present = {node.name for node in herd.follower.all(Node)}
    for name in nodes:
        if name not in present:
            raise NotFound(f"Node {name!r} not found")
    snapshot = herd.snapshot(whole=True)
    known = single_failures(snapshot)
    wanted = {name: known.get(name, (name,)) for name in nodes} or {**known, **domain_failures(snapshot)}
    return plan_failures(snapshot, wanted)


def _is_news(node: Node, condition: Condition) -> bool:
    old = find_condition(node.status.conditions, condition.type)
    return old is None or (old.status, old.message) != (condition.status, condition.message)


def _write(ctx: Context, name: str, conditions: list[Condition]) -> None:
    def decide() -> None:
        old = ctx.store.find(Node, name)
        if old is None:
            return
        at, told = ctx.now(), {condition.type for condition in conditions}
        kept = tuple(c for c in old.status.conditions if c.type != DOMAIN_READY or DOMAIN_READY in told)
        for condition in conditions:
            kept = with_condition(kept, condition, at)
        new = old.with_status(conditions=kept)
        if new != old:
            ctx.store.must_commit(ctx.store.batch().put(old, new))

    deciding(decide)

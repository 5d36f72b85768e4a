"""What nodes report, taken into the store: each report once, in one commit with the cursor that says so.

Every handler fills a batch and gives what is to be sent after it was committed. A report that refers to a grant counts
only when its epoch is the open grant's.
"""

from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any, cast

from orchestrator.errors import AlreadyExists, Conflict
from orchestrator.logs import logger
from orchestrator.planner.flow import asked, began
from orchestrator.planner.observation import ABSENT
from orchestrator.resources import (
    Action,
    Grant,
    GrantState,
    NodeInventory,
    Reading,
    VirtualMachine,
    VirtualMachineOperation,
    finalizers,
)
from orchestrator.services import (
    adoption_answers,
    drains,
    inventory,
    looking,
    migrations,
    policies,
    preflight,
    settling,
)
from orchestrator.services.context import (
    Context,
    deciding,
    load_pair,
    put_timers,
    put_transition,
    send_grant,
    send_orders,
    wake_grant,
)
from orchestrator.services.results import publish_result
from orchestrator.store import Batch, Refusal, keys
from orchestrator.store.connection import redis_errors
from orchestrator.store.node_store import Report

log = logger(__name__)

After = Callable[[], None]


def take_report(ctx: Context, node: str, report: Report, cursor: str, at: datetime) -> bool:
    """Take one report into the store.

    Args:
        node: Who reports; known from the stream's key, which only that node can write.
        report: What it says.
        cursor: The id of the report before it, as it stands in the store (empty for none).
        at: When it was read, by Redis's clock.

    Returns:
        False when another intake has taken it already.
    """

    def decide() -> bool:
        batch = ctx.store.batch()
        batch.check("field", keys.CURSORS, node, cursor)
        batch.effect("HSET", keys.CURSORS, node, f"{report.number}-0")
        batch.effect("XTRIM", keys.reports(node), "MINID", "~", f"{report.number}-0")
        afters = _handle(ctx, batch, node, report, at)
        try:
            answer = ctx.store.commit(batch)
        except AlreadyExists as error:  # created by someone else since: decide again, from what is there now
            raise Conflict(str(error)) from error
        if isinstance(answer, Refusal):
            if answer.check == "field" and _cursor(ctx, node) != cursor:
                return False
            raise Conflict(f"{answer.check}: {answer.detail}")
        for after in afters:
            after()
        return True

    return deciding(decide)


def _cursor(ctx: Context, node: str) -> str:
    with redis_errors(ctx.store.redis):
        return cast("str | None", ctx.store.redis.hget(keys.CURSORS, node)) or ""


def _handle(  # noqa: C901, PLR0912 - a table, one kind a branch
    ctx: Context, batch: Batch, node: str, report: Report, at: datetime
) -> list[After]:
    body = report.body
    match report.kind:
        case "Began":
            return _began(ctx, batch, node, body, at)
        case "Progress":
            return _progress(ctx, batch, node, body, at)
        case "Predicted":
            return _predicted(ctx, batch, node, body, at)
        case "Asked":
            return _asked(ctx, batch, node, body, at)
        case "Rebooted":
            inventory.take_reboot(ctx, batch, node, str(body["uuid"]), at)
            return []
        case "HostShutdown":
            begins = bool(body["begins"])
            if not inventory.take_shutdown(ctx, batch, node, at, begins=begins):
                return []
            empty: After = partial(drains.begin_host_shutdown, ctx, node)
            return [empty] if begins else [drains.after(ctx, node), partial(wake_grant, ctx)]
        case "Ended":
            return _ended(ctx, batch, node, body)
        case "Answer":
            return _answer(ctx, batch, node, report, at)
        case "Adoption":
            return adoption_answers.take_answer(ctx, batch, node, report, at)
        case "Checked" | "Described":
            is_awaited = preflight.take_answer(ctx, batch, node, report, at)
            return [partial(wake_grant, ctx)] if is_awaited else []
        case "Looked":
            looking.take_answer(ctx, batch, node, body)
            return []
        case "Listing":
            return _seen(ctx, node, inventory.take_listing(ctx, batch, node, report, at))
        case "Domain":
            return _seen(ctx, node, inventory.take_domain(ctx, batch, node, report, at))
        case "HypervisorLost":
            inventory.take_loss(ctx, batch, node, str(body.get("message", "")), at)
            return []
        case _:
            log.warning("unknown report dropped", node=node, kind=report.kind, number=report.number)
            return []


def _seen(ctx: Context, node: str, seen: inventory.Seen) -> list[After]:
    """What is to be done once an inventory's news are committed."""
    afters: list[After] = [partial(policies.keep, ctx, vm) for vm in seen.stopped]
    return [*afters, drains.after(ctx, node), partial(wake_grant, ctx)] if seen.is_news else afters


def _open_grant(
    ctx: Context, node: str, body: dict[str, Any], *states: GrantState
) -> tuple[VirtualMachineOperation, VirtualMachine | None, Grant] | None:
    operation, vm = load_pair(ctx.store, str(body["operation"]))
    grant = operation.status.grant if operation else None
    if operation is None or grant is None or grant.node != node or grant.epoch != body["epoch"]:
        return None
    return (operation, vm, grant) if grant.state in states else None


def _began(ctx: Context, batch: Batch, node: str, body: dict[str, Any], at: datetime) -> list[After]:
    found = _open_grant(ctx, node, body, GrantState.GRANTED)
    if found is None:
        return []
    operation, vm, _ = found
    transition = began(operation, vm, at)
    put_transition(batch, operation, vm, transition, at)
    put_timers(ctx, batch, transition.operation)
    return []


def _progress(ctx: Context, batch: Batch, node: str, body: dict[str, Any], at: datetime) -> list[After]:
    found = _open_grant(ctx, node, body, GrantState.RUNNING)
    if found is None:
        return []
    operation, vm, _ = found
    put_timers(ctx, batch, operation)
    job = body.get("job")
    if job:
        migrations.take_figures(batch, operation, vm, job, at)
    return []


def _predicted(ctx: Context, batch: Batch, node: str, body: dict[str, Any], at: datetime) -> list[After]:
    found = _open_grant(ctx, node, body, GrantState.RUNNING)
    if found is not None and found[1] is not None:
        migrations.take_predicted(batch, found[0], found[1], body, at)
    return []


def _asked(ctx: Context, batch: Batch, node: str, body: dict[str, Any], at: datetime) -> list[After]:
    """A guest was asked to power off. From here on the control plane's timer enforces the grace period."""
    found = _open_grant(ctx, node, body, GrantState.GRANTED, GrantState.RUNNING)
    if found is None:
        return []
    operation, vm, grant = found
    seen = ctx.store.get(NodeInventory, node).domains.get(grant.uuid)
    if seen is not None and seen.state == ABSENT and not operation.status.superseded_by:
        settling.begin(ctx, batch, operation, "its domain is gone", kill=False)  # that was reported before this
        return []
    transition = asked(operation, str(body.get("message", "")), at)
    put_transition(batch, operation, vm, transition, at)
    put_timers(ctx, batch, transition.operation)
    return after_end(ctx, transition.operation, grant) if transition.ended else []


def _ended(ctx: Context, batch: Batch, node: str, body: dict[str, Any]) -> list[After]:
    found = _open_grant(ctx, node, body, GrantState.GRANTED, GrantState.RUNNING)
    if found is None:
        return []
    operation, vm, grant = found
    message = str(body.get("message", ""))
    end = str(body["end"])
    cause = f"its call ended: {end}" + (f" ({message})" if message else "")
    if grant.action is Action.MIGRATE:
        operation = migrations.with_end(operation, body)
        message += migrations.explain_deadline(ctx.config, grant, vm, body)
    elif grant.action is Action.START:
        operation = operation.with_grant(locked=bool(body.get("locked")))
    settling.begin(ctx, batch, operation, cause, kill=False, end=end, message=message)
    return []


def _answer(ctx: Context, batch: Batch, node: str, report: Report, at: datetime) -> list[After]:
    order_id = str(report.body["order"])
    operation, vm = load_pair(ctx.store, order_id.partition("#")[0])
    if operation is None or operation.status.grant is None:
        return []
    reading = Reading.model_validate({**report.body["reading"], "counter": report.number})
    transition = settling.answered(ctx, batch, operation, vm, node, order_id, reading, at)
    if transition is None:
        return []
    new = transition.operation
    if not transition.ended:
        return [lambda: send_orders(ctx, new), lambda: send_grant(ctx, new) if _is_granted(new) else None]
    return after_end(ctx, new, operation.status.grant)


def after_end(ctx: Context, operation: VirtualMachineOperation, grant: Grant) -> list[After]:
    """What is to be done when a grant has ended.

    An operation that is deleted after this commit has no grant any more, and is removed by whoever deletes it.
    """
    return [
        lambda: publish_result(ctx, operation),
        lambda: remove_deleted(ctx, operation.key) if operation.metadata.deletion_timestamp is not None else None,
        lambda: policies.keep(ctx, operation.vm_key),
        drains.after(ctx, grant.node, grant.target),
        lambda: wake_grant(ctx),
    ]


def _is_granted(operation: VirtualMachineOperation) -> bool:
    grant = operation.status.grant
    return grant is not None and grant.state is GrantState.GRANTED


def remove_deleted(ctx: Context, key: str) -> None:
    """Remove an operation whose deletion waited for its end; watchers have seen the end just before."""

    def decide() -> None:
        operation = ctx.store.find(VirtualMachineOperation, key)
        if operation is None or operation.metadata.deletion_timestamp is None or operation.status.grant is not None:
            return
        if finalizers.others(operation.metadata):
            return  # whoever takes the last one off removes it
        ctx.store.must_commit(ctx.store.batch().delete(operation))

    deciding(decide)

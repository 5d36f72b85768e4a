"""What has had its time is removed: events older than an hour, and finished operations."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta

from orchestrator.errors import Conflict
from orchestrator.resources import Event, Resource, VirtualMachineOperation, finalizers
from orchestrator.services.context import Context

EVENTS_KEPT = timedelta(hours=1)
OPERATIONS_KEPT = timedelta(hours=24)
"""From their creation, as the platform does."""
OPERATIONS_KEPT_PER_VM = 10
_AT_A_TIME = 500


def remove_old_events(ctx: Context) -> int:
    """Delete events that were last seen more than an hour ago.

    Returns:
        How many there were.
    """
    at = ctx.store.now()
    return _remove(ctx, [event for event in ctx.store.all(Event) if at - event.last_timestamp > EVENTS_KEPT])


def remove_old_operations(ctx: Context) -> int:
    """Delete finished operations that are a day old, and of each VM all but the ten that were created last.

    Returns:
        How many there were.
    """
    at = ctx.store.now()
    by_vm: dict[str, list[VirtualMachineOperation]] = defaultdict(list)
    for operation in ctx.store.all(VirtualMachineOperation):
        if not operation.is_open:  # a superseded one holds slots and claims until its grant has ended
            by_vm[operation.vm_key].append(operation)
    old: list[VirtualMachineOperation] = []
    for operations in by_vm.values():
        newest_first = sorted(operations, key=lambda operation: -operation.created_version)
        for position, operation in enumerate(newest_first):
            if finalizers.others(operation.metadata):
                continue  # somebody wants to see it before it goes
            created_at = operation.metadata.creation_timestamp
            if position >= OPERATIONS_KEPT_PER_VM or (created_at is not None and at - created_at > OPERATIONS_KEPT):
                old.append(operation)
    return _remove(ctx, old)


def _remove(ctx: Context, old: Sequence[Resource]) -> int:
    """Delete documents, at most 500 a commit."""
    for first in range(0, len(old), _AT_A_TIME):
        batch = ctx.store.batch()
        for resource in old[first : first + _AT_A_TIME]:
            batch.delete(resource)
        try:
            ctx.store.must_commit(batch)
        except Conflict:
            continue  # another housekeeping was here
    return len(old)

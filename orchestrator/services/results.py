"""Results of operations that were enqueued as Celery tasks (`evict.delay(...).get()`).

The task that creates the operation ends without a result, so no worker waits; whoever ends the operation stores it.
"""

from typing import Any

from orchestrator.resources import VirtualMachineOperation
from orchestrator.resources.vmop import CELERY_TASK_ANNOTATION
from orchestrator.services.context import Context


def operation_result(operation: VirtualMachineOperation) -> dict[str, Any]:
    """Give an operation's outcome as a task's result."""
    return {
        "operation": operation.name,
        "namespace": operation.metadata.namespace,
        "phase": operation.status.phase.value,
        "node": operation.status.target_node,
        "message": operation.message,
        "downtime_ms": operation.status.downtime_ms,
    }


def publish_result(ctx: Context, operation: VirtualMachineOperation) -> None:
    """Store the result of the task that enqueued an operation, if one did and nothing more comes of it.

    An operation that was deleted before it began has no end of its own; its phase is Terminating then.
    """
    task_id = operation.metadata.annotations.get(CELERY_TASK_ANNOTATION)
    is_dropped = operation.metadata.deletion_timestamp is not None and operation.status.grant is None
    if task_id and (is_dropped or not operation.is_active):
        ctx.messenger.finish(task_id, operation_result(operation))

"""One live migration, on its source node: take the grant, make the call, report how it ended.

The call's result is no more than a hint: where the guest runs is then read from both hosts by the control plane.
"""

from orchestrator.logs import logger
from orchestrator.resources import NodeGrant
from orchestrator.store.node_store import NodeStore
from workers.hypervisor.port import Hypervisor, MigrationEnd, MigrationRequest, MigrationResult
from workers.reporting import report_surely
from workers.watching import Watch

log = logger(__name__)

_LOOK_EVERY_S = 0.5


def run_migration(store: NodeStore, hypervisor: Hypervisor, holder: str, operation: str, epoch: int) -> str:
    """Do what a message asks for, if its grant is current and nobody took it yet.

    Args:
        store: This node's.
        hypervisor: This node's.
        holder: Name of this process.
        operation: Key of the operation.
        epoch: Of the grant that the message was sent for.

    Returns:
        What became of it, for Flower's list.
    """
    grant = store.claim(operation, epoch, holder)
    if grant is None:
        return f"{operation}: nothing to do (epoch {epoch} is not current, or was taken)"
    if grant.cancel and not grant.adopt:
        result = MigrationResult(MigrationEnd.ABORTED, "aborted before it began")
    else:
        log.info("migration begins", operation=operation, vm=grant.vm, target=grant.target, epoch=epoch)
        with Watch(store, hypervisor, grant, abortable=True) as watch:
            result = _follow(hypervisor, grant, watch) if grant.adopt else _migrate(hypervisor, grant)
    log.info("migration call ended", operation=operation, vm=grant.vm, end=result.end.value, message=result.message)
    report_surely(
        store,
        "Ended",
        {"operation": operation, "epoch": epoch, "end": result.end.value, "message": result.message},
    )
    return f"{grant.vm} to {grant.target}: {result.end.value} {result.message}".rstrip()


def _migrate(hypervisor: Hypervisor, grant: NodeGrant) -> MigrationResult:
    request = MigrationRequest(
        uuid=grant.uuid,
        target_uri=grant.target_uri,
        bandwidth_mib_s=grant.bandwidth_mib_s,
        auto_converge=grant.auto_converge,
    )
    return hypervisor.migrate(request)


def _follow(hypervisor: Hypervisor, grant: NodeGrant, watch: Watch) -> MigrationResult:
    """Wait for the end of a job that an earlier worker began; libvirtd carries it on by itself."""
    while hypervisor.job(grant.uuid) is not None:
        watch.wait(_LOOK_EVERY_S)
    return MigrationResult(MigrationEnd.UNKNOWN, "the job that was taken over has ended")

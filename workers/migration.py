"""One live migration, on its source node: take the grant, measure the guest, make the call, report how it ended.

The call's result is no more than a hint: where the guest runs is then read from both hosts by the control plane.
"""

from typing import Any

from orchestrator import metrics
from orchestrator.errors import HypervisorError, OutcomeUnknown, StoreUnavailable
from orchestrator.logs import logger
from orchestrator.resources import NodeGrant
from orchestrator.store.node_store import NodeStore
from workers.hypervisor.port import Hypervisor, MigrationEnd, MigrationRequest, MigrationResult
from workers.reporting import report_surely
from workers.watching import Watch

log = logger(__name__)

_LOOK_EVERY_S = 0.5
_SAMPLE_S = 1.0
_BEFORE = MigrationResult(MigrationEnd.ABORTED, "aborted before it began")


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
    ended: dict[str, Any] = {}
    if grant.cancel and not grant.adopt:
        result = _BEFORE
    else:
        log.info("migration begins", operation=operation, vm=grant.vm, target=grant.target, epoch=epoch)
        with metrics.migration_shown(grant.vm, store.node), Watch(store, hypervisor, grant) as watch:
            result = _follow(hypervisor, grant, watch) if grant.adopt else _migrate(store, hypervisor, grant, watch)
        ended["job"] = watch.figures
        if watch.timed_out and result.end is not MigrationEnd.SUCCEEDED:
            ended["timed_out"] = watch.timed_out.value
            result = _explained(result, watch.explanation)
    log.info("migration call ended", operation=operation, vm=grant.vm, end=result.end.value, message=result.message)
    ended |= {"operation": operation, "epoch": epoch, "end": result.end.value, "message": result.message}
    report_surely(store, "Ended", ended)
    return f"{grant.vm} to {grant.target}: {result.end.value} {result.message}".rstrip()


def _migrate(store: NodeStore, hypervisor: Hypervisor, grant: NodeGrant, watch: Watch) -> MigrationResult:
    if grant.sample_s > 0:
        _measure(store, hypervisor, grant, watch)
    if not watch.begin():
        return _BEFORE
    request = MigrationRequest(
        uuid=grant.uuid,
        target_uri=grant.target_uri,
        bandwidth_mib_s=grant.bandwidth_mib_s,
        auto_converge=grant.auto_converge,
        post_copy=grant.post_copy,
        channels=grant.channels,
        copy_disks=grant.copy_disks,
    )
    return hypervisor.migrate(request)


def _measure(store: NodeStore, hypervisor: Hypervisor, grant: NodeGrant, watch: Watch) -> None:
    """Measure how fast the guest dirties its memory, and tell it: what is foreseen is told before the call.

    Several short samples say more than a long one: no sample sees more than the working set, and a guest writes in
    bursts (measured: 2 to 86 MiB/s in a second, of a guest that wrote 80). A migration needs no forecast: where there
    is none, it goes on.
    """
    pieces = max(1, round(grant.sample_s / _SAMPLE_S))
    rates: list[float] = []
    try:
        while len(rates) < pieces and not watch.is_cancelled:
            rate = hypervisor.dirty_rate(grant.uuid, grant.sample_s / pieces)
            if rate is None:
                return
            rates.append(rate)
        log.info("dirty rate", operation=grant.operation, vm=grant.vm, mib_s=rates)
        if len(rates) == pieces:
            mean = round(sum(rates) / pieces, 1)
            metrics.show_dirty_rate(grant.vm, store.node, mean)
            body = {"operation": grant.operation, "epoch": grant.epoch, "dirty_rate_mib_s": mean}
            store.report("Predicted", body)
    except (HypervisorError, OutcomeUnknown, StoreUnavailable) as error:
        log.warning("dirty rate not measured, or not told", operation=grant.operation, error=str(error))


def _follow(hypervisor: Hypervisor, grant: NodeGrant, watch: Watch) -> MigrationResult:
    """Wait for the end of a job that an earlier worker began; libvirtd carries it on by itself."""
    watch.begin()
    while hypervisor.job(grant.uuid) is not None:
        watch.wait(_LOOK_EVERY_S)
    return MigrationResult(MigrationEnd.UNKNOWN, "the job that was taken over has ended")


def _explained(result: MigrationResult, why: str) -> MigrationResult:
    """Say why it was aborted, in place of the hypervisor's word that it was; any other word of it is kept."""
    if result.end is MigrationEnd.ABORTED:
        return MigrationResult(result.end, why)
    return MigrationResult(result.end, f"{why}; {result.message}")

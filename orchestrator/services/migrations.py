"""What the control plane makes of a live migration's figures: its time, its forecast, its progress, its outcome."""

import math
from datetime import datetime
from typing import Any

from orchestrator.planner.convergence import (
    completion_time,
    is_converging,
    measured,
    predict,
    sample_s,
    throttles,
)
from orchestrator.planner.preflight import copied_mib
from orchestrator.planner.progress import predicted, progress_percent, progressed, switched_over
from orchestrator.resources import Action, Grant, GrantState, SeenDomain, VirtualMachine, VirtualMachineOperation
from orchestrator.resources.vmop import POST_COPY_ANNOTATION, MigrationOutcome, Prediction
from orchestrator.services.context import put_transition
from orchestrator.settings import Settings
from orchestrator.store import Batch

_MIB = 2**20


def migration_terms(config: Settings, operation: VirtualMachineOperation, vm: VirtualMachine) -> dict[str, Any]:
    """Give the fields of a migration's grant that say how it is done, and how long it may take."""
    memory_mib, post_copy = vm.running_spec.memory_mib, _allows_post_copy(config, vm)
    time = completion_time(memory_mib, config.completion_timeout_per_gib, disks_mib=copied_mib(vm))
    return {
        "bandwidth_mib_s": config.bandwidth_mib_s,
        "auto_converge": throttles(vm.spec.live_migration_policy, operation.spec.force) is True,
        "post_copy": post_copy,
        "channels": 1 if post_copy else config.parallel_migration_channels,  # QEMU does not combine the two
        "completion_timeout_s": time.seconds,
        "progress_timeout_s": math.ceil(config.progress_timeout),
        "sample_s": sample_s(memory_mib, config.bandwidth_mib_s, config.dirty_rate_sample),
    }


def _allows_post_copy(config: Settings, vm: VirtualMachine) -> bool:
    """The VM's own word goes before the setting."""
    word = vm.metadata.annotations.get(POST_COPY_ANNOTATION, "").lower()
    return config.allow_post_copy if word not in {"true", "false"} else word == "true"


def foreseen(grant: Grant, vm: VirtualMachine, dirty_rate_mib_s: float | None = None) -> Prediction:
    """Foresee a migration that was granted."""
    return predict(vm.running_spec.memory_mib, dirty_rate_mib_s, grant.bandwidth_mib_s, disks_mib=copied_mib(vm))


def take_predicted(
    batch: Batch, operation: VirtualMachineOperation, vm: VirtualMachine, body: dict[str, Any], at: datetime
) -> None:
    """The guest's dirty rate was measured; its migration begins now. The operation has an open grant."""
    grant = operation.status.grant
    assert grant is not None  # noqa: S101 - the caller looked
    prediction = foreseen(grant, vm, float(body["dirty_rate_mib_s"]))
    put_transition(batch, operation, vm, predicted(operation, prediction, at), at)


def take_figures(
    batch: Batch, operation: VirtualMachineOperation, vm: VirtualMachine | None, job: dict[str, Any], at: datetime
) -> None:
    """The node told how far its migration is. The operation has an open grant."""
    grant = operation.status.grant
    assert grant is not None  # noqa: S101 - the caller looked
    percent = progress_percent(job["processed"], job["remaining"], job["total"], job["iteration"])
    converges = bool(job.get("post_copy")) or is_converging(
        stalled_s=job.get("stalled_ms", 0) / 1000, throttle_percent=job["throttle"], auto_converge=grant.auto_converge
    )
    transition = progressed(operation, percent, figures_text(job), at, outcome=outcome_of(job), converges=converges)
    if transition is not None:
        put_transition(batch, operation, vm, transition, at)


def switch_over(
    holder: VirtualMachineOperation, node: str, seen: SeenDomain, at: datetime
) -> VirtualMachineOperation | None:
    """The operation that says how far a switch-over is, where a host shows that; None when that is no news."""
    grant = holder.status.grant
    if grant is None or grant.action is not Action.MIGRATE or grant.state is not GrantState.RUNNING:
        return None
    is_suspended = node == grant.node and seen.state == "paused-migrated"
    is_resumed = node == grant.target and seen.state == "running" and seen.incarnation == grant.incarnation
    if not (is_suspended or is_resumed):
        return None
    transition = switched_over(holder, at_target=is_resumed, now=at)
    return transition.operation if transition is not None else None


def with_end(operation: VirtualMachineOperation, body: dict[str, Any]) -> VirtualMachineOperation:
    """Give the operation with what the report on its migration's end tells of it. It has an open grant."""
    job = body.get("job")
    outcome = measured(operation.status.outcome, outcome_of(job)) if job else operation.status.outcome
    return operation.with_status(outcome=outcome).with_grant(timed_out=bool(body.get("timed_out")))


def outcome_of(job: dict[str, Any]) -> MigrationOutcome:
    """Give what is known of a migration that runs."""
    return MigrationOutcome(
        duration_s=job["elapsed_ms"] / 1000,
        transferred_mib=job["processed"] // _MIB,
        iterations=job["iteration"],
        throttle_percent=job["throttle"],
        post_copy=bool(job.get("post_copy")),
    )


def figures_text(job: dict[str, Any]) -> str:
    """The figures as the platform writes them."""

    def mib(count: int) -> str:
        return f"{count / _MIB:.1f}MiB"

    return (
        f"TimeElapsed={job['elapsed_ms'] / 1000:.1f}s DataProcessed={mib(job['processed'])} "
        f"DataRemaining={mib(job['remaining'])} DataTotal={mib(job['total'])} Iteration={job['iteration']} "
        f"AutoConvergeThrottle={job['throttle']}%"
    )


def explain_deadline(config: Settings, grant: Grant, vm: VirtualMachine | None, body: dict[str, Any]) -> str:
    """Say, for one that did not complete in its time, how long that was, and why; to be put after its message."""
    if body.get("timed_out") != "completion":
        return ""
    if vm is not None:
        time = completion_time(vm.running_spec.memory_mib, config.completion_timeout_per_gib, disks_mib=copied_mib(vm))
        if time.seconds == grant.completion_timeout_s:
            return f" ({time})"
    return f" ({grant.completion_timeout_s} s)"  # the setting, or the VM's memory, is another now

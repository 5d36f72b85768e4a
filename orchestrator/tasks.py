"""The control plane's Celery tasks: decode, call one service, map the error.

`evict` and `migrate` may be called from anywhere that reaches Redis::

    from orchestrator.tasks import evict
    evict.delay("linux-vm").get(timeout=600)   # {"phase": "Completed", "node": "h2", ...}

Ticks tell Flower nothing: a tick each second would leave no room in its list for what people asked for. That they run
is in the metrics (`vmherd_task_ended_timestamp_seconds`).

The process-wide objects (store, the herd's copy in memory) are made at the first task, after any fork.
"""

import threading
from functools import cache
from typing import Any

from celery import Task as CeleryTask
from celery.exceptions import Ignore

from orchestrator.celery_app import CeleryMessenger, app
from orchestrator.errors import Conflict, RecoveryMode, StoreUnavailable, VmherdError
from orchestrator.logs import logger
from orchestrator.queues import CONTROL, FENCING, LIVENESS, Task
from orchestrator.resources import DEFAULT_NAMESPACE, OperationType
from orchestrator.resources.vmop import CELERY_TASK_ANNOTATION, MigrateTo
from orchestrator.services import capacity, rebalancing
from orchestrator.services.context import Context
from orchestrator.services.failover import recover_node
from orchestrator.services.fencing import Tools, default_tools, power_on_again, read_power, read_powers, run_fencing
from orchestrator.services.firmware import keep_firmware
from orchestrator.services.granting import grant_pending
from orchestrator.services.herd import Herd
from orchestrator.services.housekeeping import remove_old_events, remove_old_operations
from orchestrator.services.lookout import Lookout, look_at
from orchestrator.services.operations import create_operation, new_operation
from orchestrator.services.reconcile import reconcile as reconcile_round
from orchestrator.store import Store

log = logger(__name__)


@cache
def context() -> Context:
    """Give this process's store and messenger."""
    return Context(Store.open(), CeleryMessenger(app))


_herd_lock = threading.Lock()
_herds: list[Herd] = []
_grant_lock = threading.Lock()


def herd() -> Herd:
    """Give this process's copy of the herd."""
    with _herd_lock:
        if not _herds:
            _herds.append(Herd(context().store).start())
        return _herds[0]


lookout = Lookout(lambda: look_at(context(), herd()))
"""This process's; it begins with a liveness worker (`orchestrator.worker`), or at the first tick."""


@app.task(name=Task.GRANT.value, queue=CONTROL, send_events=False)
def grant() -> int:
    """Grant what may begin now."""
    try:
        with _grant_lock:  # one thread of this process at a time; other processes are held off by the commits
            return grant_pending(context(), herd())
    except StoreUnavailable as error:
        log.warning("grant: no store", error=str(error))
        return 0


@app.task(name=Task.RECONCILE.value, queue=CONTROL, send_events=False)
def reconcile() -> None:
    """Send again, ask again, settle what is suspect."""
    try:
        reconcile_round(context(), herd())
    except (StoreUnavailable, RecoveryMode) as error:
        log.warning("reconcile: no store", error=str(error))


@app.task(name=Task.HOUSEKEEPING.value, queue=CONTROL, send_events=False)
def housekeeping() -> int:
    """Remove what has had its time; look whether VMs run on outdated hypervisors."""
    try:
        keep_firmware(context(), herd())
        return remove_old_events(context()) + remove_old_operations(context())
    except StoreUnavailable as error:
        log.warning("housekeeping: no store", error=str(error))
        return 0


@app.task(name=Task.REBALANCE.value, queue=CONTROL, send_events=False)
def rebalance() -> int:
    """Move VMs to where they may be, and off nodes with too much reserved, if a scan is due."""
    try:
        return rebalancing.scan(context(), herd())
    except StoreUnavailable as error:
        log.warning("rebalance: no store", error=str(error))
        return 0


@app.task(name=Task.CAPACITY.value, queue=CONTROL, send_events=False)
def capacity_watch() -> int:
    """See which nodes the herd could not lose now."""
    try:
        return capacity.watch(context(), herd())
    except StoreUnavailable as error:
        log.warning("capacity: no store", error=str(error))
        return 0


@app.task(name=Task.LIVENESS.value, queue=LIVENESS, send_events=False)
def liveness() -> None:
    """See to it that this process looks at the leases, and at agents' signs of life, by itself."""
    lookout.begin()
    if (late_s := lookout.late_s()) > 0:
        log.warning("liveness: no look at the leases comes to its end", late_s=round(late_s))


@cache
def tools() -> Tools:
    """Give what reaches out of the herd from this process."""
    return default_tools()


@app.task(name=Task.FENCE.value, queue=FENCING)
def fence(node: str) -> str:
    """Seek evidence about a lost node."""
    try:
        return run_fencing(context(), tools(), node)
    except (StoreUnavailable, Conflict) as error:
        log.warning("fencing: tried again", node=node, error=str(error))
        return str(error)


@app.task(name=Task.FAILOVER.value, queue=FENCING)
def failover(node: str) -> bool:
    """Have the VMs of a fenced node started elsewhere."""
    try:
        return recover_node(context(), herd(), node)
    except (StoreUnavailable, RecoveryMode) as error:
        log.warning("failover left to reconcile", node=node, error=str(error))
        return False


@app.task(name=Task.POWER.value, queue=FENCING)
def power() -> int:
    """Have all BMCs read."""
    try:
        return read_powers(context())
    except StoreUnavailable as error:
        log.warning("power: no store", error=str(error))
        return 0


@app.task(name=Task.READ_POWER.value, queue=FENCING)
def read_one_power(node: str) -> str:
    """Read one BMC while its node lives."""
    try:
        return read_power(context(), tools(), node)
    except (StoreUnavailable, Conflict) as error:
        log.warning("power not read", node=node, error=str(error))
        return str(error)


@app.task(name=Task.POWER_ON.value, queue=FENCING)
def power_on(node: str) -> str:
    """Power a recovered node on again."""
    try:
        return power_on_again(context(), tools(), node)
    except (StoreUnavailable, Conflict) as error:
        log.warning("not powered on", node=node, error=str(error))
        return str(error)


def _enqueue(task: "CeleryTask[Any, Any]", vm: str, kind: OperationType, namespace: str, to: MigrateTo | None) -> None:
    annotations = {CELERY_TASK_ANNOTATION: task.request.id or ""}
    try:
        create_operation(context(), new_operation(vm, kind, namespace, to, annotations))
    except VmherdError as error:
        raise RuntimeError(str(error)) from None  # the caller of .get() sees one line, not our types
    raise Ignore  # the result is stored when the operation ends


@app.task(name=Task.EVICT.value, queue=CONTROL, bind=True, ignore_result=False)
def evict(self: "CeleryTask[Any, Any]", vm: str, namespace: str = DEFAULT_NAMESPACE) -> None:
    """Move a VM off its node; `.get()` gives the outcome when it has ended."""
    _enqueue(self, vm, OperationType.EVICT, namespace, None)


@app.task(name=Task.MIGRATE.value, queue=CONTROL, bind=True, ignore_result=False)
def migrate(
    self: "CeleryTask[Any, Any]",
    vm: str,
    node: str = "",
    namespace: str = DEFAULT_NAMESPACE,
    node_selector: dict[str, str] | None = None,
) -> None:
    """Move a VM to a node, or to one with these labels; `.get()` gives the outcome when it has ended."""
    to = MigrateTo(node_name=node, node_selector=node_selector or {})
    _enqueue(self, vm, OperationType.MIGRATE, namespace, to)

"""A node's Celery tasks. The worker's role (`migrate` or `lifecycle`) says which queue it consumes.

Connections to libvirt and Redis are made when the worker is up, never at import. Nothing here decides: each task looks
at the grant or order that its message names, in Redis, and acts only on what it finds there.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from celery.signals import setup_logging, worker_init

from orchestrator import logs, metrics
from orchestrator.celery_app import declare, make_app
from orchestrator.errors import HypervisorUnavailable, StoreUnavailable, VmherdError
from orchestrator.logs import logger
from orchestrator.queues import Task, lifecycle_queue, migrate_queue
from orchestrator.settings import settings
from orchestrator.store.node_store import NodeStore
from workers import holder as holders
from workers.adoption import run_adoption
from workers.hypervisor.drivers import open_hypervisor
from workers.hypervisor.port import Hypervisor
from workers.lifecycle import run_repair, run_start, run_stop
from workers.migration import run_migration

log = logger(__name__)

ROLE = settings().worker_role
app = make_app("vmherd-node", node=settings().node, role=ROLE)
declare(app, migrate_queue(settings().node) if ROLE == "migrate" else lifecycle_queue(settings().node))

_holder: list[str] = []


@setup_logging.connect
def _configure(**_: Any) -> None:
    logs.configure(ROLE)


@cache
def store() -> NodeStore:
    """Give this process's view of Redis."""
    return NodeStore.open()


@cache
def hypervisor() -> Hypervisor:
    """Give this process's hypervisor."""
    return open_hypervisor(settings())


@worker_init.connect
def _become_holder(**_: Any) -> None:
    try:
        _holder.append(holders.hold(ROLE))
    except VmherdError as error:
        raise SystemExit(f"vmherd: {error}") from None


@worker_init.connect
def _measure(**_: Any) -> None:
    metrics.watch_tasks()
    metrics.serve(ROLE)


@app.task(name=Task.NODE_MIGRATE.value)
def migrate(vm: str, operation: str, epoch: int) -> str:
    """Run one live migration."""
    return _mapped(vm, operation, lambda: run_migration(store(), hypervisor(), _holder[0], operation, epoch))


@app.task(name=Task.NODE_START.value)
def start(vm: str, operation: str, epoch: int) -> str:
    """Start one VM."""
    return _mapped(vm, operation, lambda: run_start(store(), hypervisor(), _holder[0], operation, epoch))


@app.task(name=Task.NODE_STOP.value)
def stop(vm: str, operation: str, epoch: int) -> str:
    """Stop one VM, or ask its guest to power off."""
    return _mapped(vm, operation, lambda: run_stop(store(), hypervisor(), _holder[0], operation, epoch))


@app.task(name=Task.NODE_SETTLE.value)
def settle(vm: str, order: str, kind: str) -> str:
    """Carry out one repair of a settlement."""
    del kind  # for people who read Flower's list, as the VM's name
    return _mapped(vm, order, lambda: run_repair(store(), hypervisor(), order))


@app.task(name=Task.NODE_ADOPT.value)
def adopt(vm: str, order: str, kind: str) -> str:
    """Change how one domain is defined: take it over, give it back, or remove what was defined behind our back."""
    del kind  # for people who read Flower's list, as the VM's name
    return _mapped(vm, order, lambda: run_adoption(store(), hypervisor(), order))


def _mapped(vm: str, operation: str, run: Callable[[], str]) -> str:
    """Run a service; what may pass by itself is logged and left to reconcile, which sends the message again."""
    with logs.about(vm=vm, operation=operation):
        try:
            return run()
        except (StoreUnavailable, HypervisorUnavailable) as error:
            log.warning("task left to reconcile", error=str(error))
            return f"left to reconcile: {error}"

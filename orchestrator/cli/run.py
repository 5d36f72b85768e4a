"""`vmherd run PROCESS`: each of the herd's processes, with the options that it must have.

Celery's own command is executed in place of this process, so that signals and exit codes are its own. Prefetch, gossip
and the like are set in `celery_app`; what only a command line can say stands here.
"""

import os
import sys
from typing import Annotated

import typer

from orchestrator import logs, metrics
from orchestrator.errors import Invalid
from orchestrator.queues import CONTROL, FENCING, LIVENESS, STARTS_PER_NODE, lifecycle_queue, migrate_queue
from orchestrator.resources.names import check_name
from orchestrator.settings import settings

run = typer.Typer(help="Run one of the herd's processes in the foreground.", no_args_is_help=True)

_QUIET = ("--without-gossip", "--without-mingle", "-E", "--loglevel", "WARNING")
_CONTROL_THREADS = 4
_FENCING_THREADS = 8
"""Each may wait for a BMC for as long as its timeout."""
_FLOWER_COLUMNS = "name,args,state,worker,received,started,runtime,result,uuid"
"""Of its list of tasks: `args` begins with the VM and the operation, and is not among its own defaults."""


def execute(*arguments: str) -> None:
    """Become a module's program."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", *arguments])  # noqa: S606 - no shell, our own arguments


def _control_worker(role: str, queue: str, threads: int) -> None:
    settings()  # a wrong setting is said here, in one line
    os.environ["VMHERD_WORKER_ROLE"] = role
    host = f"{role}@{os.uname().nodename}-{os.getpid()}"
    execute(
        "celery",
        "-A",
        "orchestrator.worker",
        "worker",
        "-Q",
        queue,
        "-n",
        host,
        "-P",
        "threads",
        "-c",
        str(threads),
        *_QUIET,
    )


@run.command(epilog="Example: vmherd run control")
def control() -> None:
    """Grant, reconcile, housekeeping. Run two or more."""
    _control_worker("control", CONTROL, _CONTROL_THREADS)


@run.command(epilog="Example: vmherd run liveness")
def liveness() -> None:
    """Watch the nodes' leases. Run two."""
    _control_worker("liveness", LIVENESS, 1)


@run.command(epilog="Example: vmherd run fencing")
def fencing() -> None:
    """Fence lost nodes. Run two."""
    _control_worker("fencing", FENCING, _FENCING_THREADS)


@run.command(epilog="Example: vmherd run intake")
def intake() -> None:
    """Take in the nodes' reports. Run two."""
    from orchestrator import intake as process  # noqa: PLC0415 - the other commands don't need it
    from orchestrator.celery_app import CeleryMessenger, app  # noqa: PLC0415
    from orchestrator.services.context import Context  # noqa: PLC0415
    from orchestrator.store import Store  # noqa: PLC0415

    logs.configure("intake")
    metrics.serve("intake")
    process.main(Context(Store.open(), CeleryMessenger(app)))


@run.command(epilog="Example: vmherd run beat")
def beat() -> None:
    """Send the periodic ticks. Run two: each tick is sent once."""
    settings()
    execute(
        "celery",
        "-A",
        "orchestrator.beat",
        "beat",
        "--scheduler",
        "orchestrator.beat:OnceScheduler",
        "--max-interval",
        "1",
        "--pidfile=",
        "--loglevel",
        "WARNING",
    )


@run.command(epilog="Example: VMHERD_FLOWER_PASSWORD_FILE=/etc/vmherd/flower vmherd run flower")
def flower() -> None:
    """Show queues, workers and tasks, read-only, on loopback, with a password."""
    config = settings()
    password = config.flower_password.get_secret_value()
    if config.flower_password_file is not None:
        password = config.flower_password_file.read_text().strip()
    if not password:
        raise Invalid("VMHERD_FLOWER_PASSWORD or VMHERD_FLOWER_PASSWORD_FILE is not set: Flower needs a password")
    os.environ["FLOWER_BASIC_AUTH"] = f"vmherd:{password}"  # not on the command line, which every user can read
    execute(
        "celery",
        "-A",
        "orchestrator.monitor",
        "flower",
        "--read_only",
        f"--address={config.flower_address}",
        f"--port={config.flower_port}",
        f"--tasks_columns={_FLOWER_COLUMNS}",
        "--enable_events",
        "--persistent=False",
    )


@run.command(epilog="Example: VMHERD_NODE=h1 vmherd run agent")
def agent() -> None:
    """On a node: register it, report its domains, answer questions."""
    check_node()
    execute("workers.agent")


@run.command(epilog="Example: VMHERD_NODE=h1 vmherd run heartbeat")
def heartbeat() -> None:
    """On a node: renew its lease, feed its watchdog, answer other nodes (docs/heartbeat.md)."""
    check_node()
    execute("workers.heartbeat")


@run.command(epilog="Example: VMHERD_NODE=control-1 vmherd run witness")
def witness() -> None:
    """On a machine without VMs: hold a lease and answer nodes, so that a small herd has a majority."""
    check_node()
    execute("workers.heartbeat", "witness")


@run.command(epilog="Example: VMHERD_NODE=h1 vmherd run worker migrate")
def worker(role: Annotated[str, typer.Argument(help="migrate (one slot) or lifecycle")]) -> None:
    """On a node: run migrations, or starts and repairs."""
    node = check_node()
    if role not in {"migrate", "lifecycle"}:
        raise Invalid(f"role: {role!r} is not migrate or lifecycle")
    os.environ["VMHERD_WORKER_ROLE"] = role
    execute("celery", *worker_arguments(node, role))


@run.command(name="host-shutdown", epilog="Example: VMHERD_NODE=h1 vmherd run host-shutdown")
def host_shutdown(
    over: Annotated[bool, typer.Option("--over", help="The host is up again: VMs may come.")] = False,
) -> None:
    """On a node that shuts down: wait until its VMs have left, and stop those that can't (vmherd-guests.service)."""
    check_node()
    execute("workers.shutdown", "end" if over else "begin")


def worker_arguments(node: str, role: str) -> tuple[str, ...]:
    """Give the arguments of Celery's command for a node's worker."""
    queue = migrate_queue(node) if role == "migrate" else lifecycle_queue(node)
    threads = 1 if role == "migrate" else STARTS_PER_NODE
    named = ("-Q", queue, "-n", f"{role}@{node}")
    return ("-A", "workers.tasks", "worker", *named, "-P", "threads", "-c", str(threads), *_QUIET)


def check_node() -> str:
    """Give the name of this node.

    Raises:
        Invalid: It is not set, or none.
    """
    node = settings().node
    if not node:
        raise Invalid("VMHERD_NODE is not set: the name under which this host joins the herd")
    try:
        return check_name(node)
    except ValueError as error:
        raise Invalid(f"VMHERD_NODE: {error}") from error

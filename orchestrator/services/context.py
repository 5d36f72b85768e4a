"""What every service works with, and the two habits that all share: decide again on a conflict, tell what happened."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from orchestrator.errors import Conflict, StoreUnavailable
from orchestrator.logs import logger
from orchestrator.planner.flow import Note, Transition
from orchestrator.planner.rounds import rest_s
from orchestrator.queues import CONTROL, Message, Messenger, Task, lifecycle_queue, migrate_queue
from orchestrator.resources import (
    Action,
    Grant,
    GrantState,
    Key,
    Resource,
    VirtualMachine,
    VirtualMachineOperation,
    event_about,
)
from orchestrator.resources.vmop import CELERY_TASK_ANNOTATION
from orchestrator.settings import Settings
from orchestrator.store import Batch, Store, keys
from orchestrator.store.connection import redis_errors

T = TypeVar("T")
log = logger(__name__)

_SUBJECTS = {
    "VirtualMachineOperation": "operation",
    "VirtualMachine": "vm",
    "Node": "node",
    "VirtualMachineClass": "class",
}
"""What a log line calls those that it is about."""
_ATTEMPTS = 20
_RESULT_AFTER_MS = 5_000


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Clock:
    """This machine's clocks; the tests' scenarios hand in simulated ones.

    Attributes:
        now: The time of day: for people, never for a decision over shared state (that is Redis's own time).
        monotonic: Seconds since some moment, never set back.
        sleep: Lets so many seconds pass.
    """

    now: Callable[[], datetime] = _utc_now
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True)
class Context:
    """The store, the way to send messages, the settings, and the clock."""

    store: Store
    messenger: Messenger
    clock: Clock = Clock()

    @property
    def config(self) -> Settings:
        """The settings of this process."""
        return self.store.config

    def now(self) -> datetime:
        """The time of day by this machine's clock; for people, never for a decision over shared state."""
        return self.clock.now()


def deciding(decide: Callable[[], T]) -> T:
    """Run load-decide-commit until no one else changed what it was decided from.

    Raises:
        Conflict: It lost the race 20 times.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            return decide()
        except Conflict:
            continue
    return decide()


def add_notes(batch: Batch, subjects: Iterable[Resource | None], notes: Iterable[Note], at: datetime) -> None:
    """Add an event for each note about each subject, and log it."""
    present = [subject for subject in subjects if subject is not None]
    for note in notes:
        for subject in present:
            batch.create(event_about(subject, note.reason, note.message, at, warning=note.warning))
        about = {_SUBJECTS.get(subject.kind_name, subject.kind_name): subject.key for subject in present}
        batch.tell(note.reason, warning=note.warning, message=note.message, **about)


def put_transition(
    batch: Batch, old: VirtualMachineOperation, old_vm: VirtualMachine | None, transition: Transition, at: datetime
) -> None:
    """Add an operation's transition to a batch: documents, events, and the timers that its grant needs."""
    new = transition.operation
    batch.put(old, new)
    if old_vm is not None and transition.vm is not None:
        batch.put(old_vm, transition.vm)
    add_notes(batch, (new, transition.vm or old_vm), transition.notes, at)
    if new.status.phase != old.status.phase:
        batch.tell("operation", operation=new.key, vm=new.vm_key, phase=f"{old.status.phase} => {new.status.phase}")
    if new.status.grant is None:
        batch.effect("ZREM", keys.DEADLINES, new.key)
        if new.is_active or CELERY_TASK_ANNOTATION not in new.metadata.annotations:
            batch.effect("ZREM", keys.AWAITING, new.key)
        else:  # its result is yet to be stored; reconcile sees to it if this process dies before
            batch.effect("DEADLINE", keys.AWAITING, new.key, _RESULT_AFTER_MS)


def put_timers(ctx: Context, batch: Batch, operation: VirtualMachineOperation) -> None:
    """Set when an open grant is next looked at: unreported, suspect, or unanswered."""
    grant = operation.status.grant
    if grant is None:
        return
    key = operation.key
    match grant.state:
        case GrantState.GRANTED:
            batch.effect("DEADLINE", keys.AWAITING, key, int(ctx.config.resend_after * 1000))
            batch.effect("DEADLINE", keys.DEADLINES, key, int(ctx.config.grant_ttl * 1000))
        case GrantState.RUNNING:
            batch.effect("ZREM", keys.AWAITING, key)
            batch.effect("DEADLINE", keys.DEADLINES, key, int(ctx.config.grant_ttl * 1000))
        case GrantState.ASKED:
            batch.effect("ZREM", keys.DEADLINES, key)
            batch.effect("DEADLINE", keys.AWAITING, key, grant.grace_s * 1000)
        case GrantState.SETTLING:
            batch.effect("ZREM", keys.DEADLINES, key)
            rest = rest_s(grant.settlement) if grant.settlement else 0
            batch.effect("DEADLINE", keys.AWAITING, key, int((rest or ctx.config.ask_again_after) * 1000))


def send_grant(ctx: Context, operation: VirtualMachineOperation) -> None:
    """Send the message that makes a node look at its grant. Sending it again does no harm.

    A start is not sent before a replica has its grant (TAKEOVER.md): after a failover that lost it, nobody would know
    that this node may start the VM. Reconcile sends it when one has.
    """
    grant = operation.status.grant
    if grant is None:
        return
    if grant.action is Action.START and not ctx.store.is_replicated():
        log.warning("a start waits: its grant is on too few replicas", operation=operation.key, node=grant.node)
        return
    task = {Action.MIGRATE: Task.NODE_MIGRATE, Action.START: Task.NODE_START, Action.STOP: Task.NODE_STOP}
    ctx.messenger.send(Message(task[grant.action], grant_queue(grant), (operation.vm_key, operation.key, grant.epoch)))


def grant_queue(grant: Grant) -> str:
    """Where the message for a grant goes."""
    return migrate_queue(grant.node) if grant.action is Action.MIGRATE else lifecycle_queue(grant.node)


def send_orders(ctx: Context, operation: VirtualMachineOperation) -> None:
    """Send the messages for repairs; agents are woken by the commit itself."""
    grant = operation.status.grant
    if grant is None or grant.settlement is None:
        return
    for node, order in grant.settlement.orders.items():
        if order.kind.changes_domain:
            ctx.messenger.send(
                Message(Task.NODE_SETTLE, lifecycle_queue(node), (operation.vm_key, order.id, order.kind.value))
            )


def wake_grant(ctx: Context) -> None:
    """Have the grant task look at what is pending. Wake-ups that come while one is on its way are one."""
    if ctx.store.is_dry:
        return  # the mark of a wake-up that is never sent would hold back the next one
    try:
        with redis_errors(ctx.store.redis):
            is_first = ctx.store.redis.set(keys.wanted("grant"), "1", nx=True, px=keys.WANTED_TTL_MS)
    except StoreUnavailable as error:
        log.warning("grant not woken; reconcile will", error=str(error))
        return
    if is_first:
        ctx.messenger.send(Message(Task.GRANT, CONTROL))


def load_pair(store: Store, key: str) -> tuple[VirtualMachineOperation | None, VirtualMachine | None]:
    """Read an operation and its VM; None for what is not there."""
    operation = store.find(VirtualMachineOperation, key)
    if operation is None:
        return None, None
    return operation, store.find(VirtualMachine, Key(operation.vm_key))

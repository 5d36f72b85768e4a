"""The audit log: who did what, when, and what came of it.

Each entry is one line of JSON, in a file or on standard output as `VMHERD_AUDIT_LOG` says: every change and every
refusal, and with `VMHERD_AUDIT_READS` every read. Changes are events too, so that `describe` and `get events` tell them
to people beside what the herd did about them.

Events are few by construction: none for reads, and none for what nobody known asked. What is repeated (a drain asks for
the same eviction every five seconds) is one event in ten minutes, and no token makes more than 60 a minute. The lines
have all of it.

Lines are written before the answer leaves, as far as the kernel; events by a thread of their own, so that no request
waits for Redis because of them. An event that can't be stored is logged and lost; the line is there. Neither holds a
body, a header or a token.
"""

import json
import os
import queue
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from orchestrator.api.rights import READ
from orchestrator.errors import Invalid, VmherdError
from orchestrator.logs import logger
from orchestrator.resources import DEFAULT_NAMESPACE, Event, ObjectMeta
from orchestrator.resources.event import EventSource, ObjectReference
from orchestrator.store import Store

log = logger(__name__)

STANDARD_OUTPUT: Final = "-"
_REPEATED_S: Final = 600.0
_REMEMBERED: Final = 4_096
_EVENTS_A_MINUTE: Final = 60
_WAITING_AT_MOST: Final = 1_000
_LONGEST_MESSAGE: Final = 1_024
_REFUSED_FROM: Final = 400
_TOO_MANY: Final = 429
_EVICTION: Final = "pods/eviction"

_KINDS: Final = {
    "virtualmachines": "VirtualMachine",
    "virtualmachineoperations": "VirtualMachineOperation",
    "virtualmachineclasses": "VirtualMachineClass",
    "nodes": "Node",
    "namespaces": "Namespace",
    "pods": "Pod",
    "events": "Event",
}
_DONE: Final = {
    "create": "created",
    "update": "updated",
    "patch": "changed",
    "delete": "deleted",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One request and what came of it; the attributes are `Access.audit`'s arguments."""

    at: datetime
    user: str
    role: str
    verb: str
    resource: str
    namespace: str
    name: str
    outcome: int
    message: str = ""
    source: str = ""
    dry_run: bool = False

    @property
    def is_read(self) -> bool:
        """Whether it changes nothing."""
        return self.verb in READ

    @property
    def is_under_way(self) -> bool:
        """Whether it is an eviction that was begun, and will be asked for again until it has ended."""
        return self.resource == _EVICTION and self.outcome == _TOO_MANY

    @property
    def was_refused(self) -> bool:
        """Whether it was not done."""
        return self.outcome >= _REFUSED_FROM and not self.is_under_way

    def line(self) -> str:
        """Give it as one line of JSON; empty fields are left out."""
        fields: dict[str, Any] = {
            "at": self.at.isoformat(timespec="milliseconds"),
            "user": self.user,
            "role": self.role,
            "verb": self.verb,
            "resource": self.resource,
            "namespace": self.namespace,
            "name": self.name,
            "outcome": self.outcome,
            "message": self.message[:_LONGEST_MESSAGE],
            "source": self.source,
            "dryRun": self.dry_run,
        }
        return json.dumps({key: value for key, value in fields.items() if value not in ("", False)})


class Audit:
    """Takes entries. Safe from several threads.

    Args:
        store: Where events go; None: there are none.
        path: A file that is appended to, `-` for standard output, or empty for no lines.
        reads: Whether reads are kept too.
        monotonic: Seconds, never set back.

    Raises:
        Invalid: The file can't be written.
    """

    def __init__(
        self,
        store: Store | None,
        path: str = "",
        *,
        reads: bool = False,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reads = reads
        self._file = _open(path)
        self._sieve = Sieve(monotonic)
        self._store = store
        self._waiting: queue.Queue[Event | None] = queue.Queue(_WAITING_AT_MOST)
        self._thread: threading.Thread | None = None
        if store is not None:
            self._thread = threading.Thread(target=self._write_events, name="audit", daemon=True)
            self._thread.start()

    def take(self, entry: Entry) -> None:
        """Keep an entry, where it is one to keep."""
        if entry.is_read and not entry.was_refused and not self._reads:
            return
        self._write_line(entry)
        if self._store is None or entry.is_read or not entry.user or entry.dry_run or not self._sieve.lets_pass(entry):
            return
        try:
            self._waiting.put_nowait(event_of(entry))
        except queue.Full:
            log.error("audit event lost: too many wait for Redis", entry=entry.line())

    def close(self) -> None:
        """Store the events that wait, and end."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
        if self._file is not None and self._file != sys.stdout.fileno():
            os.close(self._file)
            self._file = None

    def _write_line(self, entry: Entry) -> None:
        if self._file is None:
            return
        try:
            # One write of one line, appended: lines of several processes do not get into each other.
            os.write(self._file, (entry.line() + "\n").encode())
        except OSError as error:
            log.error("audit line lost", error=str(error), entry=entry.line())

    def _write_events(self) -> None:
        assert self._store is not None  # noqa: S101 - the thread is started with one only
        while (event := self._waiting.get()) is not None:
            try:
                self._store.must_commit(self._store.batch().create(event))
            except VmherdError as error:
                log.error("audit event lost", error=str(error), message=event.message)
            except Exception:  # the thread's entry point: later entries still count
                log.exception("audit event lost", message=event.message)


class Sieve:
    """Keeps events few: repeated ones, and those of a token that makes very many, do not pass."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._seen: OrderedDict[tuple[str, ...], float] = OrderedDict()
        self._made: dict[str, tuple[int, int]] = {}

    def lets_pass(self, entry: Entry) -> bool:
        """Whether an entry becomes an event."""
        now = self._monotonic()
        same = (entry.user, entry.verb, entry.resource, entry.namespace, entry.name, str(entry.outcome))
        with self._lock:
            last = self._seen.get(same)
            if last is not None and now - last < _REPEATED_S:
                return False
            minute = int(now // 60)
            began, count = self._made.get(entry.user, (minute, 0))
            count = count if began == minute else 0
            if count >= _EVENTS_A_MINUTE:
                return False
            self._made = {user: made for user, made in self._made.items() if made[0] == minute}
            self._made[entry.user] = (minute, count + 1)
            self._seen[same] = now
            self._seen.move_to_end(same)
            while len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
            return True


def event_of(entry: Entry) -> Event:
    """Make the event of an entry, about what was asked for."""
    plural, _, below = entry.resource.partition("/")
    kind = _KINDS.get(plural, plural)
    namespace = "" if plural == "namespaces" else entry.namespace
    what = f"{kind} {entry.name!r}" if entry.name else kind
    what += f" ({below})" if below else ""
    if entry.was_refused:
        done = f"was refused to {entry.verb} {what}: {entry.outcome} {entry.message}"
    elif entry.resource == _EVICTION:
        done = f"{'asked to evict' if entry.is_under_way else 'evicted'} {kind} {entry.name!r}"
    else:
        done = f"{_DONE.get(entry.verb, entry.verb)} {what}"
    return Event(
        metadata=ObjectMeta(
            name=f"{(entry.name or plural)[:45]}-{uuid4().hex[:16]}",
            namespace=namespace or DEFAULT_NAMESPACE,
            uid=str(uuid4()),
            creation_timestamp=entry.at,
        ),
        involved_object=ObjectReference(kind=kind, name=entry.name, namespace=namespace),
        reason="RequestRefused" if entry.was_refused else "RequestDone",
        message=f"{entry.user} ({entry.role}) {done}"[:_LONGEST_MESSAGE],
        type="Warning" if entry.was_refused else "Normal",
        first_timestamp=entry.at,
        last_timestamp=entry.at,
        source=EventSource(component="vmherd-api"),
    )


def _open(path: str) -> int | None:
    if not path:
        return None
    if path == STANDARD_OUTPUT:
        return sys.stdout.fileno()
    try:
        return os.open(Path(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Invalid(f"VMHERD_AUDIT_LOG: {path}: {error.strerror}") from error

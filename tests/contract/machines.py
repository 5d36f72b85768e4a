"""Machines of the hypervisor suites, and how tests start, watch and await what happens to them."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar
from uuid import uuid4

from tests.contract.hypervisor_hosts import BUSY_CAP_MIB_S, HostPair
from tests.waiting import wait_until
from workers.hypervisor.port import (
    Domain,
    DomainEvent,
    DomainState,
    EventKind,
    Hypervisor,
    Marker,
    MigrationRequest,
    MigrationResult,
)

T = TypeVar("T")

PROMPT_S: Final = 5.0
"""A call that "answers within seconds". libvirt's own waits that it must not fall into take 30 s or have no end."""
MARKER: Final = Marker(project="shop", name="web-1", incarnation=3, epoch=41)


@dataclass(frozen=True)
class Machine:
    """A name and a UUID that no other test uses."""

    name: str
    uuid: str


def new_machine() -> Machine:
    uuid = str(uuid4())
    return Machine(f"shop.vm-{uuid[:8]}", uuid)


def promptly(call: Callable[[], T]) -> T:
    """Return what `call` gives, and fail if it takes longer than a reading may."""
    return in_background(call).result(PROMPT_S)


def in_background(call: Callable[[], T]) -> "Future[T]":
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@contextmanager
def migration(
    pair: HostPair, machine: Machine, bandwidth_mib_s: int = BUSY_CAP_MIB_S, **options: Any
) -> "Iterator[Future[MigrationResult]]":
    """A migration in the background that has begun to send. At the end, it is waited for."""
    request = replace(MigrationRequest(machine.uuid, pair.target_uri, bandwidth_mib_s), **options)
    running = in_background(lambda: pair.source.migrate(request))
    wait_until(lambda: running.done() or sent(pair.source, machine) > 0, message="the migration to send")
    assert not running.done(), running.result()
    yield running
    running.result(60)


def sent(host: Hypervisor, machine: Machine) -> int:
    job = host.job(machine.uuid)
    return 0 if job is None else job.processed_bytes


def state(host: Hypervisor, machine: Machine) -> DomainState | None:
    domain = host.domain(machine.uuid)
    return None if domain is None else domain.state


def read(host: Hypervisor, machine: Machine) -> Domain:
    domain = host.domain(machine.uuid)
    assert domain is not None
    return domain


class Watcher:
    """Collects events."""

    def __init__(self, host: Hypervisor) -> None:
        self.events: list[DomainEvent] = []
        host.watch(self.events.append)

    def of(self, machine: Machine) -> list[tuple[EventKind, str]]:
        return [(event.kind, event.detail) for event in self.events if event.uuid == machine.uuid]

    def wait_for(self, kind: EventKind, machine: Machine | None = None) -> DomainEvent:
        uuid = "" if machine is None else machine.uuid

        def found() -> DomainEvent | None:
            return next((event for event in list(self.events) if (event.kind, event.uuid) == (kind, uuid)), None)

        event = wait_until(found, message=lambda: f"{kind} in {self.events}")
        assert event is not None
        return event

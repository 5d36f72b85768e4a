"""The agent's inventory: what it makes of events, with a hypervisor and a store that are made up."""

import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from orchestrator.errors import HypervisorUnavailable
from orchestrator.store.node_store import NodeStore
from tests.waiting import wait_until
from workers import clock
from workers.hypervisor.port import DomainEvent, EventKind, Host, Hypervisor
from workers.inventory import Inventory
from workers.preflight import Needs, Storage

HOST = Host("h1", "host-uuid", 8, 16_384, "qemu64", "8.0", "9.0")


class Daemon:
    """A hypervisor without domains, which answers or does not."""

    def __init__(self) -> None:
        self.answers = True

    def host(self) -> Host:
        if not self.answers:
            raise HypervisorUnavailable("connection refused")
        return HOST

    def domains(self) -> list[Any]:
        return []


class Reports:
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def counter(self) -> int:
        return len(self.kinds)

    def report(self, kind: str, _body: dict[str, Any], _request: str | None = None) -> int:
        self.kinds.append(kind)
        return len(self.kinds)


class Agent:
    """An inventory that runs, until the test ends."""

    def __init__(self) -> None:
        self.daemon, self.reports, self.stop = Daemon(), Reports(), threading.Event()
        store, hypervisor = cast("NodeStore", self.reports), cast("Hypervisor", self.daemon)
        needs = Needs(hypervisor, cast("Storage", None))  # asked about domains only, and there are none
        self.inventory = Inventory(store, hypervisor, {}, "g1", "b1", self.stop, needs)
        self._thread = threading.Thread(target=self.inventory.run)

    def __enter__(self) -> "Agent":
        self._thread.start()
        self.reported("Listing")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.inventory.note(DomainEvent(EventKind.RESYNC))
        self._thread.join()

    def reported(self, *kinds: str) -> None:
        wait_until(lambda: tuple(self.reports.kinds[: len(kinds)]) == kinds, 10, lambda: str(self.reports.kinds))


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time pass, for the inventory's decisions only."""
    real, ahead = clock.monotonic, [0.0]
    monkeypatch.setattr(clock, "monotonic", lambda: real() + ahead[0])
    return lambda seconds: ahead.__setitem__(0, ahead[0] + seconds)


def test_a_loss_that_is_old_news_is_not_told() -> None:
    """A daemon that hung is back, and has listed its domains; only then the broken connection is told of."""
    with Agent() as agent:
        agent.inventory.note(DomainEvent(EventKind.LOST))
        agent.reported("Listing", "Listing")
        assert "HypervisorLost" not in agent.reports.kinds


def test_a_daemon_that_is_gone_is_told_at_once() -> None:
    with Agent() as agent:
        agent.daemon.answers = False
        agent.inventory.note(DomainEvent(EventKind.LOST))
        agent.reported("Listing", "HypervisorLost")


def test_of_one_that_has_not_answered_for_long_the_loss_is_believed(later: Callable[[float], None]) -> None:
    with Agent() as agent:
        later(15)
        agent.inventory.note(DomainEvent(EventKind.LOST))
        agent.reported("Listing", "HypervisorLost")

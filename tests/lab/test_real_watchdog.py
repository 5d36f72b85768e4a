"""The product's heartbeat process on a real (virtual) machine with a hardware watchdog, which resets it or does not."""

from collections.abc import Iterator
from typing import cast

import pytest

from orchestrator.lease import Lease, Membership, read_lease
from orchestrator.store import access, keys
from tests.lab.watchdog_guest import WatchdogGuest
from tests.lab.watchdog_image import obstacles
from tests.redis_server import RedisServer
from tests.requirements import lacking
from tests.waiting import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]  # it boots twice; 15 s each on an idle machine

TIMES = {"VMHERD_LEASE_TTL": "6", "VMHERD_WATCHDOG_TIMEOUT": "3", "VMHERD_HEARTBEAT": "1"}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchdogGuest]:
    if missing := obstacles():
        lacking("the guest with a watchdog needs: " + "; ".join(missing))
    with WatchdogGuest(tmp_path_factory.mktemp("machine")) as guest:
        guest.reset_on_expiry(wanted=True)
        yield guest


@pytest.fixture
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    if server.is_running:
        server.kill()


@pytest.fixture
def guest(machine: WatchdogGuest, redis_server: RedisServer) -> WatchdogGuest:
    """The machine, its heartbeat running and its watchdog armed. Two more members, who never answer."""
    with redis_server.client() as client:
        access.enroll(client, "m1", "secret")
        members = Membership(1, {"m1": "10.0.2.15:7949", "m2": "192.0.2.2:7949", "m3": "192.0.2.3:7949"}, 3)
        client.set(keys.MEMBERSHIP, members.text())
    url = f"redis://{access.user_name('m1')}:secret@10.0.2.2:{redis_server.port}/0"
    machine.call("start", {"VMHERD_NODE": "m1", "VMHERD_REDIS_URL": url, **TIMES})
    wait_until(lambda: (found := lease(redis_server)) and found.armed, 60, lambda: f"armed: {machine.call('log')}")
    return machine


def lease(server: RedisServer) -> Lease | None:
    with server.client() as client:
        stored = read_lease(cast("str | None", client.get(keys.lease("m1"))))
    return stored.lease if stored is not None else None


def renewed_again(server: RedisServer, count: int) -> None:
    first = lease(server)
    assert first is not None
    wait_until(
        lambda: (now := lease(server)) is not None and now.sequence >= first.sequence + count, 60, "it is renewed"
    )


def test_a_planned_stop_is_no_reset(guest: WatchdogGuest, redis_server: RedisServer) -> None:
    before = guest.resets, guest.expired
    renewed_again(redis_server, 3)
    guest.call("signal", "SIGTERM")
    assert guest.call("wait") == 0
    found = lease(redis_server)
    assert found is not None
    assert not found.armed
    takeover_is_due(redis_server)
    assert (guest.resets, guest.expired) == before
    assert "watchdog is disarmed" in guest.call("log")


def test_frozen_the_machine_is_reset(guest: WatchdogGuest, redis_server: RedisServer) -> None:
    """On time: before its lease could be taken over."""
    found = lease(redis_server)
    assert found is not None
    assert found.watchdog.startswith("i6300ESB")
    assert found.timing.watchdog_timeout == 3
    before = guest.resets, guest.expired
    guest.call("signal", "SIGSTOP")
    takeover_is_due(redis_server)
    assert guest.expired == before[1] + 1
    assert guest.resets > before[0], "QEMU tells of one reset more than once"
    guest.wait_up()


def test_without_its_lease_it_is_reset(guest: WatchdogGuest, redis_server: RedisServer) -> None:
    """Redis is gone, and no peer answers: it may as well be this machine that is cut off."""
    before = guest.resets
    redis_server.kill()
    wait_until(lambda: guest.resets > before, 60, "it is reset")


def takeover_is_due(server: RedisServer) -> None:
    """Wait until the lease has been unchanged for T + M, when it could be taken over at the earliest."""
    found = lease(server)
    assert found is not None

    def is_due() -> bool:
        with server.client() as client:
            stored = read_lease(cast("str | None", client.get(keys.lease("m1"))))
            seconds, micros = client.time()
        assert stored is not None
        age = seconds + micros / 1e6 - stored.renewed_ms / 1000
        return bool(age > stored.lease.timing.lease_ttl + stored.lease.timing.margin)

    wait_until(is_due, 60, "its lease is out")

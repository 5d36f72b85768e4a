"""One suite for every `WatchdogDevice`: the lab's stand-in, and `LinuxWatchdog` on the i6300esb of a QEMU machine."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.lab.namespaces import LabError
from tests.lab.standin import StandIn, StandInDevice
from tests.lab.watchdog_guest import WatchdogGuest
from tests.lab.watchdog_image import obstacles
from tests.requirements import lacking
from tests.waiting import wait_until
from workers.watchdog import LinuxWatchdog, WatchdogFailed, find_watchdog

pytestmark = pytest.mark.timeout(240)  # the guest boots; 15 s on an idle machine
TIMEOUT_S = 2


class Rig(Protocol):
    """A watchdog, and what is seen of it from outside."""

    def open(self, timeout_s: int) -> tuple[str, int]: ...

    def feed(self) -> None: ...

    def disarm(self) -> None: ...

    def abandon(self) -> None: ...

    def open_twice(self) -> None: ...

    @property
    def expired(self) -> int: ...


class StandInRig:
    def __init__(self, path: Path) -> None:
        self._standin = StandIn(path, lambda: None)
        self._device = StandInDevice(path)

    def open(self, timeout_s: int) -> tuple[str, int]:
        armed = self._device.open(timeout_s)
        return armed.identity, armed.timeout_s

    def feed(self) -> None:
        self._device.feed()

    def disarm(self) -> None:
        self._device.disarm()

    def abandon(self) -> None:
        if self._device._socket is not None:
            self._device._socket.close()
        self._device = StandInDevice(self._standin.path)

    def open_twice(self) -> None:
        StandInDevice(self._standin.path).open(30)

    @property
    def expired(self) -> int:
        return self._standin.fired

    def close(self) -> None:
        self._standin.close()


class I6300esbRig:
    def __init__(self, guest: WatchdogGuest) -> None:
        self._guest = guest

    def open(self, timeout_s: int) -> tuple[str, int]:
        identity, actual = self._guest.call("open", timeout_s)
        return identity, actual

    def feed(self) -> None:
        self._call("feed")

    def disarm(self) -> None:
        self._call("disarm")

    def abandon(self) -> None:
        self._call("abandon")

    def open_twice(self) -> None:
        self._call("open_twice")

    def _call(self, name: str) -> None:
        try:
            self._guest.call(name)
        except LabError as error:
            raise WatchdogFailed(str(error)) from error

    @property
    def expired(self) -> int:
        return self._guest.expired


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchdogGuest]:
    if os.geteuid() != 0 or obstacles():
        lacking("the guest with a watchdog needs root, and: " + "; ".join(obstacles()))
    with WatchdogGuest(tmp_path_factory.mktemp("watchdog")) as guest:
        yield guest


@pytest.fixture(params=["stand-in", pytest.param("i6300esb", marks=pytest.mark.lab)])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    if request.param == "stand-in":
        standin = StandInRig(tmp_path / "w.sock")
        yield standin
        standin.close()
        return
    found = I6300esbRig(request.getfixturevalue("guest"))
    yield found
    # As the next test finds it: closed, and stopped. After an expiry QEMU's device counts no more.
    found.abandon()
    found.open(30)
    found.disarm()


def expires(rig: Rig, before: int) -> None:
    wait_until(lambda: rig.expired > before, 60, "the watchdog expires")


def test_it_gives_back_what_was_set(rig: Rig) -> None:
    identity, actual = rig.open(7)
    rig.disarm()
    assert actual == 7
    assert identity


def test_unfed_it_expires(rig: Rig) -> None:
    before = rig.expired
    rig.open(TIMEOUT_S)
    expires(rig, before)


def test_fed_it_does_not(rig: Rig) -> None:
    """Until it is fed no more; so the test would see it."""
    before = rig.expired
    rig.open(TIMEOUT_S)
    fed = 0

    def feed() -> bool:
        nonlocal fed
        rig.feed()
        fed += 1
        return fed > 3 * TIMEOUT_S / 0.25

    wait_until(feed, 60, "it was fed for long", interval=0.25)
    assert rig.expired == before
    expires(rig, before)


def test_a_process_that_dies_leaves_it_counting(rig: Rig) -> None:
    before = rig.expired
    rig.open(TIMEOUT_S)
    rig.abandon()
    expires(rig, before)


def test_the_next_process_takes_it_over(rig: Rig) -> None:
    before = rig.expired
    rig.open(TIMEOUT_S)
    rig.abandon()
    assert rig.open(60)[1] == 60
    rig.feed()
    rig.disarm()
    rig.open(TIMEOUT_S)
    expires(rig, before)
    assert rig.expired == before + 1


def test_disarmed_it_does_not_expire(rig: Rig) -> None:
    """What expires is the next one, which was opened after it."""
    before = rig.expired
    rig.open(TIMEOUT_S)
    rig.disarm()
    rig.open(3 * TIMEOUT_S)
    expires(rig, before)
    assert rig.expired == before + 1


def test_it_is_one_processs_at_a_time(rig: Rig) -> None:
    rig.open(30)
    with pytest.raises(WatchdogFailed, match="busy"):
        rig.open_twice()
    rig.disarm()


def test_what_is_closed_can_not_be_fed(rig: Rig) -> None:
    with pytest.raises(WatchdogFailed, match="not open"):
        rig.feed()


class TestFind:
    def test_auto_is_the_first_that_is_there(self, tmp_path: Path) -> None:
        assert find_watchdog("auto", tmp_path) is None
        (tmp_path / "watchdog").touch()
        assert find_watchdog("auto", tmp_path) == tmp_path / "watchdog"
        (tmp_path / "watchdog0").touch()
        assert find_watchdog("auto", tmp_path) == tmp_path / "watchdog0"
        assert find_watchdog("off", tmp_path) is None

    def test_a_path_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(WatchdogFailed, match="there is no"):
            find_watchdog(str(tmp_path / "watchdog9"))


class TestLinux:
    def test_one_that_could_not_be_disarmed_is_not_opened(self, tmp_path: Path) -> None:
        (tmp_path / "watchdog0").mkdir()
        (tmp_path / "watchdog0" / "nowayout").write_text("1\n")
        with pytest.raises(WatchdogFailed, match="nowayout"):
            LinuxWatchdog(Path("/dev/watchdog0"), tmp_path).open(10)

    def test_a_file_that_is_no_watchdog(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        device = LinuxWatchdog(tmp_path / "file")
        with pytest.raises(WatchdogFailed, match="Inappropriate ioctl"):
            device.open(10)
        with pytest.raises(WatchdogFailed, match="not open"):
            device.feed()

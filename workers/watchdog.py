"""A host's watchdog: hardware, or the kernel's softdog, that resets the host when it is not fed in time.

Opening a Linux watchdog starts it, with whatever timeout its driver had; closed, it goes on counting, unless the letter
V was written before (magic close). So whoever opens one decides that the host may be reset, and `heart` decides that.
"""

import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from orchestrator.errors import VmherdError

# linux/watchdog.h: _IOR('W', n, int or struct watchdog_info), _IOWR('W', 6, int).
_GETSUPPORT: Final = 0x80285700
_KEEPALIVE: Final = 0x80045705
_SETTIMEOUT: Final = 0xC0045706
_GETTIMEOUT: Final = 0x80045707
_INFO: Final = struct.Struct("II32s")
_INT: Final = struct.Struct("i")
_CAN_SET_TIMEOUT: Final = 0x0080
_CAN_MAGIC_CLOSE: Final = 0x0100
_DEVICES: Final = ("watchdog0", "watchdog")
_SYSFS: Final = Path("/sys/class/watchdog")


class WatchdogFailed(VmherdError):
    """The watchdog can't be used; it does not count, or only until the host is reset by it."""

    reason = "WatchdogFailed"


@dataclass(frozen=True, slots=True)
class Armed:
    """A watchdog that counts.

    Attributes:
        identity: What its driver calls itself.
        timeout_s: As the driver gives it back, after it was set.
    """

    identity: str
    timeout_s: int


class WatchdogDevice(Protocol):
    """A watchdog. It is opened and closed any number of times; one process has it at a time."""

    def open(self, timeout_s: int) -> Armed:
        """Start it, and set its timeout. It is fed by that.

        Raises:
            WatchdogFailed: It is not there, in use, or can't be disarmed later. It does not count then.
        """
        ...

    def feed(self) -> None:
        """Let it begin to count anew.

        Raises:
            WatchdogFailed: It did not take it.
        """
        ...

    def disarm(self) -> None:
        """Stop it. Nothing happens when it is not open.

        Raises:
            WatchdogFailed: It counts on.
        """
        ...


class LinuxWatchdog:
    """`/dev/watchdog*`.

    Args:
        path: Of the device.
        sysfs: Where the kernel describes watchdogs.
    """

    def __init__(self, path: Path, sysfs: Path = _SYSFS) -> None:
        self.path = path
        self._sysfs = sysfs
        self._descriptor: int | None = None

    def open(self, timeout_s: int) -> Armed:
        """Open the device; see `WatchdogDevice`."""
        if self._descriptor is not None:
            raise WatchdogFailed(f"{self.path} is open already")
        if self._is_nowayout():
            raise WatchdogFailed(
                f"{self.path} can't be disarmed once it is armed (nowayout): a stop would reset this host"
            )
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise WatchdogFailed(f"{self.path}: {error.strerror}") from error
        try:
            armed = self._set_up(descriptor, timeout_s)
        except BaseException:
            _close(descriptor)
            raise
        self._descriptor = descriptor
        return armed

    def _set_up(self, descriptor: int, timeout_s: int) -> Armed:
        try:
            options, _, identity = _INFO.unpack(fcntl.ioctl(descriptor, _GETSUPPORT, bytes(_INFO.size)))
            needed = ((_CAN_SET_TIMEOUT, "set its timeout"), (_CAN_MAGIC_CLOSE, "be disarmed"))
            if missing := [what for flag, what in needed if not options & flag]:
                raise WatchdogFailed(f"{self.path}: its driver can't {' or '.join(missing)}")
            fcntl.ioctl(descriptor, _SETTIMEOUT, _INT.pack(timeout_s))
            (actual,) = _INT.unpack(fcntl.ioctl(descriptor, _GETTIMEOUT, bytes(_INT.size)))
        except OSError as error:
            raise WatchdogFailed(f"{self.path}: {error.strerror}") from error
        return Armed(identity.partition(b"\0")[0].decode(errors="replace"), actual)

    def feed(self) -> None:
        """Feed it; see `WatchdogDevice`."""
        if self._descriptor is None:
            raise WatchdogFailed(f"{self.path} is not open")
        try:
            fcntl.ioctl(self._descriptor, _KEEPALIVE, bytes(_INT.size))
        except OSError as error:
            raise WatchdogFailed(f"{self.path}: {error.strerror}") from error

    def disarm(self) -> None:
        """Stop it; see `WatchdogDevice`."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            os.write(descriptor, b"V")
        except OSError as error:
            raise WatchdogFailed(f"{self.path}: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def _is_nowayout(self) -> bool:
        name = "watchdog0" if self.path.name == "watchdog" else self.path.name
        try:
            return (self._sysfs / name / "nowayout").read_text().strip() == "1"
        except OSError:
            return False  # a kernel that does not tell: magic close is asked for below


def _close(descriptor: int) -> None:
    """Close a device that was just opened, so that it stops."""
    try:
        os.write(descriptor, b"V")
    finally:
        os.close(descriptor)


def find_watchdog(setting: str, devices: Path = Path("/dev")) -> Path | None:
    """Find the device that `VMHERD_WATCHDOG` means.

    Args:
        setting: `auto`, `off`, or a path.
        devices: Where devices are.

    Returns:
        None: there is none, or none is wanted.

    Raises:
        WatchdogFailed: A path is set, and there is no device.
    """
    if setting == "off":
        return None
    if setting != "auto":
        if not Path(setting).exists():
            raise WatchdogFailed(
                f"VMHERD_WATCHDOG: there is no {setting}; is its driver loaded (modprobe i6300esb, softdog)?"
            )
        return Path(setting)
    return next((devices / name for name in _DEVICES if (devices / name).exists()), None)

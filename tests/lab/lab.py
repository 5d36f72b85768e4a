"""The lab as a whole: hosts, guests, Redis, and an end that leaves nothing.

    with Lab(hosts=3, name="demo") as lab:
        guest = lab.guest("linux-vm", address="192.0.2.101")
        lab.hosts[0].connect().createXML(guest.xml)
        guest.wait_up()

What is where is said in `network` (namespaces and addresses), `host`, `guest`, `recorder` and `cleanup`.
"""

import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.lab.cleanup import LABS, owner_of, started_at, tear_down, write_owner
from tests.lab.guest import Guest, GuestSpec, describe
from tests.lab.host import LabHost
from tests.lab.image import missing_tools
from tests.lab.namespaces import REPOSITORY, LabError, Namespace, checked_name
from tests.lab.network import CONTROL_ADDRESS, Network
from tests.lab.reaper import reap_qemus
from tests.lab.recorder import Recorder
from tests.lab.redis_server import RedisServer
from tests.lab.sampler import Sampler
from tests.lab.supervised import Supervised
from tests.requirements import lacking

_TOOLS = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
    "libvirtd": "libvirt-daemon-system",
    "virtlogd": "libvirt-daemon-system",
    "qemu-system-x86_64": "qemu-system-x86",
    "redis-server": "redis-server",
    "bash": "bash",
}
# The first address of hosts; the control plane has 192.0.2.1, guests have whatever a test gives them from .100 on.
_FIRST_HOST = 11
_MOST_HOSTS = 80


def obstacles() -> list[str]:
    """Return what keeps a lab from working on this machine, each as text for a person; empty if nothing does."""
    found = [] if os.geteuid() == 0 else ["must be root"]
    found += [f"{tool} is missing (package {package})" for tool, package in _TOOLS.items() if not shutil.which(tool)]
    found += [f"{tool} is missing" for tool in missing_tools()]
    if importlib.util.find_spec("libvirt") is None:
        found.append("the Python module libvirt is missing (package libvirt-python)")
    if not Path("/dev/net/tun").exists():
        found.append("/dev/net/tun is missing")
    return found


def require_lab() -> None:
    """Skip the calling test where there can be no lab, and say why; in CI fail it instead."""
    if found := obstacles():
        lacking("no lab here: " + "; ".join(found))


class Lab:
    """Several libvirt hosts, a control plane's namespace and a switch between them.

    Labs of different names may run at the same time; they don't see each other. A name whose lab crashed is cleaned
    up first; one in use is refused. When this process ends, in whatever way, a watchdog removes the lab.

    Args:
        hosts: How many hosts, called h1, h2 ...
        name: The lab's name, a DNS label of at most 16 characters; by default one of this process's own.
        names: The hosts' names instead, at most 15 characters each.

    Attributes:
        name: The lab's name.
        directory: The folder of all that the lab writes, at the same path on every host.
        control: Where the control plane runs, 192.0.2.1.
        hosts: The hosts, 192.0.2.11 and on.
    """

    def __init__(self, hosts: int = 3, name: str | None = None, *, names: Sequence[str] | None = None) -> None:
        self.name = checked_name(name or f"lab{os.getpid()}", longest=16)
        self.directory = LABS / self.name
        self.logs = self.directory / "logs"
        self._network = Network(self.name, self.logs)
        self.switch = self._network.switch
        members = list(names) if names is not None else [f"h{number}" for number in range(1, hosts + 1)]
        if len(members) > _MOST_HOSTS:
            raise ValueError(f"{len(members)} hosts; the addresses are for {_MOST_HOSTS}")
        self.hosts = [
            LabHost(
                self.name,
                member,
                f"192.0.2.{_FIRST_HOST + index}",
                directory=self.directory,
                network=self._network,
                logs=self.logs,
            )
            for index, member in enumerate(members)
        ]
        self._control: Namespace | None = None
        self._watchdog: subprocess.Popen[str] | None = None
        self._recorder: Recorder | None = None
        self._supervised: list[Supervised] = []

    def __enter__(self) -> Self:
        return self.up()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def __repr__(self) -> str:
        return f"Lab({self.name})"

    def up(self) -> Self:
        """Bring the lab up; returns when each host's libvirtd answers.

        Raises:
            LabError: It can't be, or another living process owns a lab of this name. Nothing is left then.
        """
        owner = owner_of(self.name)
        if owner is not None:
            raise LabError(f"process {owner} (this is {os.getpid()}) has a lab {self.name}; take another name, or wait")
        tear_down(self.name)
        try:
            self._bring_up()
        except BaseException:
            self.down()
            raise
        return self

    def _bring_up(self) -> None:
        for folder in ("logs", "console", "disks", "qmp"):
            (self.directory / folder).mkdir(parents=True)
        write_owner(self.name)
        reap_qemus()
        self._watchdog = self._start_watchdog()
        self._network.up()
        self._recorder = Recorder(self.switch, self.directory)
        self._control = self._network.member("control", CONTROL_ADDRESS)
        names = {"control": CONTROL_ADDRESS, **{host.name: host.address for host in self.hosts}}
        for host in self.hosts:
            host.install(names)
        with ThreadPoolExecutor(max_workers=8) as pool:
            # list(): to have the first host's exception raised here.
            list(pool.map(LabHost.boot, self.hosts))

    def down(self) -> None:
        """Remove the lab and all that ran in it; safe to call twice, and on a lab that came up by half."""
        for supervised in self._supervised:
            supervised.hold()  # else it would start anew what the teardown kills
        tear_down(self.name)
        for supervised in self._supervised:
            supervised.stop()
        self._supervised.clear()
        for host in self.hosts:
            host.reap()
        if self._recorder is not None:
            self._recorder.reap()
        if self._watchdog is not None:
            # Last, so that it takes over if we are killed on the way here.
            self._watchdog.terminate()
            self._watchdog.wait()
            self._watchdog = None

    @property
    def control(self) -> Namespace:
        """The control plane's namespace."""
        if self._control is None:
            raise LabError(f"lab {self.name} is not up")
        return self._control

    @property
    def recorder(self) -> Recorder:
        """The record of what each QEMU of the lab did; see `observer`."""
        if self._recorder is None:
            raise LabError(f"lab {self.name} is not up")
        return self._recorder

    def host(self, name: str) -> LabHost:
        """Return the host of that name."""
        return next(host for host in self.hosts if host.name == name)

    def guest(
        self,
        name: str,
        *,
        address: str,
        namespace: str = "default",
        memory_mib: int = 192,
        vcpus: int = 1,
        dirty_mib_s: int = 0,
        working_set_mib: int = 32,
        acpi: bool = False,
        agent: str = "",
        disk_mib: int = 0,
    ) -> Guest:
        """Describe a Linux guest; it is not started. It boots in some seconds and serves its state by HTTP.

        Args:
            name: The VM's name; the domain is called `namespace.name`.
            address: Its address, of 192.0.2.0/24 and not a host's.
            namespace: The VM's namespace.
            memory_mib: Its memory, 128 or more; some 60 of that are its own, besides the working set.
            vcpus: Its virtual CPUs.
            dirty_mib_s: How much memory it rewrites per second.
            working_set_mib: The memory that it rewrites, round and round.
            acpi: Whether it heeds the power button (libvirt's `shutdown()`).
            agent: Its guest agent: one that "works" (it tells addresses and powers off) or "hangs"; "" for none.
            disk_mib: Size of a raw disk to which it writes its ticks too, in the lab's folder; 0 for none.
        """
        disk = None
        if disk_mib:
            disk = self.directory / "disks" / f"{namespace}.{name}.raw"
            with disk.open("wb") as file:
                file.truncate(disk_mib * 2**20)
        spec = GuestSpec(
            name, namespace, address, memory_mib, vcpus, dirty_mib_s, working_set_mib, acpi=acpi, agent=agent
        )
        return describe(spec, lab=self.name, directory=self.directory, control=self.control, disk=disk)

    def blank(self, name: str, *, namespace: str = "default", memory_mib: int = 16) -> Guest:
        """Describe a machine with nothing to boot, which idles in its firmware: cheap, for tests that need many."""
        spec = GuestSpec(name, namespace, "", memory_mib, boots=False)
        return describe(spec, lab=self.name, directory=self.directory, control=self.control)

    def start_redis(self, name: str = "redis", *, port: int = 6379, password: str | None = None) -> RedisServer:
        """Start a Redis server in the control plane's namespace; with a random password by default."""
        server = RedisServer(
            self.control, self.directory / name, name=name, port=port, password=password or secrets.token_hex(8)
        )
        server.start()
        return server

    def sampler(self, guest: Guest, *, interval_s: float = 0.01) -> Sampler:
        """Start to ping a guest from the control plane; its `stop()` tells the longest gap."""
        return Sampler(self.control, guest.address, interval_s=interval_s)

    def supervise(self, popen_factory: Callable[[], "subprocess.Popen[bytes]"], name: str) -> Supervised:
        """Start a supervised process that is stopped with the lab at the latest."""
        supervised = Supervised(popen_factory, name)
        self._supervised.append(supervised)
        return supervised

    def _start_watchdog(self) -> "subprocess.Popen[str]":
        watchdog = subprocess.Popen(
            [sys.executable, "-m", "tests.lab.watchdog", self.name, str(os.getpid()), str(started_at(os.getpid()))],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert watchdog.stdout is not None
        with watchdog.stdout:
            if watchdog.stdout.readline() != "watching\n":
                raise LabError("the watchdog does not start")
        return watchdog

"""One libvirt host of the lab: namespaces, a libvirtd in them, and the ways in which a host can fail.

A host is on or off. On, it has an anchor process that holds its mount and UTS namespaces; `files/host-boot.sh` says
what they look like. A power cut ends every process, so the namespaces are made anew when it is switched on again, with
an empty `/run` and a new boot id, as on a real machine; what is in `/etc/libvirt` and `/var` stays.
"""

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any, Self

import libvirt

from tests.lab.cleanup import command_line, freeze, process_state, processes
from tests.lab.image import daemon, libvirt_cache
from tests.lab.namespaces import FILES, LabError, Namespace, Place, checked_name
from tests.lab.network import Network, accept_from, drop_from

_FOLDERS = ("run", "etc/libvirt", "var/lib/libvirt", "var/log/libvirt")

# Keepalive 1 s x 3, on both sides of a migration: a cut shows after 3 to 5 s, by default after 26 to 30 s.
_LIBVIRTD_CONF = """\
listen_tls = 0
listen_tcp = 1
auth_tcp = "none"
auth_unix_ro = "none"
auth_unix_rw = "none"
host_uuid = "{uuid}"
keepalive_interval = 1
keepalive_count = 3
log_outputs = "3:stderr"
"""
_QEMU_CONF = """\
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
migration_host = "{address}"
keepalive_interval = 1
keepalive_count = 3
"""


class LabHost(Place):
    """A libvirt host. Made by `Lab`, which also boots it.

    Attributes:
        name: Its host name.
        address: Its IPv4 address.
        uuid: The UUID by which its libvirtd knows itself.
        migration_uri: Where other hosts' libvirtd send migrations to.
        libvirt_uri: Its libvirtd, from outside of the lab's namespaces.
        directory: Its own folders: what it sees as /run, /etc/libvirt, /var/lib/libvirt and so on.
    """

    def __init__(self, lab: str, name: str, address: str, *, directory: Path, network: Network, logs: Path) -> None:
        super().__init__(logs)
        self.name = checked_name(name, longest=15)
        self.address = address
        self.uuid = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.{lab}.lab.vmherd.example"))
        self.directory = directory / name
        self.migration_uri = f"qemu+tcp://{address}/system"
        self.libvirt_uri = f"qemu:///system?socket={self.directory}/run/libvirt/libvirt-sock"
        self._lab_directory = directory
        self._network = network
        self._blocked: set[str] = set()
        self._anchor: subprocess.Popen[bytes] | None = None
        self._space: Namespace | None = None
        self.libvirtd: subprocess.Popen[bytes] | None = None
        self._helpers: list[subprocess.Popen[bytes]] = []

    def __repr__(self) -> str:
        return f"LabHost({self.name})"

    # --- life -----------------------------------------------------------------------------------------------------

    def install(self, names: dict[str, str]) -> None:
        """Write the host's folders and configuration.

        Args:
            names: Names of all lab members to their addresses, for /etc/hosts.
        """
        for folder in _FOLDERS:
            (self.directory / folder).mkdir(parents=True)
        (self.directory / "proc/sys/kernel/random").mkdir(parents=True)
        etc = self.directory / "etc"
        shutil.copytree("/etc/libvirt", etc / "libvirt", dirs_exist_ok=True, symlinks=True)
        # The default network wants dnsmasq, and nobody here uses network filters.
        for unwanted in ("qemu/networks", "nwfilter"):
            shutil.rmtree(etc / "libvirt" / unwanted, ignore_errors=True)
        (etc / "libvirt/libvirtd.conf").write_text(_LIBVIRTD_CONF.format(uuid=self.uuid))
        (etc / "libvirt/qemu.conf").write_text(_QEMU_CONF.format(address=self.address))
        (etc / "libvirt/hooks").mkdir(exist_ok=True)
        hook = (FILES / "qemu-hook.sh").read_text().replace("@HOST@", self.name)
        hook_file = etc / "libvirt/hooks/qemu"
        hook_file.write_text(hook.replace("@LOG@", str(self._hook_log)))
        hook_file.chmod(0o755)
        lines = [f"{address} {name}" for name, address in names.items()]
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(lines) + "\n")
        (etc / "hostname").write_text(f"{self.name}\n")
        (etc / "machine-id").write_text(self.uuid.replace("-", "") + "\n")
        (etc / "resolv.conf").write_text("options attempts:1 timeout:1\n")

    def boot(self, timeout: float = 30.0) -> None:
        """Make the host's namespaces and start its daemons; returns when libvirtd answers.

        Raises:
            LabError: It did not come up; the message holds the end of the log.
        """
        boot_id = self.directory / "proc/sys/kernel/random/boot_id"
        boot_id.write_text(f"{uuid.uuid4()}\n")
        (self.directory / self._lab_directory.relative_to("/")).mkdir(parents=True)
        (self.directory / "run/lock").mkdir()
        self._space = self._network.host(self.name, self.address)
        for address in self._blocked:
            drop_from(self._space, address)
        self._anchor = self._start_anchor(timeout)
        self._helpers = [self._anchor, self.popen([str(daemon("virtlogd"))], log=f"{self.name}-virtlogd")]
        self.start_libvirtd(timeout=timeout)

    def _start_anchor(self, timeout: float) -> subprocess.Popen[bytes]:
        assert self._space is not None
        unshare = ["unshare", "--mount", "--uts", "--propagation", "private"]
        script = ["sh", str(FILES / "host-boot.sh"), str(self._lab_directory), self.name, str(libvirt_cache())]
        # `ip netns exec`, as it mounts a /sys that shows the namespace's interfaces, which libvirt reads.
        argv = ["ip", "netns", "exec", self._space.name, *unshare, *script]
        log = self._open_log(f"{self.name}-boot")
        try:
            anchor = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        finally:
            os.close(log)
        assert anchor.stdout is not None
        with anchor.stdout, selectors.DefaultSelector() as selector:
            selector.register(anchor.stdout, selectors.EVENT_READ)
            if not selector.select(timeout) or anchor.stdout.readline() != b"ready\n":
                anchor.kill()
                anchor.wait()
                raise LabError(f"{self.name} does not boot: {self._log_end('boot')}")
        return anchor

    def power_cut(self) -> None:
        """Take the host's power: every process dies at once, and nothing of that is heard on the network.

        The cable goes first, as a real host's last act is not to close its connections one by one.
        """
        self._network.cut(self.name, silent=False)
        self._anchor = None  # from now on `popen` refuses, so nothing new appears while we kill
        deadline = time.monotonic() + 10
        while found := self.processes():
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise LabError(f"{self.name}: these survive SIGKILL: {found}")
            time.sleep(0.005)
        self.reap()

    def power_on(self, timeout: float = 30.0) -> None:
        """Boot the host after a power cut: an empty /run, a new boot id, no processes but its daemons."""
        if self.is_on:
            raise LabError(f"{self.name} is on")
        self._network.remove(self.name)
        shutil.rmtree(self.directory / "run")
        (self.directory / "run").mkdir()
        self.boot(timeout)

    @property
    def is_on(self) -> bool:
        """Whether the host has power."""
        return self._anchor is not None

    @property
    def boot_id(self) -> str:
        """The host's boot id, new with each boot, as its processes see it in /proc."""
        return (self.directory / "proc/sys/kernel/random/boot_id").read_text().strip()

    def reap(self) -> None:
        """Collect the exit codes of the host's dead daemons."""
        for process in (self.libvirtd, *self._helpers):
            if process is not None and process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)

    def processes(self) -> dict[int, str]:
        """Return the host's processes, process id to command line, by their network namespace."""
        if self._space is None:
            return {}
        inode = self._space.path.stat().st_ino
        found = {}
        for process in processes():
            with contextlib.suppress(OSError):  # it is gone, or a zombie, which has no namespaces
                if (process / "ns/net").stat().st_ino == inode:
                    found[int(process.name)] = command_line(int(process.name))
        return found

    # --- libvirtd -------------------------------------------------------------------------------------------------

    def start_libvirtd(self, *, wait: bool = True, timeout: float = 30.0) -> None:
        """Start libvirtd (it must not be running)."""
        if self.libvirtd is not None and self.libvirtd.poll() is None:
            raise LabError(f"{self.name}: libvirtd is running")
        self.libvirtd = self.spawn_libvirtd()
        if wait:
            self.wait_libvirtd(timeout)

    def spawn_libvirtd(self) -> subprocess.Popen[bytes]:
        """Start a libvirtd that the caller looks after (for `Supervised`)."""
        return self.popen([str(daemon("libvirtd")), "--listen"], log=f"{self.name}-libvirtd")

    def wait_libvirtd(self, timeout: float = 30.0) -> None:
        """Return when libvirtd answers.

        Raises:
            LabError: It does not in `timeout` seconds, or it has exited.
        """
        deadline = time.monotonic() + timeout
        while not self.libvirtd_answers():
            dead = self.libvirtd is not None and self.libvirtd.poll() is not None
            if dead or time.monotonic() > deadline:
                fate = "exited" if dead else "is silent"
                raise LabError(f"{self.name}: libvirtd {fate}: {self._log_end('libvirtd')}")
            time.sleep(0.02)

    def libvirtd_answers(self) -> bool:
        """Return whether libvirtd accepts a connection and answers a call."""
        # What libvirt would do badly: print its error on our terminal, and wait for ever for a frozen process.
        if not self.has_socket() or self.libvirtd_is_paused:
            return False
        try:
            self.connect().close()
        except libvirt.libvirtError:
            return False
        return True

    def has_socket(self) -> bool:
        """Return whether something listens on libvirtd's socket."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.directory / "run/libvirt/libvirt-sock"))
            except OSError:
                return False
        return True

    def kill_libvirtd(self, number: int = signal.SIGKILL) -> None:
        """Send libvirtd a signal, and wait for its end if that is one that ends it. Guests run on."""
        if self.libvirtd is None:
            raise LabError(f"{self.name}: no libvirtd was started")
        self.libvirtd.send_signal(number)
        if number not in (signal.SIGSTOP, signal.SIGCONT, signal.SIGHUP):
            self.libvirtd.wait(20)

    def pause_libvirtd(self) -> None:
        """Freeze libvirtd (SIGSTOP): connections stay open, and calls of any client hang."""
        if self.libvirtd is None:
            raise LabError(f"{self.name}: no libvirtd was started")
        freeze(self.libvirtd.pid)

    def resume_libvirtd(self) -> None:
        """Let it go on (SIGCONT)."""
        self.kill_libvirtd(signal.SIGCONT)

    @property
    def libvirtd_is_paused(self) -> bool:
        """Whether libvirtd is frozen."""
        return self.libvirtd is not None and process_state(self.libvirtd.pid) == "T"

    def connect(self) -> Any:
        """Return a libvirt connection (`libvirt.virConnect`) to this host, from outside of the namespaces."""
        return libvirt.open(self.libvirt_uri)

    # --- faults ---------------------------------------------------------------------------------------------------

    def cut_link(self, *, silent: bool = False) -> None:
        """Cut the host's cable. `silent`: it loses everything but the host's link stays up."""
        self._network.cut(self.name, silent=silent)

    def heal_link(self) -> None:
        """Plug the cable in again; undoes `cut_link`, of either kind."""
        self._network.heal(self.name)

    def shape(self, *, rate_mbit: float | None = None, delay_ms: float = 0.0) -> None:
        """Limit the rate of the cable, in each direction, and add a delay (which needs netem in the kernel)."""
        self._network.shape(self.name, self.space, rate_mbit=rate_mbit, delay_ms=delay_ms)

    def unshape(self) -> None:
        """Undo `shape`."""
        self._network.unshape(self.name, self.space)

    def block_peer(self, other: Self) -> None:
        """Cut this host and another off each other, silently; all else they still reach. Outlasts a reboot."""
        self.block_from(other)
        other.block_from(self)

    def unblock_peer(self, other: Self) -> None:
        """Undo `block_peer`."""
        self.unblock_from(other)
        other.unblock_from(self)

    def block_from(self, other: Self) -> None:
        """Lose what `other` sends to this host, while the other way stays open; guests' traffic is not touched."""
        drop_from(self.space, other.address)
        self._blocked.add(other.address)

    def unblock_from(self, other: Self) -> None:
        """Undo `block_from`."""
        accept_from(self.space, other.address)
        self._blocked.discard(other.address)

    # --- guests ---------------------------------------------------------------------------------------------------

    def qemu_pid(self, domain: str) -> int | None:
        """Return the process id of a domain's QEMU on this host, or None. `domain`: its name or UUID."""
        for pid, line in self.processes().items():
            if "qemu" in line and (f"-uuid {domain} " in line or f"guest={domain}," in line):
                return pid
        return None

    def kill_qemu(self, domain: str, number: int = signal.SIGKILL) -> None:
        """Send a domain's QEMU a signal.

        Raises:
            LabError: There is none on this host.
        """
        pid = self.qemu_pid(domain)
        if pid is None:
            raise LabError(f"{self.name} runs no QEMU of {domain}")
        os.kill(pid, number)

    def hook_records(self) -> list[dict[str, Any]]:
        """Return the calls of libvirt's QEMU hook on this host, oldest first.

        Each has `at` (CLOCK_REALTIME), `mono` (CLOCK_MONOTONIC), `host`, `domain`, `operation`, `sub`, `extra`.
        """
        if not self._hook_log.exists():
            return []
        return [json.loads(line) for line in self._hook_log.read_text().splitlines()]

    # --- inside ---------------------------------------------------------------------------------------------------

    @property
    def space(self) -> Namespace:
        """The host's network namespace."""
        if self._space is None:
            raise LabError(f"{self.name} was never on")
        return self._space

    @property
    def _hook_log(self) -> Path:
        return self.directory / "hooks.jsonl"

    def _enter(self) -> list[str]:
        anchor = self._anchor
        if anchor is None:
            raise LabError(f"{self.name} is off")
        return ["nsenter", f"--target={anchor.pid}", "--net", "--mount", "--uts", "--"]

    def _log_end(self, which: str) -> str:
        path = self._logs / f"{self.name}-{which}.log"
        return path.read_text(errors="replace")[-2000:] if path.exists() else "(no log)"

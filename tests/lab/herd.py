"""The product on the lab: every process of vmherd, each supervised as systemd would, over real hosts and guests.

with Lab(hosts=3) as lab, LabHerd(lab) as herd:
    vm = herd.start_guest(lab.guest("linux-vm", address="192.0.2.101"))
    herd.cluster.evict("linux-vm").wait(timeout=60)
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import libvirt

from orchestrator import Cluster
from orchestrator.errors import NotFound, Refused
from orchestrator.resources import OperationType, Resource, VirtualMachine, VirtualMachineOperation
from orchestrator.services import fencing, nodes, operations, rebalancing, vms
from orchestrator.services.context import deciding
from orchestrator.store import access, keys
from orchestrator.store.connection import connect
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.namespaces import REPOSITORY
from tests.lab.promptness import prompt_prefix
from tests.lab.standin import put_in
from tests.lab.supervised import Supervised
from tests.waiting import wait_until

# The hosts see one file system, which libvirt can't know.
_STORAGE = {"VMHERD_ASSUME_SHARED_STORAGE": "true"}
# Emulation is what works on any machine (tests/lab/image.py), and the hosts have no cgroups of their own.
_MACHINES = {"VMHERD_DOMAIN_TYPE": "qemu", "VMHERD_CPU_SHARES": "false"}

R = TypeVar("R", bound=Resource)

NODE_PROCESSES = {
    "heartbeat": ["run", "heartbeat"],
    "agent": ["run", "agent"],
    "migrate": ["run", "worker", "migrate"],
    "lifecycle": ["run", "worker", "lifecycle"],
}
CONTROL_PROCESSES = {
    "control": ["run", "control"],
    "liveness": ["run", "liveness"],
    "liveness-2": ["run", "liveness"],
    "fencing": ["run", "fencing"],
    "intake": ["run", "intake"],
    "beat-1": ["run", "beat"],
    "beat-2": ["run", "beat"],
}


class LabHerd:
    """A herd on a lab.

    Args:
        lab: Up.
        source: The tree whose code runs; a test may give a copy that it broke.
        env: Settings for every process, for example `VMHERD_BANDWIDTH_MIB_S`.
        entry: By process name, what is run in place of `-m orchestrator.cli`; for faults inside a process.
        watchdogs: Give each host one, which takes its power when it is not fed in time (`standin`). So that it is
            armed, fencing is enabled; failover is disarmed until a test arms it.
        witness: Name of a witness in the control plane's namespace; empty: there is none.

    Attributes:
        watchdogs: By host.
        redis: The lab's Redis.
        cluster: Made as a person's program would, from outside of the namespaces.
        processes: By `name` of the control plane, `host/name` of nodes.
    """

    def __init__(
        self,
        lab: Lab,
        *,
        source: Path = REPOSITORY,
        env: Mapping[str, str] | None = None,
        entry: Mapping[str, list[str]] | None = None,
        watchdogs: bool = False,
        witness: str = "",
    ) -> None:
        self.lab = lab
        self._source = source
        self._env = dict(env or {})
        self._entry = dict(entry or {})
        self.watchdogs = {host.name: put_in(host) for host in lab.hosts} if watchdogs else {}
        for name in self.watchdogs:
            self._entry.setdefault(f"{name}/heartbeat", ["-m", "tests.lab.heartbeat"])
        self._witness = witness
        self.redis = lab.start_redis()
        self.cluster = Cluster(self.redis.url)
        self.processes: dict[str, Supervised] = {}
        self._passwords: dict[str, str] = {}

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.down()

    def up(self, timeout: float = 120.0) -> None:
        """Start everything, and wait until each node is Ready and each worker listens."""
        for name in CONTROL_PROCESSES:
            self.start_control(name)
        for name in self.watchdogs:
            fencing.set_fencing(self.cluster.context, name, lambda spec: spec.with_(enabled=True))
        for host in self.lab.hosts:
            for name in NODE_PROCESSES:
                self.start_node(host.name, name)
        if self._witness:
            self.start_witness(self._witness)
        self.wait_ready([host.name for host in self.lab.hosts], timeout)
        rebalancing.change_policy(
            self.cluster.context, {"enabled": False}
        )  # on, it would move what tests put somewhere

    def wait_ready(self, nodes: list[str], timeout: float = 60.0) -> None:
        """Wait until these nodes are Ready, their workers run, and the herd is not in recovery."""

        def ready() -> bool:
            known = {node.name: node for node in self.cluster.nodes()}
            state = self.cluster.store.redis.hget(keys.IDENTITY, "state")
            return state == "normal" and all(name in known and known[name].is_ready for name in nodes)

        wait_until(ready, timeout, f"nodes {nodes} Ready")

    def down(self) -> None:
        """Stop every process, all at once."""
        for watchdog in self.watchdogs.values():
            watchdog.close()
        for process in self.processes.values():
            process.hold()
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.stop()
        self.processes.clear()
        self.cluster.close()
        self.redis.stop()

    def start_control(self, name: str, entry: list[str] | None = None) -> Supervised:
        """Start one process of the control plane."""
        arguments = CONTROL_PROCESSES[name]
        env = self.environment(VMHERD_REDIS_URL=self.redis.url_for_hosts)
        argv = self._argv(name, arguments, entry)
        self.processes[name] = self.lab.supervise(
            lambda: self.lab.control.popen(argv, env=env, log=name, cwd=self._source), name
        )
        return self.processes[name]

    def start_node(self, host_name: str, name: str, entry: list[str] | None = None) -> Supervised:
        """Start one process of a node, inside its host and with the node's own Redis user."""
        host, env = self.lab.host(host_name), self._node_environment(host_name)
        key = f"{host_name}/{name}"
        prefix = prompt_prefix() if name == "heartbeat" else []  # as its unit has it
        argv = [*prefix, *self._argv(key, NODE_PROCESSES[name], entry)]
        self.processes[key] = self.lab.supervise(
            lambda: host.popen(argv, env=env, log=f"{host_name}-{name}", cwd=self._source), key
        )
        return self.processes[key]

    def start_witness(self, name: str) -> Supervised:
        """Start a witness beside the control plane, with a Redis user of its own."""
        nodes.add_witness(self.cluster.context, name)
        env = self.environment(VMHERD_REDIS_URL=self._node_url(name, is_witness=True), VMHERD_NODE=name)
        argv = [*prompt_prefix(), *self._argv(name, ["run", "witness"], None)]
        self.processes[name] = self.lab.supervise(
            lambda: self.lab.control.popen(argv, env=env, log=name, cwd=self._source), name
        )
        return self.processes[name]

    def shut_down(self, host_name: str, *, timeout_s: float, grace_s: float) -> None:
        """Shut a host down in an orderly way, as far as `vmherd-guests.service` goes: returns once that lets it go on.

        What systemd does after that is up to `LabHost.power_cut`.
        """
        times = {"VMHERD_HOST_SHUTDOWN_TIMEOUT": str(timeout_s), "VMHERD_HOST_SHUTDOWN_GRACE": str(grace_s)}
        self._host_shutdown(host_name, timeout=timeout_s + grace_s + 30, **times)

    def boot(self, host_name: str) -> None:
        """Give a host its power back, and run what `vmherd-guests.service` runs then; returns once it is Ready."""
        self.lab.host(host_name).power_on()
        self._host_shutdown(host_name, "--over")
        self.wait_ready([host_name])

    def _host_shutdown(self, host_name: str, *arguments: str, timeout: float = 60, **env: str) -> None:
        argv = [sys.executable, "-m", "orchestrator.cli", "run", "host-shutdown", *arguments]
        environment = {**self._node_environment(host_name), **env}
        self.lab.host(host_name).run(argv, env=environment, timeout=timeout, cwd=self._source)

    def _node_environment(self, host_name: str) -> dict[str, str]:
        """The environment of a node's process: inside its host, and with its own Redis user."""
        return self.environment(
            VMHERD_REDIS_URL=self._node_url(host_name),
            VMHERD_NODE=host_name,
            VMHERD_MIGRATION_URI=self.lab.host(host_name).migration_uri,
            # This machine's own is nobody's here.
            VMHERD_WATCHDOG=str(self.watchdogs[host_name].path) if host_name in self.watchdogs else "off",
        )

    def _node_url(self, name: str, *, is_witness: bool = False) -> str:
        """The Redis of a node's own user, which is made the first time."""
        if name not in self._passwords:
            client = connect(self.redis.url)
            self._passwords[name] = access.enroll(client, name, is_witness=is_witness)
            client.close()
        base = self.redis.url_for_hosts.partition("@")[2]
        return f"redis://{access.user_name(name)}:{self._passwords[name]}@{base}"

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a process; from the source tree under test, whatever is installed."""
        fixed = {"PYTHONPATH": str(self._source), "VMHERD_LOG_FORMAT": "json"}
        return {**fixed, **_STORAGE, **_MACHINES, **self._env, **more}

    def vmherd(self, *arguments: str, stdin: str | None = None, check: bool = True, timeout: float = 60.0) -> str:
        """Run the CLI from outside of the namespaces, as a person would; its standard output."""
        return self.lab.control.run(
            [sys.executable, "-m", "orchestrator.cli", *arguments],
            env=self.environment(VMHERD_REDIS_URL=self.redis.url_for_hosts),
            stdin=stdin,
            check=check,
            timeout=timeout,
            cwd=self._source,
        ).stdout

    def manifest(self, guest: Guest, *, node: str = "", cores: int = 1, **spec_fields: Any) -> dict[str, Any]:
        """The VirtualMachine of a guest; with a node, it may run there only until `free` is called on it.

        Other fields of its spec are given as they are, for example `runPolicy="Manual"`.
        """
        spec: dict[str, Any] = {
            "memory": {"size": f"{guest.memory_mib}Mi"},
            "cpu": {"cores": cores},
            "domainTemplate": guest.xml,
            "ipAddress": guest.address,
            **spec_fields,
        }
        if node:
            spec["nodeSelector"] = {"kubernetes.io/hostname": node}
        return {
            "apiVersion": "virtualization.deckhouse.io/v1alpha2",
            "kind": "VirtualMachine",
            "metadata": {"name": guest.name, "uid": guest.uuid},
            "spec": spec,
        }

    def start_guests(
        self, *guests: tuple[Guest, str], up: bool = True, timeout: float = 90.0, **spec_fields: Any
    ) -> None:
        """Create guests, each on a node of its own choice, and wait until they run (and answer)."""
        for guest, node in guests:
            self.cluster.create(self.manifest(guest, node=node, **spec_fields))
        for guest, node in guests:
            self.wait_vm(
                guest.name,
                lambda vm, node=node: (
                    vm.status.phase == "Running"  # type: ignore[misc]
                    and (not node or vm.status.node_name == node)
                ),
                timeout,
            )
            self.free(guest.name)
        if up:
            for guest, _ in guests:
                guest.wait_up(timeout)

    def free(self, name: str) -> None:
        """Take the nodeSelector off a VM, which held it on its first node."""

        def decide() -> None:  # the control plane writes the VM at the same time
            vm = self.cluster.vm(name)
            if vm.spec.node_selector:
                store = self.cluster.store
                store.must_commit(store.batch().put(vm, vm.with_(spec=vm.spec.with_(node_selector={}))))

        deciding(decide)

    def wait_vm(self, name: str, predicate: Callable[[VirtualMachine], bool], timeout: float = 60.0) -> VirtualMachine:
        """Wait until a VM is as wanted."""
        return self._wait(self.cluster.vm(name), predicate, timeout)

    def wait_operation(
        self, name: str, predicate: Callable[[VirtualMachineOperation], bool], timeout: float = 60.0
    ) -> VirtualMachineOperation:
        """Wait until an operation is as wanted."""
        return self._wait(self.cluster.operation(name).resource, predicate, timeout)

    def _wait(self, resource: R, predicate: Callable[[R], bool], timeout: float) -> R:
        deadline = time.monotonic() + timeout
        last = None
        for current in self.cluster.follow(resource, deadline):
            if current is None:
                break
            last = current
            if predicate(current):
                return current
        shown = last.manifest().get("status") if last is not None else "gone"
        raise AssertionError(f"{resource.kind_name} {resource.key}: not as wanted in {timeout} s; last: {shown}")

    def clear(self) -> None:
        """Remove all guests, VMs and operations, so that the next test begins with an empty herd."""
        for host in self.lab.hosts:
            host.heal_link()
            host.unshape()
            if not host.libvirtd_answers():
                host.start_libvirtd()
        for node in self.cluster.nodes():
            self.cluster.uncordon(node.name)

        def is_empty() -> bool:
            store = self.cluster.store
            for operation in store.all(VirtualMachineOperation):
                if operation.is_active and operation.spec.type is OperationType.STOP:
                    continue  # of a VM that is being deleted: it would be made anew
                with contextlib.suppress(NotFound):
                    operations.delete_operation(self.cluster.context, operation.key)
            for vm in store.all(VirtualMachine):
                with contextlib.suppress(Refused, NotFound):
                    vms.delete_vm(self.cluster.context, vm.key)
            # After that, or else their policies start them again; and guests are not given time to power off.
            domains = [domain for host in self.lab.hosts for domain in host.connect().listAllDomains()]
            with ThreadPoolExecutor(max_workers=8) as pool:  # each takes more than a second
                list(pool.map(_remove, domains))
            return not store.all(VirtualMachine) and not store.all(VirtualMachineOperation)

        wait_until(is_empty, 60, "the herd is empty", interval=0.3)

    def leftovers(self) -> dict[str, Any]:
        """Everything that a finished operation must not leave: slots, reservations, grants, orders, timers, indexes."""
        redis = self.cluster.store.redis
        found: dict[str, Any] = {}
        for pattern in ("slots:*", "grants:*", "orders:*"):
            for key in redis.scan_iter(pattern):
                found[key] = redis.smembers(key) if redis.type(key) == "set" else redis.hgetall(key)
        for key in (keys.ACTIVE_OPERATIONS, keys.OPEN_GRANTS):
            if redis.hlen(key):
                found[key] = redis.hgetall(key)
        for key in (keys.DEADLINES, keys.AWAITING):
            if redis.zcard(key):
                found[key] = redis.zrange(key, 0, -1)
        for key in redis.scan_iter("claims:*"):
            reserved = [m for m in redis.hkeys(key) if str(m).startswith("operation/")]
            if reserved:
                found[key] = reserved
        return found

    def _argv(self, name: str, arguments: list[str], entry: list[str] | None) -> list[str]:
        head = entry or self._entry.get(name) or ["-m", "orchestrator.cli"]
        return [sys.executable, *head, *arguments]


def _remove(domain: Any) -> None:
    for undo in (domain.destroy, domain.undefine):
        with contextlib.suppress(libvirt.libvirtError):  # it is not active, or has no definition
            undo()


def in_ci() -> bool:
    """Whether this runs in CI."""
    return bool(os.environ.get("CI"))

"""One run of one scenario: the herd is set up, time passes, and what happened is checked."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from orchestrator.resources import Node as NodeResource
from orchestrator.resources import (
    ObjectMeta,
    RunPolicy,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
    find_condition,
    new_metadata,
    parse,
)
from orchestrator.resources.vm import VirtualMachineStatus
from orchestrator.services.context import Clock, Context
from orchestrator.services.fencing import Tools
from orchestrator.services.nodes import add_witness
from orchestrator.services.recovery import NORMAL
from orchestrator.settings import Settings, settings
from orchestrator.store import Store, keys
from orchestrator.store.access import enroll, user_name
from orchestrator.store.node_store import NodeStore
from tests.builders import uuid_of
from tests.redis_server import RedisServer
from tests.scenarios.engine.control import ControlPlane
from tests.scenarios.engine.expected import Expectation, unmet
from tests.scenarios.engine.heartbeat import PeerNetwork, SimulatedHeartbeat
from tests.scenarios.engine.invariants import Broken, Invariants
from tests.scenarios.engine.mail import Mail
from tests.scenarios.engine.node import Node
from tests.scenarios.engine.power import PowerNetwork
from tests.scenarios.engine.processes import Processes
from tests.scenarios.engine.redis_time import SimulatedRedis, TimeOfDay, Touched
from tests.scenarios.engine.schedule import Process, Schedule, SimulatedClock
from tests.scenarios.engine.timeline import Entry, Timeline, stands
from workers import clock as workers_clock
from workers.hypervisor.port import Marker
from workers.hypervisor.simulated_faults import Faults
from workers.hypervisor.simulated_guest import Behaviour
from workers.hypervisor.simulated_spec import HostSpec
from workers.hypervisor.simulated_world import World

_READY_WITHIN_S = 60
_NOT_OF_THE_HOST = {"watchdog", "bmc", "fencing"}
"""Words of `herd.yaml` on a node that say nothing of its host's size."""
_TOLD_CALLS = {"start", "destroy", "shutdown", "resume", "migrate", "abort", "start_post_copy"}


class ScenarioFailed(AssertionError):
    """A run was not as expected; its text has the whole story."""


class Run:
    """A herd in simulated time; a context manager.

    Args:
        herd: As `herd.yaml` says.
        server: An empty Redis, which lives by `time_of_day`.
        time_of_day: Likewise.
        seed: Of all choices.

    Attributes:
        zero: When the scenario begins, once the herd is ready.
    """

    def __init__(self, herd: dict[str, Any], server: RedisServer, time_of_day: TimeOfDay, seed: int = 0) -> None:
        self.herd = herd
        self.server = server
        self.time_of_day = time_of_day
        self.zero = float("inf")
        self._seed = seed
        self._random = random.Random(seed)
        self._stack = ExitStack()
        self._checked_commits = -1
        self._now = 0.0

    def __enter__(self) -> "Run":
        """Set the herd up; its processes have not begun."""
        self._stack.enter_context(_settings(self.herd.get("settings", {})))
        self._stack.enter_context(patch.object(os, "urandom", self._random.randbytes))  # uuid4, too, is the seed's
        self.config: Settings = settings()
        self.world = World(clock=lambda: self._now)
        self.schedule = Schedule(self._seed, self._tick)
        self._stack.callback(self.schedule.end)
        self._stack.enter_context(workers_clock.use(SimulatedClock(self.schedule)))
        self.schedule.next_elsewhere = self.world.next_at
        self.faults = Faults(self.world)
        self.touched = Touched()
        self.redis = self._client(self.server.url)
        self.store = Store(self.redis, self.config)
        self.timeline = Timeline(self.store, lambda: self.schedule.now - self.zero)
        self.processes = Processes(self.schedule, self.timeline.tell)
        self.network = PeerNetwork(self.schedule)
        self._attend(self.redis)
        self.mail = Mail(self.redis, self.schedule)
        clock = Clock(self.time_of_day.now, lambda: SimulatedClock.MONOTONIC_AT_BEGIN + self.schedule.now, self._sleep)
        self.ctx = Context(self.store, self.mail, clock)
        self.invariants = Invariants(self.store, self.timeline, self.world)
        self.touched.on_report = self.invariants.see_report
        self.nodes: dict[str, Node] = {}
        self._add_hosts()
        self._add_vms()
        return self

    def __exit__(self, *_: object) -> None:
        """End all threads, and close all connections."""
        self._stack.close()

    def _client(self, url: str) -> SimulatedRedis:
        client = SimulatedRedis.connect(url, self.schedule, self.touched)
        self._stack.callback(client.close)
        return client

    def _sleep(self, seconds: float) -> None:
        self.schedule.wait(lambda: False, seconds)

    def _attend(self, client: SimulatedRedis) -> None:
        client.before = self.processes.reach_redis
        client.after = lambda command: self.processes.check("after", command)

    def _tick(self, now: float) -> None:
        self._now = now
        self.time_of_day.set(now)
        self.world.advance()

    # ------------------------------------------------------------------------------------------------- what there is

    def _add_hosts(self) -> None:
        for name, given in self.herd["nodes"].items():
            size = {key: value for key, value in (given or {}).items() if key not in _NOT_OF_THE_HOST}
            self.world.add_host(HostSpec(name, **{"cpus": 8, "memory_mib": 16_384, **size}))

    def _start(self) -> None:
        self.power = PowerNetwork(self)
        ControlPlane(self.ctx, self.processes, self.redis, Tools(self.power, self.power.is_listening))
        self.power.configure()
        for name in self.world.hosts:
            password = enroll(self.redis, name)
            client = self._client(self.server.url.replace("://", f"://{user_name(name)}:{password}@"))
            self._attend(client)
            has_watchdog = bool((self.herd["nodes"][name] or {}).get("watchdog"))
            self.nodes[name] = Node(
                name,
                self.world,
                client,
                self.processes,
                self._called,
                self.network,
                has_watchdog=has_watchdog,
                tell=self.timeline.tell,
            )
        for name in self.herd.get("witnesses", []):
            self._start_witness(name)

    def _start_witness(self, name: str) -> None:
        add_witness(self.ctx, name)
        password = enroll(self.redis, name, is_witness=True)
        client = self._client(self.server.url.replace("://", f"://{user_name(name)}:{password}@"))
        self._attend(client)

        def start(process: Process) -> None:
            store = NodeStore(client, name)
            heartbeat = SimulatedHeartbeat(
                process, store, self.processes, self.network, None, f"boot-{name}", self.timeline.tell, is_witness=True
            )
            self.schedule.spawn(process, "main", heartbeat.run)

        self.processes.add(f"heartbeat@{name}", start)

    def _add_vms(self) -> None:
        """Put the VMs that run on record and on their hosts, as their first incarnation."""
        for name in self.herd.get("vms", {}):
            vm, node = self.manifest(name), self.herd["vms"][name].get("node", "")
            if not node:
                continue
            self.start_by_hand(name, node, 1)
            status = VirtualMachineStatus(
                phase=VmPhase.RUNNING, node_name=node, incarnation=1, started_at=self.time_of_day.now()
            )
            meta = new_metadata(vm.metadata, namespaced=True, now=self.time_of_day.now())
            self.store.must_commit(self.store.batch().create(vm.with_(metadata=meta, status=status)))

    def manifest(self, name: str) -> VirtualMachine:
        """Make the VM of that name in `herd.yaml`; its `spec` there is the manifest's, the rest are shorthands."""
        given = self.herd["vms"][name] or {}
        guest = Behaviour(**given.get("guest", {})).element()
        on_crash = f"<on_crash>{given.get('on_crash', 'destroy')}</on_crash>"  # until vmherd starts it
        template = f"<domain type='kvm'><os><type>hvm</type></os><metadata>{guest}</metadata>{on_crash}</domain>"
        spec = {
            "runPolicy": given.get("policy", RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY.value),
            "memory": {"size": given.get("memory", "1Gi")},
            "cpu": {"cores": given.get("cores", 1), "coreFraction": "100%"},
            "domainTemplate": template,
            **given.get("spec", {}),
        }
        wanted = {
            "apiVersion": VirtualMachine.group_version,
            "kind": VirtualMachine.kind_name,
            "metadata": ObjectMeta(
                name=name,
                namespace="default",
                uid=uuid_of(name),
                labels=given.get("labels", {}),
                annotations=given.get("annotations", {}),
            ).model_dump(by_alias=True),
            "spec": spec,
        }
        return parse(VirtualMachine, wanted)

    def start_by_hand(self, name: str, node: str, incarnation: int) -> None:
        """Start a VM on a host, which nobody asks for it."""
        vm = self.manifest(name)
        marker = Marker(vm.metadata.namespace, vm.name, incarnation, 1)
        self.world.call(node, "start", self._domain(vm), marker).result(0)

    def uuid_of(self, name: str) -> str:
        """Give the UUID of a VM of `herd.yaml`."""
        return self.manifest(name).metadata.uid

    def _domain(self, vm: VirtualMachine) -> str:
        identity = f"<name>{vm.domain_name}</name><uuid>{vm.metadata.uid}</uuid>"
        size = f"<memory unit='MiB'>{vm.spec.memory_mib}</memory><vcpu>{vm.spec.cpu.cores}</vcpu>"
        return (vm.spec.domain_template or "").replace("<os>", f"{identity}{size}<os>", 1)

    def _called(self, host: str, method: str, arguments: tuple[Any, ...]) -> None:
        self.invariants.see_call(host, method, arguments)
        if method in _TOLD_CALLS:
            marker = next((a for a in arguments if isinstance(a, Marker)), None)
            uuid = getattr(arguments[0], "uuid", arguments[0])
            vm = marker.name if marker else self.name_of(uuid)
            more = f", incarnation {marker.incarnation}" if marker else ""
            target = getattr(arguments[0], "target_uri", "").rpartition("/")[2]
            self.timeline.tell(f"host/{host}", f"{method} {vm}" + (f" to {target}" if target else "") + more)

    def name_of(self, uuid: str) -> str:
        """Name the VM of a domain."""
        return next((name for name in self.herd.get("vms", {}) if uuid_of(name) == uuid), uuid)

    # ---------------------------------------------------------------------------------------------------------- playing

    def begin(self) -> None:
        """Start all processes, and let the herd come to its normal state: that is the scenario's second 0.

        Raises:
            ScenarioFailed: It does not.
        """
        self._start()
        for second in range(1, _READY_WITHIN_S):
            self.schedule.run_until(float(second), self.check)
            if self._is_ready():
                self.zero = self.schedule.now
                self.power.configure()  # the BMCs are read, now that the leases are fresh
                return
        state = [str(entry) for entry in self.ends()], self.redis.hgetall(keys.IDENTITY)
        raise ScenarioFailed(f"the herd does not come to its normal state: {state}")

    def _is_ready(self) -> bool:
        ready = [node for node in self.timeline.all(NodeResource) if node.is_ready]
        is_normal = self.redis.hget(keys.IDENTITY, "state") == NORMAL
        are_up = all(_is_seen_running(vm) and self._is_up(vm) for vm in self.timeline.all(VirtualMachine))
        return is_normal and are_up and len(ready) == len(self.nodes) + len(self.herd.get("witnesses", []))

    def _is_up(self, vm: VirtualMachine) -> bool:
        guest = self.world.find(vm.metadata.uid).guest
        return guest is not None and guest.is_up

    def at(self, second: float, action: Callable[[], None]) -> None:
        """Have something done at a second of the scenario."""
        self.schedule.at(self.zero + second, action)

    def play(self, end: float) -> None:
        """Let time pass until a second of the scenario."""
        self.schedule.run_until(self.zero + end, self.check)

    def check(self) -> None:
        """Look at what the last step has done.

        Raises:
            Broken: An invariant.
        """
        self.invariants.check_hosts()
        if self.touched.commits == self._checked_commits or not self.server.is_running:
            return
        self._checked_commits = self.touched.commits
        self.timeline.catch_up()
        self.invariants.check_redis()

    def ends(self) -> list[Entry]:
        """Tell how everything stands."""
        now = self.schedule.now - self.zero
        found = [Entry(now, (f"vm/{vm.name}",), stands(vm)) for vm in self.timeline.all(VirtualMachine)]
        for operation in self.timeline.all(VirtualMachineOperation):
            said = find_condition(operation.status.conditions, "Completed")
            what = operation.status.phase.value + (f": {said.reason}: {said.message}" if said else "")
            found.append(Entry(now, (f"op/{self.timeline.operation_name(operation)}",), what))
        return found


def _is_seen_running(vm: VirtualMachine) -> bool:
    return vm.status.phase is VmPhase.RUNNING and vm.status.needs is not None


@contextmanager
def _settings(given: dict[str, Any]) -> Iterator[None]:
    """Let this process's settings be a scenario's, as if they stood in its environment."""
    environment = {f"VMHERD_{name.upper()}": str(value) for name, value in given.items()}
    with patch.dict(os.environ, environment):
        settings.cache_clear()
        try:
            yield
        finally:
            settings.cache_clear()


def story(timeline: Timeline, problems: list[str]) -> str:
    """Write down what happened, and what is wrong with it."""
    lines = ["", *(str(entry) for entry in timeline.entries), ""]
    return "\n".join([*lines, *(f"  >>> {problem}" for problem in problems)])


def read_yaml(path: Path) -> Any:
    """Read one of a scenario's files.

    Raises:
        AssertionError: It is not there.
    """
    if not path.is_file():
        raise AssertionError(f"{path} is missing")
    return yaml.safe_load(path.read_text())


def finish(run: Run, expectations: list[Expectation], armed: list[str]) -> list[str]:
    """Check how it all ended; give what is wrong."""
    problems = [f"never came to pass: {what}" for what in armed]
    try:
        run.timeline.catch_up()
        run.invariants.check_end()
    except (Broken, AssertionError) as error:
        problems.insert(0, f"at the end: {error}")
    return [*problems, *unmet(expectations, run.timeline.entries, run.ends())]

"""The herd in memory: a follower's copy turned into the planner's snapshot.

What a snapshot says of a node is kept until something on that node changes, so a grant costs no look at all VMs.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import cast

from orchestrator.planner.applicability import handed_over
from orchestrator.planner.drain import by_remaining_work
from orchestrator.planner.rules import Resident, resident
from orchestrator.planner.snapshot import Limits, NodeState, Snapshot
from orchestrator.queues import STARTS_PER_NODE
from orchestrator.resources import (
    Action,
    Key,
    Maintenance,
    Node,
    NodeDrain,
    NodeFencing,
    NodeInventory,
    VirtualMachine,
    VirtualMachineClass,
    VirtualMachineOperation,
)
from orchestrator.resources.maintenance import NodeStage
from orchestrator.resources.scheduling import Taint, TaintEffect
from orchestrator.store import Change, Store, keys
from orchestrator.store.connection import redis_errors
from orchestrator.store.follower import Follower

YET_TO_COME = Taint(key="vmherd.dev/maintenance-to-come", effect=TaintEffect.PREFER_NO_SCHEDULE)
"""Of a node that a rolling maintenance has not reached: others are preferred. On no document."""
KINDS = (
    Node,
    NodeDrain,
    NodeFencing,
    Maintenance,
    NodeInventory,
    VirtualMachine,
    VirtualMachineClass,
    VirtualMachineOperation,
)


class Herd:
    """Follows the store; one a process.

    Args:
        on_change: Called, from the follower's thread, when something has changed.

    Attributes:
        follower: The copy.
    """

    def __init__(self, store: Store, on_change: Callable[[], object] | None = None) -> None:
        self.store = store
        self._on_change = on_change
        self._open: set[Key] = set()
        self._states: dict[str, NodeState] = {}
        self._residents: dict[Key, Resident] = {}
        self._unsettled: set[Key] = set()
        self.follower = Follower(store, KINDS, self._note)

    @classmethod
    def of(cls, follower: Follower) -> "Herd":
        """Give the herd of a copy that somebody else follows, to be looked at once; it is not started.

        Args:
            follower: Started, and with all of `KINDS`.
        """
        herd = cls(follower.store)
        herd.follower = follower
        herd._note(None)
        return herd

    def start(self) -> "Herd":
        """Load and follow."""
        self.follower.start()
        return self

    def stop(self) -> None:
        """Stop following."""
        self.follower.stop()

    def active_operations(self) -> list[VirtualMachineOperation]:
        """Give the operations that are not finished, in the order in which they are served."""
        return sorted((o for o in self.open_operations() if o.is_active), key=lambda o: (o.priority, o.created_version))

    def open_operations(self) -> list[VirtualMachineOperation]:
        """Give the operations that are not finished, or whose grant is still open, in no order."""
        with self.follower.lock:
            documents = self.follower.resources[VirtualMachineOperation.kind_name]
            found = [documents[key] for key in self._open if key in documents]
        return [r for r in found if isinstance(r, VirtualMachineOperation)]

    def snapshot(self, *, whole: bool = False) -> Snapshot:
        """Give the herd as of now: all that was committed before this call is in it.

        Args:
            whole: With all VMs, and not only those of pending operations.
        """
        placements = self._placements()  # before the look: what is granted after this counts as not seen
        self.follower.sync()
        at = self.store.now()
        config = self.store.config
        with self.follower.lock:
            nodes = self._node_states()
            pending = tuple(
                o for o in self.active_operations() if o.status.grant is None and o.metadata.deletion_timestamp is None
            )
            ending = {o.vm_key: o for o in self.open_operations() if o.status.superseded_by}
            wanted = set(self._vms()) if whole else {Key(o.vm_key) for o in pending}
            vms = {key: vm for key in wanted if (vm := self.follower.get(VirtualMachine, key)) is not None}
            return Snapshot(
                now=at,
                nodes=nodes,
                vms=vms,
                pending=by_remaining_work(pending, vms),
                migrating=len(self.follower.index.get(keys.SLOTS_CLUSTER, {})),
                busy=self._busy(vms),
                held={o.key: _waits_for(ending[o.vm_key]) for o in pending if o.vm_key in ending}
                | {o.key: handed_over(vm) for o in pending if (vm := vms.get(Key(o.vm_key))) and vm.status.adoption},
                memory_overhead_mib=config.memory_overhead_mib,
                limits=Limits(config.outbound_per_node, config.inbound_per_node, STARTS_PER_NODE),
                classes={vm_class.name: vm_class for vm_class in self.follower.all(VirtualMachineClass)},
                residents=self._all_residents(),
                placements=placements,
            )

    def _placements(self) -> int:
        with redis_errors(self.store.redis):
            return int(cast("str | None", self.store.redis.hget(keys.PLACEMENTS, "count")) or 0)

    def _vms(self) -> Iterable[Key]:
        return self.follower.resources[VirtualMachine.kind_name]

    def _node_states(self) -> dict[str, NodeState]:
        for index in self.follower.touched:
            self._states.pop(index.rpartition(":")[2], None)
        self.follower.touched.clear()
        for node in self.follower.all(Node):
            if node.name not in self._states:
                self._states[node.name] = self._node_state(node)
        # What is moved now to a node whose maintenance is yet to come would be moved once more.
        yet_to_come = {
            name
            for maintenance in self.follower.all(Maintenance)
            if maintenance.is_open
            for name in maintenance.spec.nodes
            if maintenance.node(name).stage is NodeStage.WAITING
        }
        starting = Counter(
            grant.node
            for operation in self.open_operations()
            if (grant := operation.status.grant) is not None and grant.action is Action.START
        )
        return {
            name: replace(
                state,
                starting=starting[name],
                taints=(*state.taints, YET_TO_COME) if name in yet_to_come else state.taints,
            )
            if name in starting or name in yet_to_come
            else state
            for name, state in self._states.items()
        }

    def _node_state(self, node: Node) -> NodeState:
        memory = cpu = 0
        for value in self.follower.index.get(keys.claims(node.name), {}).values():
            parts = (value or "0 0").split()
            memory, cpu = memory + int(parts[0]), cpu + int(parts[1])
        capacity = node_capacity(self.store, node)
        return NodeState(
            name=node.name,
            labels=node.metadata.labels,
            ready=node.is_ready,
            cordoned=node.spec.unschedulable,
            shutting_down=node.is_shutting_down,
            memory_mib=capacity[0],
            cpu_millicores=capacity[1],
            memory_used_mib=memory,
            cpu_used_millicores=cpu,
            outbound=len(self.follower.index.get(keys.slots_outbound(node.name), {})),
            inbound=len(self.follower.index.get(keys.slots_inbound(node.name), {})),
            migration_uri=node.status.hypervisor.migration_uri,
            generation=node.status.generation,
            platform=node.status.hypervisor.platform,
            taints=node.spec.taints,
            domain_type=node.status.hypervisor.domain_type,
            cpu_shares=node.status.hypervisor.cpu_shares,
            cpu=node.status.hypervisor.cpu,
        )

    def _all_residents(self) -> dict[Key, Resident]:
        """Give the VMs that take room of a node, looking anew at those that were changed."""
        open_grants = self.follower.index.get(keys.OPEN_GRANTS, {})
        for key in self._unsettled:
            vm = self.follower.get(VirtualMachine, key)
            nodes = (
                _whereabouts(vm, self.follower.get(VirtualMachineOperation, open_grants.get(key) or "")) if vm else ()
            )
            if vm is None or not nodes:
                self._residents.pop(key, None)
                continue
            vm_class = self.follower.get(VirtualMachineClass, vm.spec.virtual_machine_class_name or "")
            self._residents[key] = resident(vm, vm_class, nodes)
        self._unsettled.clear()
        return dict(self._residents)

    def _busy(self, vms: Mapping[Key, VirtualMachine]) -> dict[Key, str]:
        """VMs whose domain is in a migration that no grant of ours began."""
        busy: dict[Key, str] = {}
        for key, vm in vms.items():
            inventory = self.follower.get(NodeInventory, vm.status.node_name) if vm.status.node_name else None
            seen = inventory.domains.get(vm.metadata.uid) if inventory else None
            if vm.status.elsewhere:
                busy[key] = f"it shows on node {vm.status.elsewhere} too"
            elif seen is not None and seen.job and seen.counter >= vm.status.counter:
                # An older report is of a migration of ours, whose settlement has read since.
                busy[key] = f"a migration that vmherd did not begin runs on node {vm.status.node_name}"
        return busy

    def _note(self, change: Change | None) -> None:
        with self.follower.lock:
            if change is None:
                self._states.clear()
                self._residents.clear()
                self._unsettled = set(self.follower.resources[VirtualMachine.kind_name])
                documents = self.follower.resources[VirtualMachineOperation.kind_name]
                self._open = {
                    key for key, o in documents.items() if isinstance(o, VirtualMachineOperation) and o.is_open
                }
            elif isinstance(change.resource, Node):
                self._states.pop(change.resource.name, None)
            elif isinstance(change.resource, VirtualMachine):
                self._unsettled.add(change.resource.key)
            elif isinstance(change.resource, VirtualMachineClass):
                self._unsettled = set(self.follower.resources[VirtualMachine.kind_name])
            elif isinstance(change.resource, VirtualMachineOperation):
                key = change.resource.key
                self._unsettled.add(Key(change.resource.vm_key))
                present = self.follower.get(VirtualMachineOperation, key)
                if present is not None and present.is_open:
                    self._open.add(key)
                else:
                    self._open.discard(key)
        if self._on_change is not None:
            self._on_change()


def _waits_for(ending: VirtualMachineOperation) -> str:
    return f"waits for the end of operation {ending.name}, which it superseded"


def _whereabouts(vm: VirtualMachine, operation: VirtualMachineOperation | None) -> tuple[str, ...]:
    """Name the nodes on which a VM takes room: its own, and the one that it is moving to."""
    if not vm.status.node_name or not vm.status.phase.occupies_node:
        return ()
    grant = operation.status.grant if operation is not None else None
    target = grant.target if grant is not None and grant.action is Action.MIGRATE else ""
    return tuple(dict.fromkeys(node for node in (vm.status.node_name, vm.status.elsewhere, target) if node))


def node_capacity(store: Store, node: Node) -> tuple[int, int]:
    """Give what VMs may take of a node: MiB of memory, millicores of CPU."""
    config, capacity = store.config, node.status.capacity
    memory = max(0, capacity.memory_mib - config.system_reserved_memory_mib)
    cpu = int(max(0.0, capacity.cpu - config.system_reserved_cpus) * 1000 * config.cpu_ratio)
    return memory, cpu

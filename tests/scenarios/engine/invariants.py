"""DESIGN.md's invariants, checked after every step of a run against the hosts' truth and all of Redis.

Each check raises `Broken` with one line that says what is wrong. What later work adds (evidence, fencing, drains) gets
its check here, and with that every scenario has it.
"""

from collections import defaultdict
from typing import Any

from orchestrator.resources import (
    Action,
    Grant,
    Node,
    NodeFencing,
    NodeInventory,
    Resource,
    VirtualMachine,
    VirtualMachineOperation,
    find_condition,
)
from orchestrator.store import Store, keys
from orchestrator.store.batch import IndexEntry, indexes
from tests.declared_keys import check_keys
from tests.scenarios.engine.timeline import Timeline
from workers.hypervisor.port import DomainState, Marker
from workers.hypervisor.simulated_world import World

_INDEXES = ("schedulable", "active-operations", "open-grants", "vm-uids", "slots:", "claims:", "grants:", "orders:")
_SETS = ("schedulable", "slots:")
_GONE = {"absent", "shutoff"}
_CHANGES_DOMAIN = {"start", "destroy", "resume", "migrate", "shutdown", "mark", "undefine"}


class Broken(AssertionError):
    """An invariant does not hold."""


class Invariants:
    """Watches one run.

    Args:
        store: The herd's.
        timeline: Its documents, as they are committed.
        world: The hosts.
    """

    def __init__(self, store: Store, timeline: Timeline, world: World) -> None:
        self._store = store
        self._timeline = timeline
        self._world = world
        self._names: dict[str, str] = {}
        self._may_run: defaultdict[str, set[str]] = defaultdict(set)
        self._gone_at: dict[tuple[str, str], int] = {}
        self._asked: set[str] = set()
        self._doubled_by_hand: dict[str, bool] = {}
        timeline.observers.append(self._see)

    def excuse(self, uuid: str) -> None:
        """Let one VM run twice, which a person has brought about, until it runs once again; that it must by the end."""
        self._doubled_by_hand[uuid] = False

    def _see_copies(self, uuid: str, hosts: list[str]) -> None:
        if len(hosts) > 1:
            if uuid not in self._doubled_by_hand:
                raise Broken(f"{self._names.get(uuid, uuid)} runs twice: on {' and '.join(hosts)}")
            self._doubled_by_hand[uuid] = True

    # --- as things are committed -----------------------------------------------------------------------------------

    def _see(self, old: Resource | None, new: Resource | None) -> None:
        if isinstance(new, VirtualMachine):
            self._see_vm(old if isinstance(old, VirtualMachine) else None, new)
        elif isinstance(new, VirtualMachineOperation):
            self._see_operation(old if isinstance(old, VirtualMachineOperation) else None, new)
        elif isinstance(new, NodeInventory):
            self._see_inventory(old if isinstance(old, NodeInventory) else None, new)
        elif isinstance(new, NodeFencing):
            self._see_fencing(old if isinstance(old, NodeFencing) else None, new)
        elif isinstance(old, VirtualMachineOperation):
            self._see_removed(old)

    def _see_fencing(self, old: NodeFencing | None, new: NodeFencing) -> None:
        """Evidence must be true; from then on nothing of the node may run there."""
        if not new.status.phase.has_evidence or (old is not None and old.status.phase.has_evidence):
            return
        if new.status.evidence is None:
            raise Broken(f"node/{new.name} is {new.status.phase} without evidence")
        for uuid, machine in self._world.host(new.name).machines.items():
            if machine.executes and uuid not in self._doubled_by_hand:
                raise Broken(f"node/{new.name} is fenced, while {self._names.get(uuid, uuid)} runs there")
        for nodes in self._may_run.values():
            nodes.discard(new.name)

    def _see_vm(self, old: VirtualMachine | None, new: VirtualMachine) -> None:
        self._names[new.metadata.uid] = new.name
        if old is None:
            if new.status.phase.occupies_node:
                self._may_run[new.metadata.uid].add(new.status.node_name)
            return
        if new.status.incarnation < old.status.incarnation:
            raise Broken(f"vm/{new.name}: incarnation fell from {old.status.incarnation} to {new.status.incarnation}")

    def _see_operation(self, old: VirtualMachineOperation | None, new: VirtualMachineOperation) -> None:
        who = f"op/{self._timeline.operation_name(new)}"
        if not new.message and not new.status.phase.is_final:
            raise Broken(f"{who} is {new.status.phase} without a reason")
        if old is not None:
            if new.status.progress < old.status.progress:
                raise Broken(f"{who}: progress fell from {old.status.progress} to {new.status.progress}")
            if old.status.phase.is_final and new.status.phase is not old.status.phase:
                raise Broken(f"{who} was {old.status.phase} and is {new.status.phase}")
        if new.metadata.deletion_timestamp is not None:
            self._asked.add(new.key)
        self._see_grant(old, new, who)

    def _see_grant(self, old: VirtualMachineOperation | None, new: VirtualMachineOperation, who: str) -> None:
        """A grant's node may run the VM from then on, until it says that it does not. Nobody else may have to."""
        grant = new.status.grant
        before = old.status.grant if old is not None else None
        if grant is None or (before is not None and before.epoch == grant.epoch):
            return
        may_run = self._may_run[grant.uuid]
        if grant.action is Action.START and may_run - {grant.node}:
            raise Broken(
                f"{who} is granted to {grant.node}, while it may run on {', '.join(sorted(may_run))}: no evidence"
            )
        if grant.action is not Action.STOP:
            may_run.add(grant.target)
        if grant.action is Action.MIGRATE and not grant.adopt:
            self._check_cap(who)

    def _check_cap(self, who: str) -> None:
        schedulable = [node for node in self._timeline.all(Node) if node.is_schedulable]
        moving = [g for g in self._grants() if g.action is Action.MIGRATE]
        if len(moving) > len(schedulable):
            raise Broken(f"{who} is granted: {len(moving)} migrations, and {len(schedulable)} schedulable nodes")

    def _see_inventory(self, old: NodeInventory | None, new: NodeInventory) -> None:
        """A host that reported a domain as running, or as gone."""
        for uuid, seen in new.domains.items():
            if old is not None and old.domains.get(uuid) == seen:
                continue
            if seen.state in _GONE:
                self._may_run[uuid].discard(new.name)
            elif seen.began >= self._gone_at.get((uuid, new.name), 0):  # else it was read before that answer
                self._may_run[uuid].add(new.name)

    def see_report(self, node: str, kind: str, body: dict[str, Any], number: int) -> None:
        """Look at a report: an answer that a host does not have a domain is what a settlement goes by."""
        if kind != "Answer" or (body["reading"]["present"] and body["reading"].get("state") not in _GONE):
            return
        found = self._timeline.find(VirtualMachineOperation, str(body["order"]).partition("#")[0])
        if found is not None and found.status.grant is not None:
            self._may_run[found.status.grant.uuid].discard(node)
            self._gone_at[found.status.grant.uuid, node] = number

    def _see_removed(self, old: VirtualMachineOperation) -> None:
        if not old.status.phase.is_final and old.key not in self._asked and old.status.grant is not None:
            raise Broken(f"op/{self._timeline.operation_name(old)} is lost: it was {old.status.phase}")

    # --- as hosts are asked ----------------------------------------------------------------------------------------

    def see_call(self, host: str, method: str, arguments: tuple[Any, ...]) -> None:
        """Look at a call before it is carried out."""
        if method not in _CHANGES_DOMAIN or not arguments:
            return
        if method == "start":
            marker = arguments[1]
            assert isinstance(marker, Marker)
            self._check_start(host, f"{marker.project}/{marker.name}", marker.incarnation)
            return
        uuid = getattr(arguments[0], "uuid", arguments[0])
        machine = self._world.host(host).machines.get(uuid)
        marker = machine.reading().marker if machine is not None else None
        vm = self._timeline.find(VirtualMachine, f"{marker.project}/{marker.name}") if marker is not None else None
        if machine is not None and marker is None and method not in {"mark", "undefine"}:
            raise Broken(f"{host} is asked to {method} a domain that is not ours")
        if method == "destroy" and vm is not None and marker is not None and marker.incarnation > vm.status.incarnation:
            raise Broken(f"{host} is asked to destroy incarnation {marker.incarnation} of {vm.name}, a higher one")

    def _check_start(self, host: str, vm: str, incarnation: int) -> None:
        for name, other in self._world.hosts.items():
            for uuid, machine in other.machines.items():
                if name != host and vm in machine.keys and machine.is_active and uuid not in self._doubled_by_hand:
                    text = f"{vm} is started on {host} (incarnation {incarnation}) while {name} has it"
                    raise Broken(f"{text}: {machine.state}")

    # --- after every step ------------------------------------------------------------------------------------------

    def check_hosts(self) -> None:
        """The hosts' truth: cheap, and looked at after whatever happened."""
        outgoing: defaultdict[str, int] = defaultdict(int)
        incoming: defaultdict[str, int] = defaultdict(int)
        running: defaultdict[str, list[str]] = defaultdict(list)
        for name, host in self._world.hosts.items():
            for uuid, machine in host.machines.items():
                if machine.executes:
                    running[uuid].append(name)
                if machine.migration is not None:
                    (incoming if machine.state is DomainState.INCOMING else outgoing)[name] += 1
        for uuid, hosts in running.items():
            self._see_copies(uuid, hosts)
        for uuid in [uuid for uuid, was in self._doubled_by_hand.items() if was and len(running[uuid]) <= 1]:
            del self._doubled_by_hand[uuid]
        config = self._store.config
        for what, counts, limit in (
            ("leave", outgoing, config.outbound_per_node),
            ("reach", incoming, config.inbound_per_node),
        ):
            for name, count in counts.items():
                if limit and count > limit:
                    raise Broken(f"{count} migrations {what} {name}, {limit} may")

    def check_redis(self) -> None:
        """All of Redis's indexes are what the documents say, no more and no less; every open grant has a timer."""
        self._check_limits()
        timed = self._check_indexes()
        for operation in self._operations():
            if operation.status.grant is not None and operation.key not in timed:
                raise Broken(
                    f"op/{self._timeline.operation_name(operation)} has an open grant and no timer: it is lost"
                )

    def _check_limits(self) -> None:
        config = self._store.config
        outgoing: defaultdict[str, int] = defaultdict(int)
        incoming: defaultdict[str, int] = defaultdict(int)
        for grant in self._grants():
            if grant.action is Action.MIGRATE:
                outgoing[grant.node] += 1
                incoming[grant.target] += 1
        for node, count in outgoing.items():
            if count > config.outbound_per_node:
                raise Broken(f"{count} migrations are granted to leave {node}, {config.outbound_per_node} may")
        for node, count in incoming.items():
            if config.inbound_per_node and count > config.inbound_per_node:
                raise Broken(f"{count} migrations are granted to reach {node}, {config.inbound_per_node} may")

    def _check_indexes(self) -> set[str]:
        """Compare; give the operations that have a timer, which is read along."""
        overhead = self._store.config.memory_overhead_mib
        wanted = {e for document in self._timeline.documents.values() for e in indexes(document, overhead)}
        names = sorted(str(key) for key in self._store.redis.scan_iter(count=10_000) if str(key).startswith(_INDEXES))
        pipe = self._store.redis.pipeline(transaction=False)
        for timers in (keys.DEADLINES, keys.AWAITING):
            pipe.zrange(timers, 0, -1)
        for name in names:
            if name.startswith(_SETS):
                pipe.smembers(name)
            else:
                pipe.hgetall(name)
        found: set[IndexEntry] = set()
        deadlines, awaiting, *contents = pipe.execute()
        for name, held in zip(names, contents, strict=True):
            pairs = held.items() if isinstance(held, dict) else [(member, None) for member in held]
            found |= {IndexEntry(name, member, value) for member, value in pairs}
        timed = {*deadlines, *awaiting}
        # Questions that no operation asks (adoption's) are orders with a timer of their own.
        asked = {entry for entry in found - wanted if entry.key.startswith("orders:") and entry.member in timed}
        for entry in sorted(found - wanted - asked, key=str):
            raise Broken(f"{entry.key} has {entry.member} {entry.value or ''}, which no document asks for")
        for entry in sorted(wanted - found, key=str):
            raise Broken(f"{entry.key} lacks {entry.member} {entry.value or ''}")
        return timed

    # --- at the end ------------------------------------------------------------------------------------------------

    def check_end(self) -> None:
        """Every operation has ended, or says why not; each key is a declared one."""
        self.check_hosts()
        for uuid, was in self._doubled_by_hand.items():
            raise Broken(
                f"{self._names.get(uuid, uuid)} {'still runs twice' if was else 'was to run twice, and never did'}"
            )
        self.check_redis()
        check_keys(self._store.redis)
        for operation in self._operations():
            condition = find_condition(operation.status.conditions, "Completed")
            if condition is None or not condition.reason or not condition.message:
                raise Broken(f"op/{self._timeline.operation_name(operation)} is {operation.status.phase}, and not why")

    def _operations(self) -> list[VirtualMachineOperation]:
        return self._timeline.all(VirtualMachineOperation)

    def _grants(self) -> list[Grant]:
        return [operation.status.grant for operation in self._operations() if operation.status.grant is not None]

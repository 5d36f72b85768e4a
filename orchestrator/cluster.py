"""The public Python API: a herd, its VMs, nodes and operations.

from orchestrator import Cluster

cluster = Cluster()                      # VMHERD_SERVER and VMHERD_TOKEN, or VMHERD_REDIS_URL
op = cluster.evict("linux-vm")
for progress in op.progress():
    print(progress.percent, progress.message)
print(op.wait(timeout=600).phase)
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from orchestrator.celery_app import CeleryMessenger, make_app
from orchestrator.client import Client, Scope
from orchestrator.client.local import LocalClient
from orchestrator.client.place import find_place
from orchestrator.client.remote import RemoteClient
from orchestrator.errors import NotFound, Refused, VersionExpired, WaitTimeout
from orchestrator.planner.adoption import Planned
from orchestrator.planner.drain import DrainPlan
from orchestrator.resources import (
    DEFAULT_NAMESPACE,
    Node,
    NodeDrain,
    OperationPhase,
    OperationType,
    Resource,
    RunPolicy,
    VirtualMachine,
    VirtualMachineOperation,
    find_condition,
    make_key,
)
from orchestrator.resources.drain import DrainSpec
from orchestrator.resources.vmop import MigrateTo
from orchestrator.services import adoption, manifests, operations
from orchestrator.services.adoption_orders import ADOPTING, RELEASING
from orchestrator.services.context import Context
from orchestrator.settings import settings
from orchestrator.store import ChangeType, Store

R = TypeVar("R", bound=Resource)

_PATIENCE_S = 60.0
"""A server of the API that is restarted is back within this time."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an operation is.

    Attributes:
        percent: 0 to 100; never falls.
        reason: Of its condition Completed (`Syncing`, `TargetUnschedulable`, ...).
        message: For people.
    """

    phase: OperationPhase
    percent: int
    reason: str
    message: str


class Operation:
    """A handle on one operation. Its values are as of the last look; `wait` and `progress` look on."""

    def __init__(self, cluster: "Cluster", resource: VirtualMachineOperation) -> None:
        self._cluster = cluster
        self.resource = resource

    @property
    def name(self) -> str:
        """Its name."""
        return self.resource.name

    @property
    def phase(self) -> OperationPhase:
        """Its phase as of the last look."""
        return self.resource.status.phase

    @property
    def message(self) -> str:
        """What its condition says as of the last look."""
        return self.resource.message

    def refresh(self) -> "Operation":
        """Look again.

        Raises:
            NotFound: It was deleted.
        """
        self.resource = self._cluster.client.get(VirtualMachineOperation, self.resource.key)
        return self

    def wait(self, timeout: float | None = None) -> "Operation":
        """Wait until it has ended.

        Args:
            timeout: Seconds; None waits for ever.

        Returns:
            Itself, with its last phase: Completed or Failed; Terminating when it was deleted before it began.

        Raises:
            WaitTimeout: It has not ended yet, and may still.
        """
        for _ in self.progress(timeout):
            pass
        return self

    def progress(self, timeout: float | None = None) -> Iterator[Progress]:
        """Follow it until it has ended.

        Yields:
            Where it is now, and then each change.

        Raises:
            WaitTimeout: It has not ended in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        shown: Progress | None = None
        for resource in self._cluster.follow(self.resource, deadline):
            if resource is not None:
                self.resource = resource
            now = self._progress()
            if now != shown:
                shown = now
                yield now
            if resource is None or self.phase.is_final:
                return
        raise WaitTimeout(
            f"VirtualMachineOperation {self.name!r} is {self.phase} after {timeout:g} s: {self.message or 'no reason'}"
        )

    def abort(self, timeout: float | None = 60) -> "Operation":
        """Abort it, and wait for what comes of it.

        Returns:
            Itself: Failed with reason Aborted (the VM runs on at its source), or Completed (it was too late).
        """
        try:
            self.resource = self._cluster.client.delete(VirtualMachineOperation, self.resource.key)
        except NotFound:
            return self
        if self.resource.status.grant is None:
            return self
        return self.wait(timeout)

    def _progress(self) -> Progress:
        status = self.resource.status
        condition = next((c for c in status.conditions if c.type == "Completed"), None)
        return Progress(
            status.phase, status.progress, condition.reason if condition else "", condition.message if condition else ""
        )


class Cluster:
    """A herd, through its API or on its Redis.

    Through the API it has a token's rights, and a server that is away for some seconds is waited for by `wait` and
    `progress`. `adopt` and `release` work on Redis only.

    Args:
        url: Of its API (`https://host:port`; the token and the CA are as the settings say) or of its Redis
            (`redis://...`). By default `VMHERD_SERVER`, or `VMHERD_KUBECONFIG`, or else `VMHERD_REDIS_URL`.
        namespace: The project that names refer to.

    Attributes:
        client: All that it does goes through this.

    Raises:
        Invalid: The settings can't be used.
    """

    def __init__(self, url: str | None = None, namespace: str = DEFAULT_NAMESPACE) -> None:
        self.namespace = namespace
        self.client: Client = _open(url)

    @property
    def store(self) -> Store:
        """Its Redis.

        Raises:
            Refused: It works through the API.
        """
        return self.context.store

    @property
    def context(self) -> Context:
        """What services work with.

        Raises:
            Refused: It works through the API.
        """
        if not isinstance(self.client, LocalClient):
            raise Refused("that works on Redis itself, and this Cluster goes through the API: give it Redis's URL")
        return self.client.context

    def __enter__(self) -> "Cluster":
        """Use it, and close it at the end."""
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self.client.close()

    def evict(self, vm: str, *, force: bool | None = None) -> Operation:
        """Move a VM to another node of the planner's choice; returns at once.

        Args:
            vm: Its name.
            force: Whether the guest may be throttled; None leaves it to the VM's liveMigrationPolicy.

        Raises:
            NotFound: No such VM.
            Refused: It is not Running, or another operation of it is not finished.
        """
        return self._create(vm, OperationType.EVICT, force=force)

    def migrate(
        self, vm: str, node: str = "", node_selector: dict[str, str] | None = None, *, force: bool | None = None
    ) -> Operation:
        """Move a VM to a node, or to one that has these labels; returns at once. `force` is as in `evict`."""
        to = MigrateTo(node_name=node, node_selector=node_selector or {})
        return self._create(vm, OperationType.MIGRATE, to, force=force)

    def start(self, vm: str) -> Operation:
        """Start a VM; returns at once. Raises as `evict`."""
        return self._create(vm, OperationType.START)

    def stop(self, vm: str, *, force: bool = False) -> Operation:
        """Ask a VM's guest to power off, or pull its plug; returns at once. Raises as `evict`.

        It takes the place of a start or a migration that is under way, and, by force, of a plain stop or restart.
        """
        return self._create(vm, OperationType.STOP, force=force or None)

    def restart(self, vm: str, *, force: bool = False) -> Operation:
        """Stop a VM as `stop` does, and start it anew; returns at once. Raises as `evict`."""
        return self._create(vm, OperationType.RESTART, force=force or None)

    def delete_vm(self, vm: str) -> VirtualMachine:
        """Delete a VM: it is stopped and then removed; returns at once.

        Raises:
            NotFound: No such VM.
        """
        return self.client.delete(VirtualMachine, make_key(vm, self.namespace))

    def create(self, manifest: dict[str, Any]) -> manifests.Creatable:
        """Create a resource from a manifest."""
        return self.client.create(manifests.read_manifest(manifest, ""))

    def operation(self, name: str) -> Operation:
        """Give a handle on an operation."""
        return Operation(self, self.client.get(VirtualMachineOperation, make_key(name, self.namespace)))

    def vm(self, name: str) -> VirtualMachine:
        """Read a VM."""
        return self.client.get(VirtualMachine, make_key(name, self.namespace))

    def vms(self) -> list[VirtualMachine]:
        """Read all VMs of the namespace, by name."""
        return self.client.all(VirtualMachine, self.namespace)

    def operations(self) -> list[VirtualMachineOperation]:
        """Read all operations of the namespace, by name."""
        return self.client.all(VirtualMachineOperation, self.namespace)

    def node(self, name: str) -> Node:
        """Read a node."""
        return self.client.get(Node, name)

    def nodes(self) -> list[Node]:
        """Read all nodes, by name."""
        return self.client.all(Node)

    def cordon(self, node: str) -> bool:
        """Let no VM start or land on a node; tells whether that is new."""
        return self.client.set_unschedulable(node, unschedulable=True)

    def uncordon(self, node: str, *, bring_back: bool | None = None) -> bool:
        """Let VMs start and land on a node again; tells whether that is new.

        Args:
            node: Its name.
            bring_back: Whether what its last drain moved comes home; None leaves that to the settings.
        """
        return self.client.set_unschedulable(node, unschedulable=False, bring_back=bring_back)

    def drain(
        self,
        node: str,
        *,
        selector: str = "",
        timeout: float | None = None,
        partial: bool = False,
        requested_by: str = "Python",
    ) -> NodeDrain:
        """Have a node emptied by the control plane; returns at once. `follow` the result to see how far it is.

        Args:
            node: Its name.
            selector: Labels of the VMs that are to leave; empty: all.
            timeout: Seconds after which it has failed; None: never.
            partial: Though the rest of the herd has no place for some of them.
            requested_by: For people.

        Raises:
            NotFound: No such node.
            Refused: Some VMs would have no place: says which, and why. Nothing was begun.
        """
        spec = DrainSpec(requested_by=requested_by, selector=selector, timeout_s=timeout or 0, partial=partial)
        return self.client.begin_drains([node], spec)[0]

    def plan_drain(self, *names: str, selector: str = "") -> DrainPlan:
        """Say where each VM of some nodes would go, in which order, how long that takes, and what has no place."""
        return self.client.plan_drain(names, DrainSpec(selector=selector))

    def stop_drain(self, node: str, why: str = "stopped from Python") -> NodeDrain:
        """End a drain: what has not begun is dropped, what has goes on; the node stays cordoned."""
        return self.client.cancel_drain(node, why)

    def adopt(
        self,
        node: str,
        *domains: str,
        dry_run: bool = False,
        run_policy: RunPolicy = RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY,
        timeout: float | None = None,
    ) -> tuple[Planned, ...]:
        """Take over running persistent domains of a node, without stopping them; returns when all have ended.

        Args:
            node: Its name.
            domains: By name or UUID; none: all that can be adopted.
            dry_run: Only say what would be done.
            run_policy: Of the VMs, which are made in this namespace.
            timeout: Seconds to wait for all of them; None waits for ever.

        Returns:
            What was planned for each; the refused ones say why, and are left alone.

        Raises:
            NotFound: The node, or a domain that was named, does not exist; nothing was done.
            Refused: The node is not Ready, or one of them could not be adopted after all: says why. The others are.
            WaitTimeout: Not all have ended in time, and may still.
        """
        plans, unknown = adoption.plan(self.context, node, domains, namespace=self.namespace, run_policy=run_policy)
        if unknown:
            raise NotFound(f"node {node!r} has no domain {', '.join(map(repr, unknown))}")
        if dry_run:
            return plans
        wanted = [planned for planned in plans if not planned.is_refused]
        begun = [adoption.adopt(self.context, node, planned, self.namespace) for planned in wanted]
        deadline = None if timeout is None else time.monotonic() + timeout
        failed = [why for vm in begun if (why := self._handed_over(vm, ADOPTING, deadline))]
        if failed:
            raise Refused("; ".join(failed))
        return plans

    def release(self, vm: str, timeout: float | None = None) -> str:
        """Give an adopted VM back: it is defined on its node as it was, and runs on; the VM is removed.

        Returns:
            What was done, and where, for people.

        Raises:
            NotFound: No such VM.
            Refused: It can't be given back: says why. It stays a VM.
            WaitTimeout: It has not ended in time, and may still.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        released = adoption.release(self.context, make_key(vm, self.namespace))
        last = released
        for current in self.follow(released, deadline):
            last = current or last
            condition = find_condition(last.status.conditions, RELEASING)
            message = condition.message if condition is not None else ""
            if current is None or condition is None or condition.status == "False":
                if condition is not None and condition.reason == "ReleaseFailed":
                    raise Refused(f"VirtualMachine {vm!r}: {message}")
                return message
        raise WaitTimeout(f"VirtualMachine {vm!r} is still being released after {timeout:g} s")

    def _handed_over(self, vm: VirtualMachine, kind: str, deadline: float | None) -> str:
        """Wait for the end of an adoption; says why it failed, or nothing."""
        last = vm
        for current in self.follow(vm, deadline):
            last = current or last
            condition = find_condition(last.status.conditions, kind)
            if current is None or condition is None:
                return f"{vm.key}: {condition.message}" if condition is not None else ""
        raise WaitTimeout(f"VirtualMachine {vm.name!r} is still being adopted; goes on all the same")

    def follow(self, resource: R, deadline: float | None = None) -> Iterator[R | None]:
        """Follow one resource, without polling.

        Yields:
            It as it is now and after each change; None once, at the end, when it was deleted.
            Ends at the deadline (of `time.monotonic`).
        """
        scope = Scope((type(resource),), resource.metadata.namespace or None, resource.name)
        loaded = self.client.read(scope)
        current = loaded.resources[resource.kind_name].get(resource.key)
        if current is None:
            last = self.client.last_of(resource)
            if last is not None:
                yield last
            yield None
            return
        yield current  # type: ignore[misc]
        try:
            for change in self.client.watch(scope, loaded.version, deadline):
                if change is None:
                    continue
                yield change.resource  # type: ignore[misc]
                if change.type is ChangeType.DELETED:
                    yield None
                    return
        except VersionExpired:  # Redis was restarted, or we were away for long: look, and go on from there
            yield from self.follow(resource, deadline)

    def _create(
        self, vm: str, kind: OperationType, to: MigrateTo | None = None, *, force: bool | None = None
    ) -> Operation:
        wanted = operations.new_operation(vm, kind, self.namespace, to, force=force)
        return Operation(self, self.client.create(wanted))


def _open(url: str | None) -> Client:
    config = settings()
    is_redis = url is not None and not url.startswith(("http:", "https:"))
    place = None if is_redis else find_place(config, url or "")
    if place is not None:
        return RemoteClient(place, patience_s=_PATIENCE_S)
    address = url or config.redis_url.get_secret_value()
    return LocalClient(Context(Store.open(address), CeleryMessenger(make_app("vmherd-client", url=address))))


__all__ = ["Cluster", "Operation", "Progress"]

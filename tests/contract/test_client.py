"""One suite for both ways to the herd: on Redis itself, and through the API. What differs is a bug of one of them."""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import cast

import pytest
import yaml

from orchestrator.client import Scope
from orchestrator.errors import AlreadyExists, Invalid, NotFound, Refused, StoreUnavailable, VersionExpired
from orchestrator.resources import (
    Event,
    Node,
    OperationPhase,
    OperationType,
    RunPolicy,
    VirtualMachine,
    VirtualMachineClass,
    VirtualMachineOperation,
    VmPhase,
    parse,
)
from orchestrator.resources.scheduling import Taint
from orchestrator.services.manifests import Applied, read_manifest
from orchestrator.services.operations import new_operation
from orchestrator.store import Change, ChangeType, Store
from orchestrator.store.store import Loaded
from tests.builders import a_node, a_vm, granted_operation
from tests.contract.clients import WAYS, Herd, is_stored
from tests.integration.command import vm_manifest
from tests.redis_server import RedisServer
from tests.waiting import wait_until


@pytest.fixture(params=WAYS)
def herd(request: pytest.FixtureRequest, redis_url: str, store: Store) -> Iterator[Herd]:
    with WAYS[request.param](redis_url) as client:
        yield Herd(client, store, redis_url)


def elsewhere(name: str) -> VirtualMachine:
    vm = a_vm(f"{name}-elsewhere")
    return vm.with_(metadata=vm.metadata.with_(name=name, namespace="other"))


def manifest(name: str, **spec: object) -> VirtualMachine:
    vm = read_manifest(yaml.safe_load(vm_manifest(name, **spec)))
    assert isinstance(vm, VirtualMachine)
    return vm


def a_class(name: str = "c1") -> VirtualMachineClass:
    body = {"apiVersion": "virtualization.deckhouse.io/v1alpha2", "kind": "VirtualMachineClass"}
    whole = {**body, "metadata": {"name": name}, "spec": {"cpu": {"type": "Model", "model": "qemu64"}}}
    return parse(VirtualMachineClass, whole)


class TestReading:
    def test_as_it_is_stored_in_every_field(self, herd: Herd) -> None:
        node = a_node("n1")
        labelled = node.with_(metadata=node.metadata.with_(labels={"role": ""}))
        herd.put(labelled, a_vm("a", node="n1"), a_vm("b", node=""), granted_operation("move", "a"))
        for kind in (Node, VirtualMachine, VirtualMachineOperation, Event, VirtualMachineClass):
            assert herd.client.all(kind) == herd.store.all(kind)
        vm = herd.client.get(VirtualMachine, "default/a")
        assert vm == herd.store.get(VirtualMachine, "default/a")
        assert vm.created_version > 0
        assert herd.client.find(Node, "n1") == herd.store.get(Node, "n1")

    def test_what_is_not_there(self, herd: Herd) -> None:
        assert herd.client.find(VirtualMachine, "default/x") is None
        with pytest.raises(NotFound) as missing:
            herd.client.get(VirtualMachine, "other/x")
        assert str(missing.value) == "VirtualMachine 'x' not found in namespace 'other'"
        with pytest.raises(NotFound, match=r"^Node 'x' not found$"):
            herd.client.get(Node, "x")
        assert herd.client.all(VirtualMachine) == []
        assert herd.client.many(VirtualMachine, ["default/x"]) == {}

    def test_by_namespace_and_by_name(self, herd: Herd) -> None:
        herd.put(a_vm("a"), a_vm("b"), elsewhere("a"), a_node("n1"))
        assert [vm.key for vm in herd.client.all(VirtualMachine)] == ["default/a", "default/b", "other/a"]
        assert [vm.key for vm in herd.client.all(VirtualMachine, "other")] == ["other/a"]
        assert [node.key for node in herd.client.all(Node, "other")] == ["n1"]
        found = herd.client.many(VirtualMachine, ["default/b", "default/b", "other/b", "other/a"])
        assert list(found) == ["default/b", "other/a"]
        for scope, keys in (
            (Scope((VirtualMachine,), "default"), {"default/a", "default/b"}),
            (Scope((VirtualMachine,), "default", "a"), {"default/a"}),
            (Scope((VirtualMachine,), None, "a"), {"default/a", "other/a"}),
            (Scope((VirtualMachine,), "default", "x"), set()),
        ):
            assert herd.client.read(scope).resources["VirtualMachine"].keys() == keys

    def test_several_kinds_as_of_one_version(self, herd: Herd) -> None:
        herd.put(a_node("n1"), a_vm("a"))
        loaded = herd.client.read(Scope((Node, VirtualMachine)))
        assert loaded.version == herd.store.version()
        assert {kind: set(found) for kind, found in loaded.resources.items()} == {
            "Node": {"n1"},
            "VirtualMachine": {"default/a"},
        }


class Follower:
    """Takes what a watch gives, in a thread."""

    def __init__(self, herd: Herd, scope: Scope, since: int, deadline_s: float = 20) -> None:
        self.seen: list[Change] = []
        self.idle = 0
        self.error: Exception | None = None
        self._watch = cast("Generator[Change | None]", herd.client.watch(scope, since, time.monotonic() + deadline_s))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            for change in self._watch:
                if change is None:
                    self.idle += 1
                else:
                    self.seen.append(change)
                if self._stop.is_set():
                    return
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error
        finally:
            self._watch.close()

    def wait(self, count: int) -> list[tuple[str, str]]:
        wait_until(lambda: len(self.seen) >= count or self.error, 15, lambda: f"{self.seen} {self.error}")
        return [(change.type.value, change.resource.key) for change in self.seen]

    def end(self) -> None:
        self._stop.set()
        self._thread.join(15)
        assert not self._thread.is_alive()


@pytest.fixture
def following(herd: Herd) -> Iterator[Callable[..., Follower]]:
    made: list[Follower] = []

    def follow(scope: Scope, since: int | None = None) -> Follower:
        made.append(Follower(herd, scope, herd.client.read(scope).version if since is None else since))
        return made[-1]

    yield follow
    for one in made:
        one.end()


class TestWatching:
    def test_each_change_in_its_order_and_nothing_else(self, herd: Herd, following: Callable[..., Follower]) -> None:
        herd.put(a_vm("before"))
        watch = following(Scope((VirtualMachine,), "default"))
        herd.put(a_vm("a"), elsewhere("a"), a_node("n1"))
        herd.change(a_vm("a"), phase=VmPhase.STOPPED)
        herd.store.must_commit(herd.store.batch().delete(herd.store.get(VirtualMachine, "default/a")))
        assert watch.wait(3) == [("ADDED", "default/a"), ("MODIFIED", "default/a"), ("DELETED", "default/a")]
        versions = [change.version for change in watch.seen]
        assert versions == sorted(versions)
        assert watch.seen[-1].version == herd.store.version()
        assert watch.seen[1].resource.status.phase is VmPhase.STOPPED  # type: ignore[attr-defined]

    def test_goes_on_from_a_version(self, herd: Herd, following: Callable[..., Follower]) -> None:
        herd.put(a_vm("a"))
        since = herd.store.version()
        herd.put(a_vm("b"))
        herd.put(a_vm("c"))
        assert following(Scope((VirtualMachine,)), since).wait(2) == [("ADDED", "default/b"), ("ADDED", "default/c")]

    def test_one_resource(self, herd: Herd, following: Callable[..., Follower]) -> None:
        herd.put(a_vm("a"), a_vm("b"))
        watch = following(Scope((VirtualMachine,), "default", "b"))
        herd.change(a_vm("a"), phase=VmPhase.STOPPED)
        herd.change(a_vm("b"), phase=VmPhase.STOPPED)
        assert watch.wait(1) == [("MODIFIED", "default/b")]

    def test_several_kinds(self, herd: Herd, following: Callable[..., Follower]) -> None:
        watch = following(Scope((VirtualMachine, Node)))
        herd.put(a_vm("a"), a_node("n1"), granted_operation("move", "a"))
        assert sorted(watch.wait(2)) == [("ADDED", "default/a"), ("ADDED", "n1")]

    def test_says_that_nothing_comes(self, herd: Herd, following: Callable[..., Follower]) -> None:
        watch = following(Scope((Node,)))
        wait_until(lambda: watch.idle, 10, "None")
        herd.put(a_node("n1"))
        assert watch.wait(1) == [("ADDED", "n1")]

    def test_ends_at_its_deadline(self, herd: Herd) -> None:
        assert list(herd.client.watch(Scope((Node,)), herd.store.version(), time.monotonic())) == []

    def test_a_version_that_this_redis_never_had(self, herd: Herd) -> None:
        with pytest.raises(VersionExpired):
            next(herd.client.watch(Scope((Node,)), herd.store.version() + 1_000))

    def test_a_version_that_is_forgotten(self, herd: Herd) -> None:
        herd.put(a_node("n1"))
        since = herd.store.version()
        herd.store.must_commit(herd.store.batch().effect("SKIP", 2**20))
        herd.put(a_node("n2"))
        with pytest.raises(VersionExpired):
            next(herd.client.watch(Scope((Node,)), since))

    def test_the_last_of_what_is_gone(self, herd: Herd) -> None:
        herd.put(a_vm("a"), a_vm("b"))
        known = herd.client.get(VirtualMachine, "default/a")
        herd.change(a_vm("a"), phase=VmPhase.STOPPED)
        herd.store.must_commit(herd.store.batch().delete(herd.store.get(VirtualMachine, "default/a")))
        herd.put(a_vm("a").with_(metadata=known.metadata.with_(uid="another", resource_version="")))
        last = herd.client.last_of(known)
        assert last is not None
        assert (last.metadata.uid, last.status.phase) == (known.metadata.uid, VmPhase.STOPPED)


class TestCreating:
    def test_gives_what_is_stored(self, herd: Herd) -> None:
        wanted = manifest("a")
        created = herd.client.create(wanted.with_(metadata=wanted.metadata.with_(labels={"empty": "", "x": "y"})))
        assert is_stored(herd, created)
        assert created.metadata.labels == {"empty": "", "x": "y"}
        made = herd.client.create(a_class())
        assert is_stored(herd, made)

    def test_an_operation_with_a_name_of_the_servers(self, herd: Herd) -> None:
        herd.put(a_vm("a", node="n1", policy=RunPolicy.MANUAL))
        wanted = new_operation("a", OperationType.STOP, force=True)
        created = herd.client.create(wanted)
        assert is_stored(herd, created)
        assert created.name.startswith("stop-a-")
        assert (created.spec.force, created.status.phase) == (True, OperationPhase.PENDING)

    def test_what_is_there_already(self, herd: Herd) -> None:
        herd.client.create(manifest("a"))
        herd.client.create(a_class())
        herd.put(a_vm("b", node="n1"))
        wanted = new_operation("b", OperationType.EVICT)
        named = wanted.with_(metadata=wanted.metadata.with_(name="move", generate_name=""))
        herd.client.create(named)
        for again in (manifest("a"), a_class(), named):
            with pytest.raises(AlreadyExists, match="already exists"):
                herd.client.create(again)

    def test_what_admission_refuses(self, herd: Herd) -> None:
        herd.put(a_vm("a", node="n1"))
        herd.client.create(new_operation("a", OperationType.EVICT))
        with pytest.raises(Refused, match="VMOP cannot be executed now"):
            herd.client.create(new_operation("a", OperationType.EVICT))
        with pytest.raises(NotFound, match="VirtualMachine 'x' not found in namespace 'default'"):
            herd.client.create(new_operation("x", OperationType.EVICT))

    def test_what_is_invalid_is_named_by_its_path(self, herd: Herd) -> None:
        herd.client.create(manifest("a"))
        taken = herd.store.get(VirtualMachine, "default/a").metadata.uid
        wanted = manifest("b")
        with pytest.raises(Invalid) as refused:
            herd.client.create(wanted.with_(metadata=wanted.metadata.with_(uid=taken)))
        assert refused.value.causes == (("metadata.uid", f"{taken} is that of VirtualMachine 'default/a' already"),)
        start = new_operation("a", OperationType.START, force=True)
        with pytest.raises(Invalid) as refused:
            herd.client.create(start)
        assert refused.value.causes == (("spec.force", "a Start can't be forced"),)


class TestApplying:
    def test_creates_changes_and_leaves_alone(self, herd: Herd) -> None:
        first, how = herd.client.apply(manifest("a"))
        assert how is Applied.CREATED
        assert is_stored(herd, first)
        same, how = herd.client.apply(manifest("a"))
        assert how is Applied.UNCHANGED
        assert is_stored(herd, same)
        changed, how = herd.client.apply(manifest("a", memory={"size": "256Mi"}))
        assert how is Applied.CONFIGURED
        assert is_stored(herd, changed)
        assert changed.spec.memory.size == "256Mi"  # type: ignore[union-attr]

    def test_labels_that_are_not_named_stay(self, herd: Herd) -> None:
        wanted = manifest("a")
        with_labels = wanted.with_(metadata=wanted.metadata.with_(labels={"mine": "1", "empty": ""}))
        herd.client.apply(with_labels)
        applied, _ = herd.client.apply(wanted.with_(metadata=wanted.metadata.with_(labels={"new": "2"})))
        assert applied.metadata.labels == {"mine": "1", "empty": "", "new": "2"}

    def test_classes(self, herd: Herd) -> None:
        assert herd.client.apply(a_class())[1] is Applied.CREATED
        assert herd.client.apply(a_class())[1] is Applied.UNCHANGED
        other = a_class().with_(spec=a_class().spec.with_(cpu=a_class().spec.cpu.with_(model="Nehalem")))
        changed, how = herd.client.apply(other)
        assert how is Applied.CONFIGURED
        assert is_stored(herd, changed)

    def test_an_operation_is_immutable(self, herd: Herd) -> None:
        herd.put(a_vm("a", node="n1"))
        wanted = new_operation("a", OperationType.EVICT)
        named = wanted.with_(metadata=wanted.metadata.with_(name="move", generate_name=""))
        assert herd.client.apply(named)[1] is Applied.CREATED
        assert herd.client.apply(named)[1] is Applied.UNCHANGED
        with pytest.raises(Invalid) as refused:
            herd.client.apply(named.with_(spec=named.spec.with_(force=True)))
        assert refused.value.causes == (("spec", ".spec is immutable"),)

    def test_a_change_of_an_older_version_is_a_persons_to_decide(self, herd: Herd) -> None:
        herd.client.apply(manifest("a"))
        old = herd.client.get(VirtualMachine, "default/a")
        herd.client.apply(manifest("a", memory={"size": "256Mi"}))
        with pytest.raises(Refused, match="changed since it was read"):
            herd.client.apply(old)
        assert herd.store.get(VirtualMachine, "default/a").spec.memory.size == "256Mi"


class TestDeleting:
    def test_a_vm_that_runs_is_stopped_first(self, herd: Herd) -> None:
        herd.put(a_vm("a", node="n1"))
        deleted = herd.client.delete(VirtualMachine, "default/a")
        assert deleted.metadata.deletion_timestamp is not None
        assert deleted.status.phase is VmPhase.TERMINATING
        assert herd.store.get(VirtualMachine, "default/a").metadata.deletion_timestamp is not None

    def test_what_has_no_grant_is_gone_at_once(self, herd: Herd) -> None:
        herd.put(a_vm("a", node="n1"))
        operation = herd.client.create(new_operation("a", OperationType.EVICT))
        deleted = herd.client.delete(VirtualMachineOperation, operation.key)
        assert (deleted.name, deleted.status.grant) == (operation.name, None)
        assert deleted.metadata.deletion_timestamp is not None
        assert herd.store.find(VirtualMachineOperation, operation.key) is None

    def test_what_has_a_grant_is_aborted(self, herd: Herd) -> None:
        herd.put(a_vm("a", node="n1"), granted_operation("move", "a"))
        deleted = herd.client.delete(VirtualMachineOperation, "default/move")
        assert deleted.status.grant is not None
        assert deleted.status.grant.cancel
        assert is_stored(herd, deleted)

    def test_a_class_that_is_used_stays(self, herd: Herd) -> None:
        herd.client.create(a_class())
        herd.client.create(manifest("a", virtualMachineClassName="c1"))
        with pytest.raises(Refused, match="is used by VirtualMachine default/a: give them another class first"):
            herd.client.delete(VirtualMachineClass, "c1")

    def test_what_is_not_there(self, herd: Herd) -> None:
        kinds: tuple[type[VirtualMachine | VirtualMachineOperation], ...] = (VirtualMachine, VirtualMachineOperation)
        for kind in kinds:
            with pytest.raises(NotFound, match=f"^{kind.kind_name} 'x' not found in namespace 'default'$"):
                herd.client.delete(kind, "default/x")
        with pytest.raises(NotFound, match=r"^VirtualMachineClass 'x' not found$"):
            herd.client.delete(VirtualMachineClass, "x")


class TestNodes:
    def test_cordon_and_uncordon(self, herd: Herd) -> None:
        herd.put(a_node("n1"))
        for unschedulable in (True, False):
            assert herd.client.set_unschedulable("n1", unschedulable=unschedulable)
            assert herd.store.get(Node, "n1").spec.unschedulable is unschedulable
            assert not herd.client.set_unschedulable("n1", unschedulable=unschedulable)
        reasons = {event.reason for event in herd.store.all(Event)}
        assert {"NodeCordoned", "NodeUncordoned"} <= reasons
        assert herd.store.get(Node, "n1").with_(metadata=a_node("n1").metadata, created_version=0) == a_node("n1")

    def test_labels(self, herd: Herd) -> None:
        herd.put(a_node("n1"))
        assert herd.client.set_labels("n1", {"zone": "a", "role": ""})
        assert herd.client.set_labels("n1", {"zone": None})
        assert not herd.client.set_labels("n1", {"role": "", "zone": None})
        assert herd.store.get(Node, "n1").metadata.labels == {"role": ""}
        with pytest.raises(Invalid) as refused:
            herd.client.set_labels("n1", {"kubernetes.io/hostname": "n2"})
        assert refused.value.causes[0][0] == "metadata.labels.kubernetes.io/hostname"
        with pytest.raises(Invalid):
            herd.client.set_labels("n1", {"a b": "c"})

    def test_taints(self, herd: Herd) -> None:
        herd.put(a_node("n1"))

        def taints() -> set[str]:
            return {str(taint) for taint in herd.store.get(Node, "n1").spec.taints}

        no_schedule = parse(Taint, {"key": "db", "value": "x", "effect": "NoSchedule"})
        prefer = parse(Taint, {"key": "db", "effect": "PreferNoSchedule"})
        assert herd.client.set_taints("n1", [no_schedule, prefer])
        assert taints() == {str(no_schedule), str(prefer)}
        assert not herd.client.set_taints("n1", [no_schedule])
        other = no_schedule.with_(value="y")
        assert herd.client.set_taints("n1", [other], [("db", "PreferNoSchedule")])
        assert taints() == {str(other)}
        assert herd.client.set_taints("n1", [], [("db", "")])
        assert taints() == set()

    def test_one_that_is_not_there(self, herd: Herd) -> None:
        with pytest.raises(NotFound, match=r"^Node 'x' not found$"):
            herd.client.set_unschedulable("x", unschedulable=True)
        with pytest.raises(NotFound, match=r"^Node 'x' not found$"):
            herd.client.set_labels("x", {"a": "b"})
        with pytest.raises(NotFound, match=r"^Node 'x' not found$"):
            herd.client.set_taints("x", [], [("a", "")])


@pytest.mark.parametrize("way", WAYS)
def test_a_herd_that_goes_away_is_told(way: str, durable_redis: RedisServer) -> None:
    with WAYS[way](durable_redis.url) as client:
        durable_redis.kill()
        with pytest.raises(StoreUnavailable):
            client.all(VirtualMachine)
        with pytest.raises(StoreUnavailable):
            client.create(manifest("a"))


def test_a_list_says_where_a_watch_goes_on(herd: Herd) -> None:
    herd.put(a_node("n1"))
    loaded = herd.client.read(Scope((Node,)))
    assert isinstance(loaded, Loaded)
    herd.put(a_node("n2"))
    change = next(herd.client.watch(Scope((Node,)), loaded.version, time.monotonic() + 10))
    assert change is not None
    assert (change.type, change.resource.key) == (ChangeType.ADDED, "n2")

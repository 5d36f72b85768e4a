"""Admission on real Redis: what manifests create and change, and that a refused one leaves nothing behind."""

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.errors import AlreadyExists, Invalid, NotFound, Refused, VmherdError
from orchestrator.resources import Node, OperationType, RunPolicy, VirtualMachine, VirtualMachineClass, VmPhase, parse
from orchestrator.resources.cpu import CpuRequest, NodeCpu
from orchestrator.resources.machine import Machine
from orchestrator.resources.node import HypervisorInfo
from orchestrator.resources.scheduling import Taint
from orchestrator.resources.vmclass import ClassPhase
from orchestrator.services.classes import delete_class, keep_classes, update_class
from orchestrator.services.context import Context
from orchestrator.services.manifests import Applied, apply_resource, create_resource, read_manifest
from orchestrator.services.nodes import set_labels, set_taints, set_unschedulable
from orchestrator.services.vms import update_vm
from orchestrator.store import Store, keys
from orchestrator.store.batch import encode
from tests.builders import a_cpu
from tests.declared_keys import check_keys
from tests.fakes import Outbox, Stage
from tests.manifests import ATTACKS, CLASS, STRUCTURED, TEMPLATE, manifest, replaced, spoilt

DISK = {"name": "root", "file": {"path": "/srv/root.raw"}}
SPEC: dict[str, Any] = {
    "runPolicy": "Manual",
    "cpu": {"cores": 1},
    "memory": {"size": "1Gi"},
    "disks": [DISK],
}


@pytest.fixture
def ctx(store: Store) -> Context:
    return Context(store, Outbox())


@pytest.fixture
def nodes(stage: Stage) -> Stage:
    """Three hosts that have told of their CPUs."""
    for name, features in {"n1": ("sse2", "avx"), "n2": ("sse2", "avx"), "n3": ("sse2",)}.items():
        tell_cpu(stage, name, a_cpu(*features))
    return stage


def tell_cpu(stage: Stage, name: str, cpu: NodeCpu) -> None:
    old = stage.store.get(Node, name)
    new = old.with_status(hypervisor=HypervisorInfo(migration_uri="x", cpu=cpu))
    stage.store.must_commit(stage.store.batch().put(old, new))


def contents(store: Store) -> dict[str, Any]:
    """All that Redis holds; what a wake-up or a repeated request leaves behind, which expires, aside."""
    dumped: dict[str, Any] = {}
    for key in store.redis.scan_iter():
        if not str(key).startswith(("wanted:", "request:")):
            dumped[str(key)] = store.redis.dump(key) if key != keys.VERSION else store.redis.get(key)
    return dumped


def a_vm(ctx: Context, name: str = "a", **spec: Any) -> VirtualMachine:
    return create_resource(ctx, changed(name, **spec))  # type: ignore[return-value]


def changed(name: str = "a", **spec: Any) -> VirtualMachine:
    return read_manifest(manifest("VirtualMachine", name, {**SPEC, **spec}))  # type: ignore[return-value]


def running(ctx: Context, vm: VirtualMachine, **status: Any) -> VirtualMachine:
    new = vm.with_status(**{"phase": VmPhase.RUNNING, "node_name": "n1", "incarnation": 1, **status})
    return ctx.store.must_commit(ctx.store.batch().put(vm, new))[0]  # type: ignore[return-value]


@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,  # every example clears up after itself
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
@given(spoilt(), st.booleans())
@example(replaced(STRUCTURED, ("spec", "disks", 0, "file", "path"), "/a\ud800"), True)
def test_a_spoilt_manifest_is_taken_whole_or_leaves_nothing(ctx: Context, document: Any, is_there: bool) -> None:
    store = ctx.store
    store.redis.flushall()
    if is_there:  # then it may be an update
        create_resource(ctx, read_manifest(replaced(STRUCTURED, ("metadata", "namespace"), "default")))
    before = contents(store)
    try:
        resource, how = apply_resource(ctx, read_manifest(document))
    except VmherdError as error:
        assert isinstance(error, Invalid | Refused | NotFound | AlreadyExists)  # noqa: PT017 - nothing else may come
        assert not isinstance(error, Invalid) or error.causes  # noqa: PT017
        assert contents(store) == before
    else:
        stored = store.get(type(resource), resource.key)
        assert encode(stored) == encode(resource)  # instants are kept to the millisecond
        assert (contents(store) == before) is (how is Applied.UNCHANGED)


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_an_attack_by_a_template_leaves_nothing(ctx: Context, attack: str) -> None:
    before = contents(ctx.store)
    with pytest.raises(Invalid, match=r"^spec\.domainTemplate: "):
        create_resource(ctx, read_manifest(replaced(TEMPLATE, ("spec", "domainTemplate"), attack)))
    assert contents(ctx.store) == before


class TestUpdates:
    def test_what_applies_at_once_does(self, ctx: Context) -> None:
        vm = running(ctx, a_vm(ctx))
        new = update_vm(ctx, changed(nodeSelector={"zone": "a"}, ipAddress="192.0.2.9"))
        assert new.metadata.generation == vm.metadata.generation + 1
        assert (new.status.restart_awaiting_changes, new.status.applied) == ((), None)
        assert new.status.ip_address == "192.0.2.9"
        assert new.metadata.uid == vm.metadata.uid

    def test_what_needs_a_restart_is_listed_and_the_machine_that_runs_keeps_its_place(self, ctx: Context) -> None:
        running(ctx, a_vm(ctx))
        claim = ctx.store.redis.hgetall(keys.claims("n1"))
        new = update_vm(ctx, changed(memory={"size": "8Gi"}, cpu={"cores": 4}))
        assert [change.path for change in new.status.restart_awaiting_changes] == ["spec.cpu.cores", "spec.memory.size"]
        assert new.running_spec.memory.size == "1Gi"
        assert ctx.store.redis.hgetall(keys.claims("n1")) == claim
        back = update_vm(ctx, changed())
        assert (back.status.applied, back.status.restart_awaiting_changes) == (None, ())
        assert back.metadata.generation == 3

    def test_one_that_does_not_run_has_nothing_to_wait_for(self, ctx: Context) -> None:
        a_vm(ctx)
        new = update_vm(ctx, changed(memory={"size": "8Gi"}))
        assert (new.status.applied, new.status.restart_awaiting_changes) == (None, ())

    def test_the_same_again_stores_nothing(self, ctx: Context) -> None:
        a_vm(ctx)
        vm, before = ctx.store.get(VirtualMachine, "default/a"), contents(ctx.store)
        assert update_vm(ctx, changed()) == vm
        assert contents(ctx.store) == before

    def test_labels_are_replaced_or_kept(self, ctx: Context) -> None:
        a_vm(ctx)
        other = changed()
        other = other.with_(metadata=other.metadata.with_(labels={"tier": "one"}))
        assert update_vm(ctx, other, keeps_metadata=True).metadata.labels == {"app": "db", "tier": "one"}
        assert update_vm(ctx, other).metadata.labels == {"tier": "one"}

    @pytest.mark.parametrize(
        ("meta", "error", "message"),
        [
            ({"uid": "11111111-1111-1111-1111-111111111111"}, Invalid, r"metadata\.uid: is immutable"),
            ({"resourceVersion": "1000"}, Refused, "changed since it was read"),
        ],
    )
    def test_what_cannot_be_changed_is_named(
        self, ctx: Context, meta: dict[str, str], error: type[Exception], message: str
    ) -> None:
        a_vm(ctx)
        before = contents(ctx.store)
        document = manifest("VirtualMachine", "a", {**SPEC, "priority": 5})
        with pytest.raises(error, match=message):
            apply_resource(ctx, read_manifest({**document, "metadata": {**document["metadata"], **meta}}))
        assert contents(ctx.store) == before

    def test_one_that_is_not_there_or_goes(self, ctx: Context) -> None:
        with pytest.raises(NotFound, match="VirtualMachine 'a' not found"):
            update_vm(ctx, changed())
        vm = running(ctx, a_vm(ctx))
        gone = vm.with_(metadata=vm.metadata.with_(deletion_timestamp=ctx.now()))
        ctx.store.must_commit(ctx.store.batch().put(vm, gone))
        with pytest.raises(Refused, match="is being deleted"):
            update_vm(ctx, changed(priority=5))

    def test_a_policy_that_wants_it_to_run_starts_it(self, stage: Stage) -> None:
        a_vm(stage.ctx)
        assert stage.operations() == []
        update_vm(stage.ctx, changed(runPolicy="AlwaysOn"))
        assert [o.spec.type for o in stage.operations()] == [OperationType.START]
        assert stage.vm("a").spec.run_policy is RunPolicy.ALWAYS_ON

    def test_apply_creates_changes_and_leaves_alone(self, ctx: Context) -> None:
        done = [apply_resource(ctx, changed(priority=p))[1] for p in (1, 1, 2)]
        assert done == [Applied.CREATED, Applied.UNCHANGED, Applied.CONFIGURED]
        vm_class = read_manifest(CLASS)
        assert [apply_resource(ctx, vm_class)[1] for _ in range(2)] == [Applied.CREATED, Applied.UNCHANGED]
        check_keys(ctx.store.redis)


class TestClasses:
    def test_a_class_is_ready_at_once_where_nodes_can_give_it(self, nodes: Stage) -> None:
        found = a_class(nodes, "fast", {"type": "Discovery"})
        assert (found.status.phase, found.status.available_nodes) == (ClassPhase.READY, ("n1", "n2", "n3"))
        assert found.status.cpu == CpuRequest(model="EPYC", vendor="AMD", features=frozenset({"sse2"}))
        with pytest.raises(AlreadyExists):
            a_class(nodes, "fast", {"type": "Host"})

    def test_it_follows_the_nodes_until_a_vm_has_it(self, nodes: Stage) -> None:
        a_class(nodes, "fast", {"type": "Discovery"})
        assert keep_classes(nodes.ctx, nodes.herd) == 0
        tell_cpu(nodes, "n3", a_cpu("sse2", "avx"))
        assert keep_classes(nodes.ctx, nodes.herd) == 1
        found = nodes.store.get(VirtualMachineClass, "fast")
        assert found.status.cpu is not None
        assert found.status.cpu.features == {"sse2", "avx"}
        vm = a_vm(nodes.ctx, virtualMachineClassName="fast")
        running(nodes.ctx, vm, machine=Machine(cpu_from=str(found.status.cpu)))
        tell_cpu(nodes, "n3", a_cpu("sse2"))
        keep_classes(nodes.ctx, nodes.herd)
        held = nodes.store.get(VirtualMachineClass, "fast")
        assert (held.status.cpu, held.status.available_nodes) == (found.status.cpu, ("n1", "n2"))
        assert keep_classes(nodes.ctx, nodes.herd) == 0

    def test_a_changed_class_waits_for_the_restart_of_its_vms(self, nodes: Stage) -> None:
        found = a_class(nodes, "fast", {"type": "Model", "model": "Nehalem"})
        vm = a_vm(nodes.ctx, virtualMachineClassName="fast")
        running(nodes.ctx, vm, machine=Machine(cpu_from=str(found.status.cpu)))
        update_class(nodes.ctx, found.with_(spec=found.spec.with_(cpu=found.spec.cpu.with_(model="qemu64"))))
        keep_classes(nodes.ctx, nodes.herd)
        (change,) = nodes.vm("a").status.restart_awaiting_changes
        assert change.path == "VirtualMachineClass/fast:spec.cpu"
        assert (change.current_value, change.desired_value) == ("custom Nehalem", "custom qemu64")

    def test_a_vm_is_told_of_its_class_and_waits_for_it(self, nodes: Stage) -> None:
        a_vm(nodes.ctx, virtualMachineClassName="fast", runPolicy="AlwaysOn")
        keep_classes(nodes.ctx, nodes.herd)
        assert condition(nodes.vm("a"), "VirtualMachineClassReady") == "VirtualMachineClass 'fast' not found"
        assert nodes.grant() == []
        assert nodes.operations()[0].message == "VirtualMachineClass 'fast' not found"
        a_class(nodes, "fast", {"type": "Features", "features": ["avx"]}, nodeSelector={"matchLabels": {"zone": "a"}})
        set_labels(nodes.ctx, "n2", {"zone": "a"})
        set_labels(nodes.ctx, "n3", {"zone": "a"})
        keep_classes(nodes.ctx, nodes.herd)
        assert condition(nodes.vm("a"), "VirtualMachineClassReady") == ""
        (message,) = nodes.grant()
        assert message.queue.startswith("node.n2.")
        grant = nodes.operations()[0].status.grant
        assert grant is not None
        assert 'cpu="custom qemu64 +avx"' in grant.domain_xml

    def test_one_that_is_used_is_not_deleted(self, nodes: Stage) -> None:
        a_class(nodes, "fast", {"type": "Host"})
        a_vm(nodes.ctx, virtualMachineClassName="fast")
        with pytest.raises(Refused, match="is used by VirtualMachine default/a"):
            delete_class(nodes.ctx, "fast")
        update_vm(nodes.ctx, changed())
        delete_class(nodes.ctx, "fast")
        assert nodes.store.find(VirtualMachineClass, "fast") is None

    def test_a_class_is_in_no_namespace(self, ctx: Context) -> None:
        document = replaced(CLASS, ("metadata", "namespace"), "default")
        with pytest.raises(Invalid, match=r"metadata\.namespace: a VirtualMachineClass is in no namespace"):
            read_manifest(document)
        assert create_resource(ctx, read_manifest(CLASS, "project")).key == "fuzz"


class TestNodes:
    def test_labels(self, nodes: Stage) -> None:
        assert set_labels(nodes.ctx, "n1", {"zone": "a", "disk": "ssd"})
        assert not set_labels(nodes.ctx, "n1", {"zone": "a"})
        assert set_labels(nodes.ctx, "n1", {"zone": None})
        assert nodes.store.get(Node, "n1").metadata.labels == {"kubernetes.io/hostname": "n1", "disk": "ssd"}
        with pytest.raises(Invalid, match=r"metadata\.labels\.kubernetes\.io/hostname"):
            set_labels(nodes.ctx, "n1", {"kubernetes.io/hostname": "x"})
        with pytest.raises(Invalid, match="label key"):
            set_labels(nodes.ctx, "n1", {"a b": "x"})

    def test_a_taint_keeps_vms_off_and_outlasts_a_cordon(self, nodes: Stage) -> None:
        taint = parse(Taint, {"key": "dedicated", "value": "db", "effect": "NoSchedule"})
        for name in ("n1", "n2"):
            assert set_taints(nodes.ctx, name, [taint])
        set_unschedulable(nodes.ctx, "n1", unschedulable=True)
        set_unschedulable(nodes.ctx, "n1", unschedulable=False)
        assert nodes.store.get(Node, "n1").spec.taints == (taint,)
        a_vm(nodes.ctx, runPolicy="AlwaysOn", nodeSelector={"kubernetes.io/hostname": "n1"})
        assert nodes.grant() == []
        assert "1 with taint dedicated=db:NoSchedule" in nodes.operations()[0].message
        assert set_taints(nodes.ctx, "n1", [], [("dedicated", "")])
        assert len(nodes.grant()) == 1


def a_class(stage: Stage, name: str, cpu: dict[str, Any], **spec: Any) -> VirtualMachineClass:
    wanted = read_manifest(manifest("VirtualMachineClass", name, {"cpu": cpu, **spec}))
    return create_resource(stage.ctx, wanted)  # type: ignore[return-value]


def condition(vm: VirtualMachine, kind: str) -> str:
    (found,) = [c for c in vm.status.conditions if c.type == kind]
    return found.message

"""Evidence that a lock contradicts: nothing is granted on it any more, and what nobody has claimed is called back."""

import pytest

from orchestrator.queues import Message
from orchestrator.resources import OperationType, VirtualMachine, VmPhase
from orchestrator.services.failover import recover_node
from orchestrator.services.operations import create_operation, new_operation
from tests.fakes import Stage
from tests.fencing import FencingStage, until_fenced


@pytest.fixture
def herd(stage: Stage) -> FencingStage:
    """The deadline of n1's watchdog has passed, and VM a is to start elsewhere."""
    herd = FencingStage(stage, armed=True)
    stage.add_vm("a", "n1")
    herd.lose("n1")
    until_fenced(herd, "n1")
    return herd


def contradict(herd: FencingStage) -> None:
    """A start of another VM of n1 has met its lock."""
    old = herd.fencing("n1")
    herd.stage.store.must_commit(herd.stage.store.batch().put(old, old.with_status(contradicted="it may run there")))


def is_held(vm: VirtualMachine) -> bool:
    return vm.status.phase is VmPhase.STOPPED and vm.status.recovery is not None and bool(vm.status.recovery.held)


def begun(stage: Stage) -> Message:
    (message,) = stage.grant()
    return message


def test_nothing_is_granted_before_it_is_held_back(stage: Stage, herd: FencingStage) -> None:
    contradict(herd)
    assert stage.grant() == []
    recover_node(herd.ctx, stage.herd, "n1")
    assert is_held(stage.vm("a"))


def test_nor_when_it_is_contradicted_in_that_moment(stage: Stage, herd: FencingStage) -> None:
    commit = stage.store.commit

    def late(batch: object) -> object:
        stage.store.commit = commit  # type: ignore[method-assign]
        contradict(herd)
        return commit(batch)  # type: ignore[arg-type]

    stage.store.commit = late  # type: ignore[assignment, method-assign]
    assert stage.grant() == []


def test_a_grant_that_nobody_has_claimed_is_called_back(stage: Stage, herd: FencingStage) -> None:
    message = begun(stage)
    contradict(herd)
    recover_node(herd.ctx, stage.herd, "n1")
    assert is_held(stage.vm("a"))
    assert not stage.deliver(message)
    assert stage.world.calls == []
    (start,) = stage.operations()
    assert start.status.grant is None


def test_one_that_was_claimed_goes_on(stage: Stage, herd: FencingStage) -> None:
    message = begun(stage)
    node = stage.nodes[message.queue.split(".")[1]]
    grant = node.begin(message)
    assert grant is not None
    contradict(herd)
    recover_node(herd.ctx, stage.herd, "n1")
    assert stage.vm("a").status.phase is VmPhase.STARTING
    node.end(grant)
    stage.play(lambda: stage.is_at_rest("a"))
    assert stage.vm("a").status.phase is VmPhase.RUNNING


def test_a_person_starts_it_all_the_same(stage: Stage, herd: FencingStage) -> None:
    contradict(herd)
    recover_node(herd.ctx, stage.herd, "n1")
    create_operation(herd.ctx, new_operation("a", OperationType.START))
    stage.play(lambda: stage.is_at_rest("a"))
    assert stage.vm("a").status.phase is VmPhase.RUNNING

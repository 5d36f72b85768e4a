"""Operations from admission to their end, on real Redis: the way it goes, aborts, retries, and who waits for whom."""

from orchestrator.resources import OperationPhase, VmPhase, find_condition
from orchestrator.store import keys
from tests.declared_keys import check_keys
from tests.fakes import Stage


def migrating(stage: Stage) -> tuple[str, str]:
    """Its condition Migrating."""
    condition = find_condition(stage.vm("a").status.conditions, "Migrating")
    assert condition is not None
    return condition.status, condition.reason


def test_an_evict_from_end_to_end(stage: Stage) -> None:
    stage.add_vm("a", "n1")
    operation = stage.evict("a")
    (message,) = stage.grant()
    node = stage.nodes["n1"]
    grant = node.begin(message)
    assert grant is not None
    stage.read()
    assert stage.vm("a").status.phase is VmPhase.MIGRATING
    assert migrating(stage) == ("True", "InProgress")
    node.progress(grant, 50)
    stage.read()
    assert stage.operation(operation).status.progress == 27
    node.switch_over(grant)
    node.end(grant)
    stage.play(lambda: stage.operation(operation).status.phase.is_final)
    operation = stage.operation(operation)
    assert (operation.status.phase, operation.status.progress) == (OperationPhase.COMPLETED, 100)
    assert stage.vm("a").status.node_name == operation.status.target_node == "n2"
    assert stage.is_at_rest("a")
    assert migrating(stage) == ("False", "Completed")
    check_keys(stage.store.redis)
    left = (
        keys.DEADLINES,
        keys.AWAITING,
        keys.grants("n1"),
        keys.orders("n1"),
        keys.orders("n2"),
        keys.ACTIVE_OPERATIONS,
    )
    assert not stage.store.redis.exists(*left)

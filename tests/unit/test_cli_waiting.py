"""Until when a command waits, and what it says of the end."""

from collections.abc import Iterator

import pytest

from orchestrator.cli.waiting import Lines, Silent, Watched, failure, take_until_ended
from orchestrator.errors import WaitTimeout
from orchestrator.planner.flow import say
from orchestrator.resources import KINDS, Key, OperationPhase, Reason, Resource, VirtualMachineOperation
from orchestrator.resources.vmop import MigrationOutcome, Prediction
from orchestrator.store import Change, ChangeType
from orchestrator.store.store import Loaded
from tests.builders import NOW, an_operation

News = Loaded | Change | None


def waiting(*news: News) -> Iterator[News]:
    """What `follow` would give. Whoever takes more waits for ever: here, the test fails."""
    yield from news
    raise AssertionError("it goes on waiting")


def test_an_operation_is_waited_for_until_it_has_ended() -> None:
    operation = an_operation()
    (ended,) = take_until_ended(
        waiting(listed(operation), None, changed(under_way(operation)), changed(completed(operation))),
        [operation],
        Silent(),
    )
    assert ended.has_succeeded
    assert failure(ended) is None


def test_an_end_before_the_first_look_counts() -> None:
    operation = an_operation()
    assert take_until_ended(waiting(listed(completed(operation))), [operation], Silent())[0].has_succeeded


def test_all_are_waited_for() -> None:
    first, second = an_operation("a", "vm-a"), an_operation("b", "vm-b")
    news = (listed(first, second), changed(completed(second)), changed(completed(first)))
    assert all(w.has_succeeded for w in take_until_ended(waiting(*news), [first, second], Silent()))
    with pytest.raises(AssertionError, match="goes on waiting"):
        take_until_ended(waiting(*news[:2]), [first, second], Silent())


def test_one_that_is_deleted_is_waited_for_until_it_is_gone() -> None:
    operation = under_way(an_operation())
    aborted = ended(operation, OperationPhase.FAILED, Reason.ABORTED, "aborted; it runs on node n1")
    news = (listed(operation), changed(aborted), changed(aborted, ChangeType.DELETED))
    (gone,) = take_until_ended(waiting(*news), [operation], Silent(), until_gone=True)
    assert (gone.is_gone, gone.reason, gone.message) == (True, Reason.ABORTED, "aborted; it runs on node n1")
    with pytest.raises(AssertionError, match="goes on waiting"):
        take_until_ended(waiting(*news[:2]), [operation], Silent(), until_gone=True)


def test_one_that_someone_else_deletes() -> None:
    operation = an_operation()
    news = (listed(operation), changed(operation, ChangeType.DELETED))
    (gone,) = take_until_ended(waiting(*news), [operation], Silent())
    assert failure(gone) == "linux-vm: op was deleted before it began"


@pytest.mark.parametrize("is_another_there", [False, True], ids=["nothing there", "another of that name there"])
def test_one_that_went_unseen(is_another_there: bool) -> None:
    operation = under_way(an_operation())
    another = completed(operation.with_(metadata=operation.metadata.with_(uid="another")))
    news = (listed(operation), listed(another) if is_another_there else listed())
    (gone,) = take_until_ended(waiting(*news), [operation], Silent())
    assert failure(gone) == "linux-vm: op is gone; what came of it was not seen"


def test_time_is_up() -> None:
    operation = under_way(an_operation())
    with pytest.raises(WaitTimeout) as caught:
        take_until_ended(waiting(listed(operation)), [operation], Silent(), timeout=1e-9)
    assert str(caught.value) == (
        "VirtualMachineOperation 'op' is InProgress after 1e-09s: a tenth; goes on all the same"
    )


def test_failures_name_the_reason() -> None:
    failed = ended(an_operation(), OperationPhase.FAILED, Reason.TARGET_UNSCHEDULABLE, "no node\nfits")
    assert failure(Watched(failed)) == "linux-vm: op Failed (TargetUnschedulable): no node fits"


def test_lines_for_phases_and_for_why_it_is_pending(capsys: pytest.CaptureFixture[str]) -> None:
    operation = an_operation()
    waits = say(operation, Reason.TARGET_UNSCHEDULABLE, "no node fits", NOW)
    moving = under_way(operation)
    lines = Lines()
    for shown in (operation, operation, waits, waits, moving, moving.with_status(progress=50), completed(operation)):
        lines.update(Watched(shown))
    assert capsys.readouterr().out.splitlines() == [
        "linux-vm: Pending (op)",
        "linux-vm: Pending: no node fits",
        "linux-vm: InProgress: a tenth",
        "linux-vm: Completed: runs on node n2 (guest stopped for 23 ms)",
    ]


def test_what_was_foreseen_stands_beside_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    foreseen = under_way(an_operation()).with_status(progress=3, prediction=Prediction(duration_s=9.6))
    measured = foreseen.with_status(
        prediction=Prediction(dirty_rate_mib_s=16, duration_s=14, converges=True)
    )  # before it sends, and so the only one that is told
    moving = measured.with_status(progress=10, outcome=MigrationOutcome(duration_s=1, transferred_mib=5, iterations=1))
    more = moving.with_status(progress=60, outcome=MigrationOutcome(duration_s=10, transferred_mib=90, iterations=2))
    done = completed(
        more.with_status(outcome=MigrationOutcome(duration_s=13.2, transferred_mib=130, iterations=4, downtime_ms=23))
    )
    lines = Lines()
    for shown in (foreseen, measured, moving, more, done, done):
        lines.update(Watched(shown))
    assert capsys.readouterr().out.splitlines() == [
        "linux-vm: InProgress (op): a tenth",
        "linux-vm: predicted: 14.0 s; it dirties 16.0 MiB/s",
        "linux-vm: Completed: runs on node n2 (guest stopped for 23 ms)",
        "linux-vm: measured: 13.2 s, 130 MiB sent in 4 passes, guest stopped for 23 ms",
    ]


def test_a_second_attempt_is_foreseen_anew(capsys: pytest.CaptureFixture[str]) -> None:
    first = under_way(an_operation()).with_status(prediction=Prediction(duration_s=9.6))
    lines = Lines()
    for shown in (first, first.with_status(prediction=Prediction(dirty_rate_mib_s=90, converges=False))):
        lines.update(Watched(shown))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "linux-vm: predicted: 9.6 s or more; its dirty rate is not known",
        "linux-vm: predicted: does not converge by itself; it dirties 90.0 MiB/s",
    ]


def under_way(operation: VirtualMachineOperation) -> VirtualMachineOperation:
    begun = operation.with_status(phase=OperationPhase.IN_PROGRESS, progress=10)
    return say(begun, Reason.SYNCING, "a tenth", NOW)


def completed(operation: VirtualMachineOperation) -> VirtualMachineOperation:
    done = operation.with_status(downtime_ms=23)
    return ended(done, OperationPhase.COMPLETED, Reason.OPERATION_COMPLETED, "runs on node n2")


def ended(
    operation: VirtualMachineOperation, phase: OperationPhase, reason: Reason, message: str
) -> VirtualMachineOperation:
    return say(operation.with_status(phase=phase), reason, message, NOW, done=True)


def listed(*operations: VirtualMachineOperation) -> Loaded:
    by_kind: dict[str, dict[Key, Resource]] = {kind: {} for kind in KINDS}
    by_kind[VirtualMachineOperation.kind_name] = {operation.key: operation for operation in operations}
    return Loaded(version=1, run_id="r", resources=by_kind)


def changed(operation: VirtualMachineOperation, how: ChangeType = ChangeType.MODIFIED) -> Change:
    return Change(version=2, type=how, resource=operation)

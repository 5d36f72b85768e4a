"""The two tables of operations: what may be done to which VM, and what takes another's place. Each cell.

The same cells on a herd: `tests/scenarios/test_tables.py`.
"""

import pytest

from orchestrator.planner.applicability import inapplicable, supersedes
from orchestrator.resources import OperationType, Reason, RunPolicy, VmPhase
from orchestrator.resources.vmop import OperationSpec
from tests.builders import NOW, a_vm
from tests.operation_tables import EVICT, OPERATIONS, PHASES, POLICIES, RESTART, START, STOP, SUPERSEDED_BY


def spec(kind: OperationType, force: bool) -> OperationSpec:
    return OperationSpec(type=kind, virtual_machine_name="linux-vm", force=force or None)


@pytest.mark.parametrize("phase", VmPhase)
@pytest.mark.parametrize(("kind", "force"), OPERATIONS)
def test_each_phase(kind: OperationType, force: bool, phase: VmPhase) -> None:
    found = inapplicable(spec(kind, force), a_vm(phase=phase))
    if phase in PHASES[kind, force]:
        assert found is None
    else:
        assert found is not None
        reason, message = found
        assert reason is Reason.NOT_APPLICABLE_FOR_PHASE
        assert f"{kind} is not applicable: VirtualMachine 'linux-vm' is {phase}, not" in message


@pytest.mark.parametrize("policy", RunPolicy)
@pytest.mark.parametrize(("kind", "force"), OPERATIONS)
def test_each_policy(kind: OperationType, force: bool, policy: RunPolicy) -> None:
    phase = VmPhase.STOPPED if kind is START else VmPhase.RUNNING
    found = inapplicable(spec(kind, force), a_vm(phase=phase, policy=policy))
    assert (found is None) == (policy in POLICIES[kind])
    if found is not None:
        assert found[0] is Reason.NOT_APPLICABLE_FOR_RUN_POLICY
        assert f"has runPolicy {policy}" in found[1]


@pytest.mark.parametrize(("kind", "force"), OPERATIONS)
def test_nothing_is_done_to_a_vm_that_is_being_deleted(kind: OperationType, force: bool) -> None:
    vm = a_vm(phase=VmPhase.STOPPED if kind is START else VmPhase.RUNNING)
    found = inapplicable(spec(kind, force), vm.with_(metadata=vm.metadata.with_(deletion_timestamp=NOW)))
    assert found is not None
    assert "being deleted" in found[1]


@pytest.mark.parametrize("new", OPERATIONS)
@pytest.mark.parametrize("old", OPERATIONS)
def test_each_pair(old: tuple[OperationType, bool], new: tuple[OperationType, bool]) -> None:
    assert supersedes(spec(*new), spec(*old)) == (new in SUPERSEDED_BY[old])


def test_a_vm_that_migrates_may_be_stopped_by_what_supersedes_its_migration() -> None:
    migrating = a_vm(phase=VmPhase.MIGRATING)
    assert inapplicable(spec(STOP, False), migrating) is not None
    assert inapplicable(spec(STOP, False), migrating, superseding=spec(EVICT, False)) is None
    assert inapplicable(spec(STOP, False), migrating, superseding=spec(RESTART, False)) is not None

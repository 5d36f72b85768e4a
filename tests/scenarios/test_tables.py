"""Each cell of the applicability table and of the supersede matrix, on the simulated herd.

A VM is brought into each phase by what brings one there, and is then asked for each operation under each policy. What
is refused must say why and store nothing; what is admitted must come to the end that its type has. The tables that the
herd is held against are `tests/operation_tables.py`'s, not the product's own.

While an operation is active on a VM, the supersede matrix answers first. So that the applicability table does, each VM
is brought to where no operation is active on it: one that was superseded by another, which was then taken back, leaves
its VM where it was.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest

from orchestrator.errors import Invalid, Refused
from orchestrator.planner import applicability
from orchestrator.resources import (
    OperationPhase,
    OperationType,
    Reason,
    RunPolicy,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
    find_condition,
    make_key,
)
from orchestrator.resources.vm import LiveMigrationPolicy
from orchestrator.services import operations, vms
from orchestrator.store import keys
from tests.operation_tables import (
    EVICT,
    MIGRATE,
    OPERATIONS,
    PHASES,
    POLICIES,
    RESTART,
    START,
    STOP,
    SUPERSEDED_BY,
    Asked,
)
from tests.redis_server import RedisServer
from tests.scenarios.engine.redis_time import TimeOfDay
from tests.scenarios.engine.run import Run
from tests.scenarios.engine.script import play_line

NODES = {f"n{number}": {"cpus": 16, "memory_mib": 65_536} for number in range(1, 6)}
BY_HAND = RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY
BROUGHT_AT, END = 4.0, 150.0

Play = Callable[[dict[str, Any]], Run]


@pytest.fixture
def play(
    simulated_redis: RedisServer, time_of_day: TimeOfDay, play_scenario: object
) -> Iterator[Callable[[dict[str, Any]], Run]]:
    """Begin a herd with these VMs (as in `herd.yaml`)."""
    runs: list[Run] = []

    def begin(vms: dict[str, Any]) -> Run:
        time_of_day.set(0.0)
        simulated_redis.start()
        simulated_redis.clear()
        run = Run({"nodes": NODES, "vms": vms}, simulated_redis, time_of_day).__enter__()
        runs.append(run)
        run.begin()
        return run

    yield begin
    for run in runs:
        run.__exit__()


# --- asking -----------------------------------------------------------------------------------------------------------


def find_vm(run: Run, name: str) -> VirtualMachine:
    return run.store.get(VirtualMachine, make_key(name, "default"))


def find_operation(run: Run, name: str) -> VirtualMachineOperation:
    return run.store.get(VirtualMachineOperation, make_key(name, "default"))


def active_operation(run: Run, vm: str) -> str:
    return str(run.store.redis.hget(keys.ACTIVE_OPERATIONS, make_key(vm, "default")) or "")


def ask(run: Run, vm: str, asked: Asked, name: str, *, force: bool | None = None) -> VirtualMachineOperation:
    kind, is_forced = asked
    wanted = operations.new_operation(vm, kind, force=True if is_forced else force)
    wanted = wanted.with_(metadata=wanted.metadata.with_(name=name, generate_name=""))
    run.timeline.name(name)
    return operations.create_operation(run.ctx, wanted)


def refusal(run: Run, vm: str, asked: Asked, force: bool | None) -> str:
    """Ask for what should be refused; give what was said, or that it was not."""
    before = run.store.version()
    try:
        ask(run, vm, asked, f"not-{vm}", force=force)
    except (Refused, Invalid) as error:
        return str(error) if run.store.version() == before else f"refused, but something was stored: {error}"
    take_back(run, vm)
    return "admitted"


def take_back(run: Run, vm: str) -> None:
    """Delete a VM's active operation, which was not granted."""
    active = active_operation(run, vm)
    if active:
        assert run.store.get(VirtualMachineOperation, active).status.grant is None
        operations.delete_operation(run.ctx, active)


def leave_behind(run: Run, vm: str) -> None:
    """Have a VM's active operation superseded, and what superseded it taken back: nothing is active on it then."""
    ask(run, vm, (STOP, active_type(run, vm) is STOP), f"by-{vm}")
    take_back(run, vm)


def active_type(run: Run, vm: str) -> OperationType:
    return run.store.get(VirtualMachineOperation, active_operation(run, vm)).spec.type


# --- the ways into each phase -----------------------------------------------------------------------------------------
# Each has what stands in herd.yaml of the VM, what is done at second 0, and what at once before the cell is tried.


def _nothing(_run: Run, _vm: str) -> None: ...


def _line(text: str) -> Callable[[Run, str], None]:
    return lambda run, vm: play_line(run, text.format(vm))


def _slow_start(run: Run, vm: str) -> None:
    for node in NODES:
        play_line(run, f"slow {node} 4")
    play_line(run, f"create {vm}")
    play_line(run, f"start {vm} as before-{vm}")


def _create_and_hold(run: Run, vm: str) -> None:
    """A VM that its policy is about to start."""
    play_line(run, f"create {vm}")
    take_back(run, vm)


def _degrade(run: Run, vm: str) -> None:
    """No host reports what this phase stands for; what is on record counts all the same."""
    old = find_vm(run, vm)
    run.store.must_commit(run.store.batch().put(old, old.with_status(phase=VmPhase.DEGRADED)))


def _delete(run: Run, vm: str) -> None:
    vms.delete_vm(run.ctx, make_key(vm, "default"))
    take_back(run, vm)


RUNNING_VM: dict[str, Any] = {"node": True}
SLOW_GUEST: dict[str, Any] = {"node": True, "guest": {"shutdown_s": 10}}
WAYS: dict[VmPhase, tuple[dict[str, Any], Callable[[Run, str], None], Callable[[Run, str], None]]] = {
    VmPhase.PENDING: ({}, _nothing, _create_and_hold),
    VmPhase.STARTING: ({"policy": "Manual"}, _slow_start, leave_behind),
    VmPhase.RUNNING: (RUNNING_VM, _nothing, _nothing),
    VmPhase.DEGRADED: (RUNNING_VM, _nothing, _degrade),
    VmPhase.MIGRATING: ({"node": True, "memory": "8Gi"}, _line("evict {0} as before-{0}"), leave_behind),
    VmPhase.PAUSE: (RUNNING_VM, _line("pause vm {}"), _nothing),
    VmPhase.STOPPING: (SLOW_GUEST, _line("stop {0} as before-{0}"), leave_behind),
    VmPhase.STOPPED: ({"policy": "Manual"}, _line("create {}"), _nothing),
    VmPhase.TERMINATING: (SLOW_GUEST, _nothing, _nothing),  # deleted once its policy is set
}


def given(way: dict[str, Any], number: int) -> dict[str, Any]:
    """A VM as in `herd.yaml`; the nodes take turns."""
    spec = {"terminationGracePeriodSeconds": 20}
    return {**way, "spec": spec, **({"node": f"n{number % len(NODES) + 1}"} if "node" in way else {})}


def bring(run: Run, phase: VmPhase, policies: dict[str, RunPolicy]) -> None:
    """Bring VMs into a phase, each under its policy, with no operation active on them."""
    _, begin, finish = WAYS[phase]
    for vm in policies:
        run.at(0, lambda vm=vm: begin(run, vm))  # type: ignore[misc]
    run.play(BROUGHT_AT)
    for vm, policy in policies.items():
        finish(run, vm)
        play_line(run, f"set policy {vm} {policy}")
        take_back(run, vm)
        if phase is VmPhase.TERMINATING:
            _delete(run, vm)
        assert (find_vm(run, vm).status.phase, active_operation(run, vm)) == (phase, ""), vm
    for node in NODES:
        play_line(run, f"slow {node} 0")


# --- the applicability table ------------------------------------------------------------------------------------------


def expected_refusal(asked: Asked, phase: VmPhase, policy: RunPolicy) -> str:
    """Say what a cell's refusal names; empty where the operation is admitted."""
    kind = asked[0]
    if asked == (START, True):
        return "spec.force: a Start can't be forced"
    if phase is VmPhase.TERMINATING:
        return f"is being deleted ({Reason.NOT_APPLICABLE_FOR_PHASE})"
    if policy not in POLICIES[kind]:
        return f"({Reason.NOT_APPLICABLE_FOR_RUN_POLICY})"
    return "" if phase in PHASES[asked] else f"is {phase}, not "


def cells(phase: VmPhase) -> Iterator[tuple[Asked, bool | None, RunPolicy]]:
    """Each operation with each `force`: unset, false, true."""
    for policy in RunPolicy:
        for kind, force in product(OperationType, (None, False, True)):
            yield (kind, bool(force)), force, policy


def wrong_cells(play: Play, phase: VmPhase) -> list[str]:
    """Try each cell of one phase; give those that are not as they should be."""
    way, tried, policies = WAYS[phase][0], list(cells(phase)), {}
    admitted: dict[str, Asked] = {}
    refused: dict[str, list[tuple[Asked, bool | None]]] = {}
    for number, (asked, force, policy) in enumerate(tried):
        if expected_refusal(asked, phase, policy):
            vm = f"x-{policy.lower()}"
            refused.setdefault(vm, []).append((asked, force))
        else:
            vm = f"vm-{number}"
            admitted[vm] = asked
        policies[vm] = policy
    forces = {f"vm-{number}": force for number, (_, force, _) in enumerate(tried)}
    run = play({vm: given(way, number) for number, vm in enumerate(policies)})
    bring(run, phase, policies)
    problems = []
    for vm, tries in refused.items():
        for asked, force in tries:
            wanted, said = expected_refusal(asked, phase, policies[vm]), refusal(run, vm, asked, force)
            if wanted not in said or said == "admitted":
                problems.append(f"{phase}, {policies[vm]}, {asked[0]} force={force}: {said!r}, not {wanted!r}")
    before = {vm: find_vm(run, vm) for vm in admitted}
    for vm, asked in list(admitted.items()):
        try:
            ask(run, vm, asked, f"op-{vm}", force=forces[vm])
        except Refused as error:
            problems.append(f"{phase}, {policies[vm]}, {asked[0]} force={forces[vm]}: refused: {error}")
            admitted.pop(vm)
    run.play(END)
    for vm, asked in admitted.items():
        what = f"{phase}, {policies[vm]}, {asked[0]} force={forces[vm]}"
        problems += [f"{what}: {wrong}" for wrong in wrong_end(run, vm, f"op-{vm}", asked[0], before[vm])]
    run.invariants.check_end()
    return problems


def wrong_end(run: Run, vm: str, operation: str, kind: OperationType, before: VirtualMachine) -> list[str]:
    """Check that an operation came to the end that its type has."""
    now, ended = find_vm(run, vm).status, find_operation(run, operation)
    running = find_condition(now.conditions, "Running")
    reason = running.reason if running is not None else ""
    was = before.status
    expectations: list[tuple[str, object, object]] = [("its phase", ended.status.phase, OperationPhase.COMPLETED)]
    match kind:
        case OperationType.STOP:
            expectations.append(("the VM", (now.phase, reason), (VmPhase.STOPPED, "StoppedByOperation")))
        case OperationType.START:
            started = was.incarnation + (was.phase is not VmPhase.STARTING)  # a grant gives it
            expectations.append(("the VM", (now.phase, now.incarnation), (VmPhase.RUNNING, started)))
        case OperationType.RESTART:
            expectations.append(("the VM", now.phase, VmPhase.RUNNING))
            expectations.append(("it was started anew", now.incarnation > was.incarnation, True))
        case OperationType.EVICT | OperationType.MIGRATE:
            expectations.append(("the VM", (now.phase, now.incarnation), (VmPhase.RUNNING, was.incarnation)))
            expectations.append(("it moved", now.node_name != was.node_name, True))
    message = ended.message
    return [f"{what}: {is_!r}, not {wanted!r} ({message})" for what, is_, wanted in expectations if is_ != wanted]


@pytest.mark.parametrize("phase", VmPhase)
def test_each_cell_of_the_applicability_table(play: Play, phase: VmPhase) -> None:
    assert wrong_cells(play, phase) == []


# --- the supersede matrix ---------------------------------------------------------------------------------------------

SUPERSEDABLE: dict[Asked, tuple[dict[str, Any], list[str]]] = {
    (START, False): ({"policy": "Manual"}, ["create {0}", "start {0} as old-{0}"]),
    (STOP, False): (SLOW_GUEST, ["stop {0} as old-{0}"]),
    (STOP, True): (RUNNING_VM, ["stop {0} force as old-{0}"]),
    (RESTART, False): (SLOW_GUEST, ["restart {0} as old-{0}"]),
    (RESTART, True): (RUNNING_VM, ["restart {0} force as old-{0}"]),
    **{
        (kind, force): ({"node": True, "memory": "8Gi"}, [f"{kind.lower()} {{0}}{' force' * force} as old-{{0}}"])
        for kind in (EVICT, MIGRATE)
        for force in (False, True)
    },
}
SLOW = {(START, False), (STOP, True), (RESTART, True)}
"""What a host does at once is caught in the middle on one that is slow."""


def wrong_pairs(play: Play, old: Asked) -> list[str]:
    """Try each operation on VMs for which another one is under way; give what is not as it should be."""
    way, lines = SUPERSEDABLE[old]
    news = {f"vm-{number}": asked for number, asked in enumerate(OPERATIONS)}
    problems: list[str] = []
    # One node sends one migration at a time, so those are tried one a node.
    size = len(NODES) - 1 if old[0].is_migration else len(news)
    for first in range(0, len(news), size):
        batch = dict(list(news.items())[first : first + size])
        problems += _wrong_pairs(play({vm: given(way, n) for n, vm in enumerate(batch)}), old, lines, batch)
    return problems


def _wrong_pairs(run: Run, old: Asked, lines: list[str], news: dict[str, Asked]) -> list[str]:
    for node in NODES if old in SLOW else ():
        run.at(0, lambda node=node: play_line(run, f"slow {node} 4"))  # type: ignore[misc]
    for vm, line in product(news, lines):
        run.at(0.1, lambda vm=vm, line=line: play_line(run, line.format(vm)))  # type: ignore[misc]
    run.play(BROUGHT_AT)
    before = {vm: find_vm(run, vm) for vm in news}
    problems = [f"{old} <- {new}: {wrong}" for vm, new in news.items() if (wrong := _wrong_answer(run, vm, old, new))]
    for node in NODES:
        play_line(run, f"slow {node} 0")
    run.play(END)
    if problems:
        return problems
    for vm, new in news.items():
        is_new = new in SUPERSEDED_BY[old]
        last, kind = (f"new-{vm}", new[0]) if is_new else (f"old-{vm}", old[0])
        problems += [f"{old} <- {new}: {wrong}" for wrong in wrong_end(run, vm, last, kind, before[vm])]
        if is_new and find_operation(run, f"old-{vm}").status.phase is not OperationPhase.SUPERSEDED:
            problems.append(f"{old} <- {new}: the old one did not stay Superseded")
    run.invariants.check_end()
    return problems


def _wrong_answer(run: Run, vm: str, old: Asked, new: Asked) -> str:
    """Ask for another operation than the one that is under way; say what is wrong with the answer."""
    active = find_operation(run, f"old-{vm}")
    assert active.status.grant is not None, active.message
    try:
        ask(run, vm, new, f"new-{vm}")
    except Refused as error:
        is_said = f"Previously created operation 'old-{vm}' should finish first" in str(error)
        return "" if is_said and new not in SUPERSEDED_BY[old] else f"refused: {error}"
    if new not in SUPERSEDED_BY[old]:
        return "admitted"
    shown = find_operation(run, f"old-{vm}").status
    is_superseded = (shown.phase, shown.superseded_by) == (OperationPhase.SUPERSEDED, f"new-{vm}")
    return "" if is_superseded else f"the old one is {shown.phase}"


@pytest.mark.parametrize("old", OPERATIONS, ids=lambda asked: f"{asked[0]}{'-forced' * asked[1]}")
def test_each_cell_of_the_supersede_matrix(play: Play, old: Asked) -> None:
    assert wrong_pairs(play, old) == []


# --- force and liveMigrationPolicy ------------------------------------------------------------------------------------

THROTTLES: dict[LiveMigrationPolicy, dict[bool | None, bool | None]] = {
    LiveMigrationPolicy.ALWAYS_SAFE: {None: False, False: False, True: None},
    LiveMigrationPolicy.PREFER_SAFE: {None: False, False: False, True: True},
    LiveMigrationPolicy.PREFER_FORCED: {None: True, False: False, True: True},
    LiveMigrationPolicy.ALWAYS_FORCED: {None: True, False: None, True: True},
}
"""By policy and `force`: whether the guest may be throttled; None: the operation fails."""


@pytest.mark.parametrize("kind", [EVICT, MIGRATE])
def test_each_cell_of_live_migration_policy_and_force(play: Play, kind: OperationType) -> None:
    tried = {f"vm-{number}": cell for number, cell in enumerate(product(LiveMigrationPolicy, (None, False, True)))}
    spec = {vm: {"liveMigrationPolicy": policy} for vm, (policy, _) in tried.items()}
    run = play({vm: given(RUNNING_VM, n) | {"spec": spec[vm]} for n, vm in enumerate(tried)})
    throttled: dict[str, bool] = {}

    def see(_old: object, new: object) -> None:
        if isinstance(new, VirtualMachineOperation) and new.status.grant is not None:
            throttled[new.spec.virtual_machine_name] = new.status.grant.auto_converge

    run.timeline.observers.append(see)
    for vm, (_, force) in tried.items():
        ask(run, vm, (kind, False), f"op-{vm}", force=force)
    run.play(60)
    for vm, (policy, force) in tried.items():
        ended, wanted = find_operation(run, f"op-{vm}"), THROTTLES[policy][force]
        said = find_condition(ended.status.conditions, "Completed")
        assert said is not None
        conflict = (OperationPhase.FAILED, Reason.NOT_APPLICABLE_FOR_LIVE_MIGRATION_POLICY)
        good = (OperationPhase.COMPLETED, Reason.OPERATION_COMPLETED)
        assert (ended.status.phase, said.reason) == (conflict if wanted is None else good), (policy, force)
        assert throttled.get(vm) is wanted, (policy, force)


# --- a changed cell is seen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "kind", "changed", "phase"),
    [
        ("_PHASES", START, PHASES[START, False] - {VmPhase.STOPPING}, VmPhase.STOPPING),
        ("_PHASES", RESTART, PHASES[RESTART, False] | {VmPhase.PENDING}, VmPhase.PENDING),
        ("_PHASES", MIGRATE, {VmPhase.RUNNING, VmPhase.MIGRATING}, VmPhase.MIGRATING),
        ("_POLICIES", STOP, {*RunPolicy}, VmPhase.PENDING),
        ("_POLICIES", START, {RunPolicy.MANUAL}, VmPhase.STOPPED),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_changed_cell_is_seen(
    monkeypatch: pytest.MonkeyPatch, play: Play, table: str, kind: OperationType, changed: set[Any], phase: VmPhase
) -> None:
    monkeypatch.setitem(getattr(applicability, table), kind, frozenset(changed))
    assert wrong_cells(play, phase) != []


def test_a_changed_pair_is_seen(monkeypatch: pytest.MonkeyPatch, play: Play) -> None:
    monkeypatch.setattr(operations, "supersedes", lambda new, _old: new.type in {STOP, RESTART})
    assert wrong_pairs(play, (STOP, True)) != []

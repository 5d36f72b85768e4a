"""The platform's two tables of operations, cell by cell, as its page has them: what may be done to which VM, and what
takes another's place. The code under test has tables of its own; these are what they are held against.
"""

from orchestrator.resources import OperationType, RunPolicy, VmPhase

START, STOP, RESTART = OperationType.START, OperationType.STOP, OperationType.RESTART
EVICT, MIGRATE = OperationType.EVICT, OperationType.MIGRATE

Asked = tuple[OperationType, bool]
"""A type, and whether it is forced."""

STOPPABLE = {VmPhase.RUNNING, VmPhase.DEGRADED, VmPhase.STARTING, VmPhase.PAUSE}
PHASES: dict[Asked, set[VmPhase]] = {
    (START, False): {VmPhase.STOPPED, VmPhase.STOPPING},
    (STOP, False): STOPPABLE | {VmPhase.PENDING},
    (STOP, True): STOPPABLE | {VmPhase.PENDING, VmPhase.STOPPING},
    (RESTART, False): STOPPABLE,
    (RESTART, True): STOPPABLE | {VmPhase.STOPPING},
    (EVICT, False): {VmPhase.RUNNING},
    (EVICT, True): {VmPhase.RUNNING},
    (MIGRATE, False): {VmPhase.RUNNING},
    (MIGRATE, True): {VmPhase.RUNNING},
}
BY_HAND = {RunPolicy.MANUAL, RunPolicy.ALWAYS_ON_UNLESS_STOPPED_MANUALLY}
POLICIES: dict[OperationType, set[RunPolicy]] = {
    START: BY_HAND,
    STOP: BY_HAND,
    RESTART: {*BY_HAND, RunPolicy.ALWAYS_ON},
    EVICT: {*BY_HAND, RunPolicy.ALWAYS_ON},
    MIGRATE: {*BY_HAND, RunPolicy.ALWAYS_ON},
}
OPERATIONS: list[Asked] = list(PHASES)
"""A forced Start is none: it is refused as a manifest."""

ANY_STOP: set[Asked] = {(STOP, False), (STOP, True), (RESTART, False), (RESTART, True)}
SUPERSEDED_BY: dict[Asked, set[Asked]] = {
    (START, False): {(STOP, False), (STOP, True)},
    (STOP, False): {(STOP, True), (RESTART, True)},
    (STOP, True): set(),
    (RESTART, False): {(STOP, True), (RESTART, True)},
    (RESTART, True): set(),
    (EVICT, False): ANY_STOP,
    (EVICT, True): ANY_STOP,
    (MIGRATE, False): ANY_STOP,
    (MIGRATE, True): ANY_STOP,
}

"""A migration's worker: measures, migrates, tells, aborts; and ends what has had its time.

One thread, and a time of its own: while a call of the hypervisor "blocks", the watch beside it runs.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, cast

import pytest

from orchestrator.errors import HypervisorUnavailable, OutcomeUnknown, StoreUnavailable
from orchestrator.resources import Action, NodeGrant
from orchestrator.store.node_store import NodeStore
from workers import clock
from workers.hypervisor.port import (
    Domain,
    DomainState,
    Hypervisor,
    Job,
    MigrationEnd,
    MigrationRequest,
    MigrationResult,
)
from workers.migration import run_migration

TOTAL = 1000 * 2**20


class _Over(Exception):
    """The call that blocked returns."""


class Scene:
    """Clock, store and hypervisor of one migration.

    Attributes:
        left: What the job has left, by seconds since its begin; None ends the migration with success.
        happenings: What happens at which second of the whole scene.
    """

    def __init__(self, left: Callable[[float], int | None] = lambda _: TOTAL, **grant: Any) -> None:
        self.now = 0.0
        self.left = left
        self.grant = NodeGrant(
            **{
                "operation": "default/op",
                "vm": "default/a",
                "action": Action.MIGRATE,
                "epoch": 3,
                "uuid": "u",
                "incarnation": 1,
                "target": "h2",
                "bandwidth_mib_s": 10,
                **grant,
            }
        )
        self.happenings: dict[float, Callable[[], None]] = {}
        self.reports: list[tuple[float, str, dict[str, Any]]] = []
        self.calls: list[str] = []
        self.request: MigrationRequest | None = None
        self.rate: float | None = 42.0
        self.refuses_post_copy = self.aborts_slowly = self.job_is_silent = self.redis_is_away = False
        self._watch: Callable[[], None] | None = None
        self._begun: float | None = None
        self._elapsed_before = 0.0
        self._state = DomainState.RUNNING
        self._ends: MigrationResult | None = None

    # --- the clock ---
    def monotonic(self) -> float:
        return self.now

    def wait(self, event: threading.Event, timeout_s: float | None) -> bool:
        self._pass(timeout_s or 0)
        return event.is_set()

    def begin(self, name: str, run: Callable[[], None]) -> Any:
        self._watch = run

    def pool(self, name: str, size: int) -> Executor:
        raise AssertionError("no pool is needed")

    def _pass(self, seconds: float) -> None:
        self.now = round(self.now + seconds, 3)
        for at in sorted(at for at in self.happenings if at <= self.now):
            self.happenings.pop(at)()
        assert self.now < 2000, "it never ends"

    def _block(self, until: Callable[[], bool]) -> None:
        """Let the watch run until a call returns."""
        assert self._watch is not None
        self._is_over = until
        if not until():
            with pytest.raises(_Over):
                self._watch()

    # --- the store ---
    def claim(self, operation: str, epoch: int, holder: str) -> NodeGrant:
        return self.grant

    def grant_of(self, operation: str) -> NodeGrant:
        self._need_redis()
        return self.grant

    def report(self, kind: str, body: dict[str, Any], request_id: str | None = None) -> int:
        self._need_redis()
        self.reports.append((self.now, kind, body))
        return len(self.reports)

    def wait_for_wake(self, last: str, timeout_s: float) -> str:
        try:
            self._need_redis()
        except StoreUnavailable:
            self._pass(0.1)
            if self._is_over():
                raise _Over from None
            raise
        self._pass(timeout_s)
        if self._is_over():
            raise _Over
        return last

    def _need_redis(self) -> None:
        if self.redis_is_away:
            raise StoreUnavailable("away")

    def cancel(self) -> None:
        self.grant = self.grant.model_copy(update={"cancel": True})

    # --- the hypervisor ---
    def dirty_rate(self, uuid: str, seconds: float) -> float | None:
        self.calls.append("dirty_rate")
        until = self.now + seconds
        self._block(lambda: self.now >= until)
        return self.rate

    def migrate(self, request: MigrationRequest) -> MigrationResult:
        self.calls.append("migrate")
        self.request = request
        self._begun = self.now
        self._block(lambda: self._result() is not None)
        result = self._result()
        assert result is not None
        return result

    def runs_already(self, elapsed_s: float) -> None:
        """There is a job that an earlier worker began."""
        self._begun = self.now - elapsed_s

    def _elapsed(self) -> float:
        assert self._begun is not None
        return self.now - self._begun

    def _result(self) -> MigrationResult | None:
        if self._ends is None and self._begun is not None and self.left(self._elapsed()) is None:
            self._ends = MigrationResult(MigrationEnd.SUCCEEDED)
        return self._ends

    def job(self, uuid: str) -> Job | None:
        if self.job_is_silent:
            self._pass(4)
            raise HypervisorUnavailable("it says nothing")
        if self._begun is None or self._result() is not None:
            return None
        left = self.left(self._elapsed()) or 0
        return Job(
            elapsed_ms=int(self._elapsed() * 1000),
            total_bytes=TOTAL,
            processed_bytes=TOTAL - left,
            remaining_bytes=left,
            iteration=2,
            throttle_percent=30,
        )

    def abort(self, uuid: str) -> bool:
        self.calls.append(f"abort at {self.now:g}")
        if self.job_is_silent:
            self._ends = MigrationResult(MigrationEnd.UNKNOWN, "nobody knows")
            raise OutcomeUnknown("its QEMU may hang")
        if self._begun is None or self._ends is not None or self._state is DomainState.POSTCOPY:
            return False
        if self.aborts_slowly:
            self.aborts_slowly = False
        else:
            self._ends = MigrationResult(MigrationEnd.ABORTED, "canceled by client")
        return True

    def start_post_copy(self, uuid: str) -> bool:
        self.calls.append(f"post-copy at {self.now:g}")
        if self.refuses_post_copy:
            return False
        self._state = DomainState.POSTCOPY
        end = self._elapsed() + 5
        self.left = lambda elapsed: TOTAL if elapsed < end else None
        return True

    def domain(self, uuid: str) -> Domain:
        return Domain("u", "default.a", self._state, "", None, 1000, 1)

    # --- the whole ---
    def play(self) -> dict[str, Any]:
        """Run the worker; what it told of the end."""
        store = cast("NodeStore", _StoreOf(self))
        with clock.use(self):
            run_migration(store, cast("Hypervisor", self), "worker", "default/op", 3)
        kinds = [kind for _, kind, _ in self.reports]
        assert kinds.count("Ended") == 1
        assert kinds[-1] == "Ended"
        return self.reports[-1][2]

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [body for _, what, body in self.reports if what == kind]


class _StoreOf:
    """The store's side of a scene: `grant` is its name for what is a field there."""

    def __init__(self, scene: Scene) -> None:
        self.claim, self.report, self.wait_for_wake = scene.claim, scene.report, scene.wait_for_wake
        self.grant, self.node = scene.grant_of, "n1"


def shrinking(elapsed: float) -> int | None:
    """Ten seconds, evenly."""
    return int(TOTAL * (1 - elapsed / 10)) if elapsed < 10 else None


def sawtooth(elapsed: float) -> int:
    """A guest that dirties all that was sent: passes of four seconds."""
    return int(TOTAL * (1 - (elapsed % 4) / 5))


class TestCall:
    def test_it_is_made_as_the_grant_says(self) -> None:
        scene = Scene(shrinking, auto_converge=True, post_copy=True, channels=4, copy_disks=("vda",))
        assert scene.play()["end"] == "succeeded"
        assert scene.request == MigrationRequest(
            uuid="u",
            target_uri="",
            bandwidth_mib_s=10,
            auto_converge=True,
            post_copy=True,
            channels=4,
            copy_disks=("vda",),
        )
        assert scene.calls == ["migrate"]

    def test_progress_is_told_each_second_with_the_last_figures_at_the_end(self) -> None:
        scene = Scene(shrinking)
        ended = scene.play()
        figures = [body["job"] for body in scene.told("Progress")]
        assert [round(job["remaining"] * 10 / TOTAL) for job in figures] == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]
        assert {job["stalled_ms"] for job in figures} == {0}
        assert ended["job"] == figures[-1]

    def test_how_long_nothing_was_gained_is_told(self) -> None:
        scene = Scene(sawtooth, completion_timeout_s=12)
        scene.play()
        stalled = [body["job"]["stalled_ms"] for body in scene.told("Progress")]
        assert stalled == [0, 0, 0, 0, *range(1000, 9000, 1000), 8000]  # the last when it was aborted


class TestMeasuring:
    def test_it_is_told_before_the_call(self) -> None:
        scene = Scene(shrinking, sample_s=1)
        scene.play()
        assert scene.calls == ["dirty_rate", "migrate"]
        ((at, _, body),) = [report for report in scene.reports if report[1] == "Predicted"]
        assert body == {"operation": "default/op", "epoch": 3, "dirty_rate_mib_s": 42.0}
        assert at == 1.0

    def test_the_grant_is_renewed_meanwhile(self) -> None:
        scene = Scene(shrinking, sample_s=5)
        scene.play()
        assert [body["job"] for at, kind, body in scene.reports if kind == "Progress" and at < 5] == [None] * 4

    def test_what_can_not_be_measured_is_not_told(self) -> None:
        scene = Scene(shrinking, sample_s=1)
        scene.rate = None
        assert scene.play()["end"] == "succeeded"
        assert scene.told("Predicted") == []

    def test_a_hypervisor_or_redis_that_is_away_costs_the_forecast_only(self) -> None:
        scene = Scene(shrinking, sample_s=1)

        def is_away(uuid: str, seconds: float) -> float:
            raise HypervisorUnavailable("away")

        scene.dirty_rate = is_away  # type: ignore[method-assign]
        assert scene.play()["end"] == "succeeded"
        scene = Scene(shrinking, sample_s=1)
        scene.happenings = {0.5: lambda: setattr(scene, "redis_is_away", True)}
        scene.happenings[5] = lambda: setattr(scene, "redis_is_away", False)
        assert scene.play()["end"] == "succeeded"
        assert scene.told("Predicted") == []

    def test_a_guest_that_writes_in_bursts_is_measured_several_times(self) -> None:
        scene = Scene(shrinking, sample_s=3)
        rates = iter((2.0, 70.0, 58.0))
        original = scene.dirty_rate
        spans: list[float] = []

        def next_rate(uuid: str, seconds: float) -> float:
            spans.append(seconds)
            original(uuid, seconds)
            return next(rates)

        scene.dirty_rate = next_rate  # type: ignore[method-assign]
        scene.play()
        assert spans == [1, 1, 1]
        assert [body["dirty_rate_mib_s"] for body in scene.told("Predicted")] == [43.3]

    def test_an_abort_that_is_heard_meanwhile_comes_before_the_call(self) -> None:
        scene = Scene(shrinking, sample_s=3)
        scene.happenings = {0.5: scene.cancel}
        ended = scene.play()
        assert (ended["end"], ended["message"]) == ("aborted", "aborted before it began")
        assert scene.calls == ["dirty_rate"] * 2  # nothing was there to be aborted; the rest needs no measuring
        assert scene.told("Predicted") == []

    def test_a_job_that_is_taken_over_is_not_measured(self) -> None:
        scene = Scene(shrinking, sample_s=1, adopt=True)
        scene.runs_already(2)
        _let_it_be_watched(scene)
        scene.play()
        assert "dirty_rate" not in scene.calls
        assert scene.told("Predicted") == []


class TestAborts:
    def test_it_is_asked_for_until_the_call_returns(self) -> None:
        scene = Scene(completion_timeout_s=60)
        scene.aborts_slowly = True
        scene.happenings = {3: scene.cancel}
        ended = scene.play()
        assert (ended["end"], ended["message"]) == ("aborted", "canceled by client")
        assert "timed_out" not in ended
        assert scene.calls == ["migrate", "abort at 3", "abort at 3.1"]


class TestDeadlines:
    def test_the_time_in_all(self) -> None:
        scene = Scene(sawtooth, completion_timeout_s=40, progress_timeout_s=150)
        scene.aborts_slowly = True
        ended = scene.play()
        assert scene.calls == ["migrate", "abort at 40", "abort at 40.1"]
        assert ended["end"] == "aborted"
        assert ended["timed_out"] == "completion"
        assert ended["message"] == "aborted after 40 s: it did not complete in its time"

    def test_no_progress(self) -> None:
        scene = Scene(lambda _: TOTAL // 2, completion_timeout_s=400, progress_timeout_s=15)
        ended = scene.play()
        assert ended["timed_out"] == "progress"
        assert ended["message"] == "aborted after 15 s: what is left to send did not shrink for 15 s"

    def test_measuring_takes_no_time_of_the_migrations(self) -> None:
        scene = Scene(sawtooth, completion_timeout_s=40, sample_s=10)
        scene.play()
        assert scene.calls[-1] == "abort at 50"

    def test_one_that_is_over_just_then_has_succeeded(self) -> None:
        scene = Scene(lambda elapsed: TOTAL if elapsed < 41 else None, completion_timeout_s=40)
        aborts: list[str] = []
        scene.abort = lambda uuid: not aborts.append(uuid)  # type: ignore[func-returns-value,method-assign]
        ended = scene.play()
        assert aborts
        assert (ended["end"], ended["message"]) == ("succeeded", "")
        assert "timed_out" not in ended

    def test_they_hold_without_redis(self) -> None:
        scene = Scene(sawtooth, completion_timeout_s=40)
        scene.happenings = {5: lambda: setattr(scene, "redis_is_away", True)}
        scene.happenings[60] = lambda: setattr(scene, "redis_is_away", False)
        assert scene.play()["timed_out"] == "completion"
        assert scene.calls[1] in {f"abort at {40 + tenth / 10:g}" for tenth in range(10)}

    def test_they_hold_when_the_hypervisor_tells_nothing(self) -> None:
        scene = Scene(sawtooth, completion_timeout_s=40)
        scene.happenings = {10: lambda: setattr(scene, "job_is_silent", True)}
        scene.happenings[200] = lambda: pytest.fail("nothing was done")
        original = scene.wait

        def wait(event: threading.Event, timeout_s: float | None) -> bool:
            original(event, timeout_s)
            if scene._ends is not None:
                raise _Over
            return event.is_set()

        scene.wait = wait  # type: ignore[method-assign]
        ended = scene.play()
        assert ended["end"] == "unknown"  # both hosts are asked, and twice
        assert ended["timed_out"] == "completion"
        assert ended["message"].startswith("aborted after 4")
        assert ended["message"].endswith("it did not complete in its time; nobody knows")

    def test_a_job_that_was_taken_over_has_the_time_that_is_left_of_its_own(self) -> None:
        scene = Scene(sawtooth, adopt=True, completion_timeout_s=40)
        scene.runs_already(35)
        _let_it_be_watched(scene)
        ended = scene.play()
        assert scene.calls == ["abort at 5"]
        assert (ended["end"], ended["timed_out"]) == ("unknown", "completion")
        assert ended["message"] == (
            "aborted after 40 s: it did not complete in its time; the job that was taken over has ended"
        )


class TestPostCopy:
    def test_it_ends_what_has_had_its_time(self) -> None:
        scene = Scene(sawtooth, completion_timeout_s=20, post_copy=True)
        ended = scene.play()
        assert scene.calls == ["migrate", "post-copy at 20"]
        assert ended["end"] == "succeeded"
        assert "timed_out" not in ended
        assert ended["job"]["post_copy"]
        assert [body["job"]["post_copy"] for body in scene.told("Progress")] == [False] * 20 + [True] * 5

    def test_where_it_is_refused_the_migration_is_aborted(self) -> None:
        scene = Scene(sawtooth, completion_timeout_s=20, post_copy=True)
        scene.refuses_post_copy = True
        ended = scene.play()
        assert scene.calls == ["migrate", "post-copy at 20", "abort at 20"]
        assert ended["timed_out"] == "completion"

    def test_it_is_not_asked_for_where_it_is_not_allowed(self) -> None:
        scene = Scene(sawtooth, completion_timeout_s=20)
        scene.play()
        assert scene.calls == ["migrate", "abort at 20"]

    def test_nothing_aborts_it(self) -> None:
        scene = Scene(sawtooth, completion_timeout_s=20, post_copy=True)
        scene.happenings = {22: scene.cancel}
        assert scene.play()["end"] == "succeeded"
        assert scene.calls == ["migrate", "post-copy at 20"]

    def test_one_that_an_earlier_worker_began_is_left_alone(self) -> None:
        scene = Scene(
            lambda elapsed: TOTAL if elapsed < 60 else None, adopt=True, completion_timeout_s=20, post_copy=True
        )
        scene.runs_already(30)
        scene._state = DomainState.POSTCOPY
        _let_it_be_watched(scene)
        ended = scene.play()
        assert scene.calls == []
        assert ended["job"]["post_copy"]
        assert "timed_out" not in ended


def _let_it_be_watched(scene: Scene) -> None:
    """The worker that took a job over waits by the clock; let the watch run meanwhile."""
    original = scene.wait

    def wait(event: threading.Event, timeout_s: float | None) -> bool:
        scene.wait = original  # type: ignore[method-assign]
        scene._block(lambda: scene._result() is not None)
        return event.is_set()

    scene.wait = wait  # type: ignore[method-assign]

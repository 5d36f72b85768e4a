"""The engine itself: its time, that a seed gives one story, and that broken code does not get past its checks."""

import shutil
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from orchestrator.planner import flow, observation, policy
from orchestrator.planner.settlement import Settled, Verdict
from orchestrator.planner.snapshot import Limits, Snapshot
from orchestrator.resources import Node, Reading
from orchestrator.services import context, migrations, policies, returning, settling
from orchestrator.store import Store, connection
from orchestrator.store.batch import Batch
from orchestrator.store.node_store import NodeStore
from tests.builders import uuid_of
from tests.redis_server import RedisServer
from tests.scenarios.conftest import Play
from tests.scenarios.engine import node
from tests.scenarios.engine import schedule as schedule_module
from tests.scenarios.engine.invariants import Broken, Invariants
from tests.scenarios.engine.redis_time import EPOCH, TimeOfDay
from tests.scenarios.engine.run import ScenarioFailed
from tests.scenarios.engine.schedule import Process, Schedule, Stuck
from tests.scenarios.engine.timeline import Timeline
from workers import lifecycle, watching
from workers.hypervisor.port import Marker
from workers.hypervisor.simulated_faults import Faults
from workers.hypervisor.simulated_spec import HostSpec
from workers.hypervisor.simulated_world import World

HERE = Path(__file__).parent
Mutate = Callable[[pytest.MonkeyPatch], None]

# --- simulated time ---------------------------------------------------------------------------------------------------


def test_redis_lives_in_simulated_time(simulated_redis: RedisServer, time_of_day: TimeOfDay) -> None:
    time_of_day.set(100.25)
    with simulated_redis.client() as client:
        begin = int(EPOCH.timestamp())
        assert client.time() == (begin + 100, 250_000)
        assert client.eval("return redis.call('TIME')", 0) == [str(begin + 100), "250000"]
        client.set("key", "value", px=5_000)
        time_of_day.set(105.2)
        assert client.pttl("key") == 50
        time_of_day.set(105.3)
        assert client.get("key") is None


def test_redis_keeps_what_it_was_told_over_a_kill(simulated_redis: RedisServer, time_of_day: TimeOfDay) -> None:
    with simulated_redis.client() as client:
        client.set("key", "value")
        run_id = client.info("server")["run_id"]
    simulated_redis.kill()
    simulated_redis.start()
    with simulated_redis.client() as client:
        assert client.get("key") == "value"
        assert client.info("server")["run_id"] != run_id


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_is_one_story(play_scenario: Play, seed: int) -> None:
    stories = [[str(e) for e in play_scenario(HERE / "restart", seed)] for _ in range(2)]
    assert stories[0] == stories[1]


def test_seeds_are_different_stories(play_scenario: Play) -> None:
    """What happens at one moment may happen in any order; else a seed would show nothing new."""
    stories = {tuple(str(e) for e in play_scenario(HERE / "restart", seed)) for seed in range(3)}
    assert len(stories) > 1


def test_threads_take_turns_in_simulated_time() -> None:
    told: list[str] = []
    schedule = Schedule(0, lambda _: None)

    def tick(name: str, every_s: float) -> None:
        while True:
            told.append(f"{name} at {schedule.now:g}")
            schedule.wait(lambda: False, every_s)

    process = Process("p")
    schedule.spawn(process, "a", lambda: tick("a", 60))
    schedule.spawn(process, "b", lambda: tick("b", 100))
    schedule.at(90, lambda: told.append("timer"))
    schedule.run_until(130)
    assert sorted(told[:2]) == ["a at 0", "b at 0"]
    assert told[2:] == ["a at 60", "timer", "b at 100", "a at 120"]
    process.is_alive = False
    schedule.run_until(1_000)
    assert len(told) == 6
    assert schedule.now == 1_000


def test_a_thread_that_waits_for_real_time_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule_module, "_REAL_S", 0.1)
    schedule, really = Schedule(0, lambda _: None), threading.Event()
    schedule.spawn(Process("p"), "main", lambda: _wait_for(really))
    with pytest.raises(Stuck, match="_wait_for"):
        schedule.run_until(1)
    really.set()
    schedule.end()


def _wait_for(event: threading.Event) -> None:
    event.wait(60)


def test_two_threads_that_only_wake_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule_module, "_MOST_STEPS_AT_ONCE", 50)
    schedule = Schedule(0, lambda _: None)

    def spin() -> None:
        while True:
            schedule.wait(lambda: True)

    schedule.spawn(Process("p"), "main", spin)
    with pytest.raises(Stuck, match="time stands still at 0"):
        schedule.run_until(1)
    schedule.end()


# --- broken scenarios -------------------------------------------------------------------------------------------------


def copy_of(tmp_path: Path, scenario: str) -> Path:
    return Path(shutil.copytree(HERE / scenario, tmp_path / scenario))


@pytest.mark.parametrize("name", ["README.md", "herd.yaml", "script.yaml", "expected.txt"])
def test_a_missing_file_fails_and_is_not_made(play_scenario: Play, tmp_path: Path, name: str) -> None:
    folder = copy_of(tmp_path, "always-off")
    (folder / name).unlink()
    with pytest.raises(AssertionError, match=f"{name} is missing"):
        play_scenario(folder)
    assert not (folder / name).exists()


def test_a_missing_expectation_of_a_warning_fails(play_scenario: Play, tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "worker-dies")
    lines = (folder / "expected.txt").read_text().splitlines()
    (folder / "expected.txt").write_text("\n".join(line for line in lines if "warning" not in line))
    with pytest.raises(ScenarioFailed, match=r"a warning that was not expected: .* AttemptFailed"):
        play_scenario(folder)


def test_what_does_not_happen_fails_with_the_whole_story(play_scenario: Play, tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "always-off")
    (folder / "expected.txt").write_text("0 vm/a Running on n7\n")
    with pytest.raises(ScenarioFailed) as failure:
        play_scenario(folder)
    assert "not met in its place: line 1: 0  vm/a  Running on n7" in str(failure.value)
    assert "1.000   vm/a                     Stopped (StoppedByOperation)" in str(failure.value)


def test_a_trap_that_is_never_sprung_fails(play_scenario: Play, tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "always-off")
    script = (folder / "script.yaml").read_text()
    (folder / "script.yaml").write_text(script + "  - {at: 1, do: kill migrate@n1 before migrate}\n")
    with pytest.raises(ScenarioFailed, match="never came to pass: kill migrate@n1 before migrate"):
        play_scenario(folder)


def test_a_word_that_the_script_does_not_know_is_refused(play_scenario: Play, tmp_path: Path) -> None:
    folder = copy_of(tmp_path, "always-off")
    (folder / "script.yaml").write_text("end: 1\nevents: [{at: 0, do: frobnicate a}]\n")
    with pytest.raises(ValueError, match="frobnicate"):
        play_scenario(folder)


def test_an_error_in_a_thread_of_the_herd_fails(monkeypatch: pytest.MonkeyPatch, play_scenario: Play) -> None:
    def broken(*_: object) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(node, "run_stop", broken)
    with pytest.raises(ScenarioFailed, match="ZeroDivisionError") as failure:
        play_scenario(HERE / "stop-obeyed")
    assert isinstance(failure.value.__cause__, ZeroDivisionError)


# --- what is true on hosts ----------------------------------------------------------------------------------------

XML = f"<domain type='kvm'><name>default.a</name><uuid>{uuid_of('a')}</uuid><memory unit='MiB'>64</memory></domain>"


@pytest.fixture
def world() -> World:
    return World(clock=lambda: 0.0, hosts=[HostSpec("n1"), HostSpec("n2"), HostSpec("n3")])


@pytest.fixture
def invariants(store: Store, world: World) -> Invariants:
    return Invariants(store, Timeline(store, lambda: 0.0), world)


def test_a_vm_that_runs_twice_is_seen(world: World, invariants: Invariants) -> None:
    world.call("n1", "start", XML, Marker("default", "a", 1, 1)).result(0)
    invariants.check_hosts()
    world.call("n2", "start", XML, Marker("default", "a", 2, 2)).result(0)
    with pytest.raises(Broken, match="runs twice: on n1 and n2"):
        invariants.check_hosts()


def test_a_double_made_by_hand_may_be_there_until_it_is_one_again(world: World, invariants: Invariants) -> None:
    for host in ("n1", "n2"):
        world.call(host, "start", XML, Marker("default", "a", 1, 1)).result(0)
    invariants.excuse(uuid_of("a"))
    invariants.check_hosts()
    Faults(world).destroy("default/a", "n2")
    invariants.check_hosts()
    world.call("n3", "start", XML, Marker("default", "a", 1, 1)).result(0)
    with pytest.raises(Broken, match="runs twice: on n1 and n3"):
        invariants.check_hosts()


def test_a_double_made_by_hand_must_have_been_and_be_no_more(world: World, invariants: Invariants) -> None:
    invariants.excuse(uuid_of("a"))
    world.call("n1", "start", XML, Marker("default", "a", 1, 1)).result(0)
    with pytest.raises(Broken, match="was to run twice, and never did"):
        invariants.check_end()
    world.call("n2", "start", XML, Marker("default", "a", 1, 1)).result(0)
    with pytest.raises(Broken, match="still runs twice"):
        invariants.check_end()


def test_a_start_while_another_host_has_it_is_seen(world: World, invariants: Invariants) -> None:
    world.call("n1", "start", XML, Marker("default", "a", 1, 1)).result(0)
    Faults(world).pause("default/a")
    with pytest.raises(Broken, match=r"is started on n2 .* while n1 has it: paused"):
        invariants.see_call("n2", "start", (XML, Marker("default", "a", 2, 2)))


def test_a_hand_laid_on_a_domain_that_is_not_ours_is_seen(world: World, invariants: Invariants) -> None:
    Faults(world).start_persistent("n1", XML)
    invariants.see_call("n1", "domain", (uuid_of("a"),))
    with pytest.raises(Broken, match="asked to destroy a domain that is not ours"):
        invariants.see_call("n1", "destroy", (uuid_of("a"),))


# --- broken code --------------------------------------------------------------------------------------------------


def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the plan nor the commit looks at slots."""
    monkeypatch.setattr(Limits, "__init__", _free_limits)
    _unchecked(monkeypatch, "slots")


def _free_limits(self: Limits, *_: int, **__: int) -> None:
    for name in Limits.__dataclass_fields__:
        object.__setattr__(self, name, 99)


def no_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan and the script forget the herd's cap; the nodes' own limits hold."""
    monkeypatch.setattr(Snapshot, "cap", property(lambda _: 99))
    _script(monkeypatch, 'redis.call("SCARD", "slots:cluster") >= redis.call("SCARD", "schedulable")', "false")


def leaked_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit that ends a grant leaves its slot."""
    effect = Batch.effect

    def kept(self: Batch, *command: str | int) -> Batch:
        return self if command[0] == "SREM" and str(command[1]).startswith("slots:out") else effect(self, *command)

    monkeypatch.setattr(Batch, "effect", kept)


def back_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that ran out of time counts as failed, unasked."""
    begin = settling.begin

    def concluded(ctx: Any, batch: Any, operation: Any, cause: str, *, kill: bool, **more: str) -> Any:
        if not kill:
            return begin(ctx, batch, operation, cause, kill=kill, **more)
        _, vm = context.load_pair(ctx.store, operation.key)
        reading = Reading(present=False)
        transition = flow.came_back(operation, vm, reading, cause, ctx.now(), retry_limit=ctx.config.retry_limit)
        context.put_transition(batch, operation, vm, transition, ctx.now())
        return transition.operation

    monkeypatch.setattr(settling, "begin", concluded)


def always_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that succeeded is read as one that did not take place."""
    monkeypatch.setattr(settling, "settle_start", lambda *_: Settled(Verdict.BACK, "the domain is absent"))


def falling_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the job sets the progress anew."""
    given = iter(range(1_000))

    def fallen(operation: Any, *_: Any, **__: Any) -> Any:
        return flow.Transition(operation.with_status(progress=90 - next(given) % 50))

    monkeypatch.setattr(migrations, "progressed", fallen)


def lost_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks again at a grant that was not reported."""
    effect = Batch.effect

    def untimed(self: Batch, *command: str | int) -> Batch:
        return self if command[0] == "DEADLINE" else effect(self, *command)

    monkeypatch.setattr(Batch, "effect", untimed)


def deaf_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker acts on every message, whether its grant was taken or not."""
    claim = NodeStore.claim

    def again(self: NodeStore, operation: str, epoch: int, holder: str) -> Any:
        return claim(self, operation, epoch, holder) or self.grant(operation)

    monkeypatch.setattr(NodeStore, "claim", again)


def no_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "backoff", lambda _: timedelta())


def no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "next_step", lambda _: None)


def pulled_plugs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graceful stop does not ask."""
    monkeypatch.setattr(lifecycle, "_ask", lambda _store, hypervisor, grant: hypervisor.destroy(grant.uuid) or "")


def no_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration is not aborted."""
    monkeypatch.setattr(watching.Watch, "_is_aborting", property(lambda _: False))


def unheard_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that shuts down is like any other."""
    monkeypatch.setattr(Node, "is_shutting_down", property(lambda _: False))


def blind_to_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outdated copy that a node shows is nothing to speak of."""
    monkeypatch.setattr(observation, "_observe_outdated", lambda *_: observation.Observation())


def hasty_welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that was fenced is back whatever it shows."""
    monkeypatch.setattr(returning, "_outdated", lambda *_: {})


def _unchecked(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check = Batch.check
    monkeypatch.setattr(Batch, "check", lambda self, *words: self if words[0] == name else check(self, *words))


def _script(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    source = connection._source

    def mutated(name: str) -> str:
        text = source(name)
        assert name != "commit" or old in text
        return text.replace(old, new)

    monkeypatch.setattr(connection, "_source", mutated)


@pytest.mark.parametrize(
    ("mutate", "scenario", "told"),
    [
        (no_limits, "evict-under-limits", "migrations are granted to leave n1, 1 may"),
        (no_cap, "cap-on-migrations", "3 migrations, and 2 schedulable nodes"),
        (leaked_slot, "evict-under-limits", "slots:outbound:.* which no document asks for"),
        (back_too_early, "host-dies-during-start", "is granted to n2, while it may run on n1: no evidence"),
        (always_back, "messages-lost-and-doubled", "is granted to .* while it may run on"),
        (falling_progress, "evict-under-limits", "progress fell from"),
        (lost_operation, "messages-lost-and-doubled", "has an open grant and no timer"),
        (deaf_worker, "messages-lost-and-doubled", "never  host/n2  migrate b"),
        (no_back_off, "crashes-and-plugs-pulled", "not met in its place: .* warning BackOff"),
        (no_policy, "guest-powers-off", "not met in its place: .* vm/always  Running"),
        (pulled_plugs, "stop-obeyed", "not met in its place: .* shutdown a"),
        (no_abort, "stop-supersedes-migration", "not met in its place: .* abort a"),
        (blind_to_copies, "outdated-copy-is-seen", "at the end: a still runs twice"),
        (hasty_welcome, "returns-with-a-stale-guest", "not met in its place: .* warning OutdatedGuests"),
        (unheard_shutdown, "host-shuts-down", r"not met in its place: .* vm/manual  Stopped \(StoppedByNode\)"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "in",
)
def test_broken_code_fails_a_scenario(
    monkeypatch: pytest.MonkeyPatch, play_scenario: Play, mutate: Mutate, scenario: str, told: str
) -> None:
    mutate(monkeypatch)
    with pytest.raises(ScenarioFailed, match=told):
        play_scenario(HERE / scenario)

"""The herd's metrics on a real Redis: true figures, one round trip, nothing left of what was deleted."""

import json
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.errors import StoreUnavailable
from orchestrator.queues import CONTROL, migrate_queue
from orchestrator.resources import Node
from orchestrator.resources.drain import DrainSpec
from orchestrator.services import capacity, drains
from orchestrator.services.context import Clock
from orchestrator.services.herd import Herd
from orchestrator.services.herd_metrics import FAMILIES, HerdMetrics
from orchestrator.services.nodes import set_labels
from orchestrator.store import keys
from tests.fakes import Stage
from tests.fencing import FencingStage, a_bmc
from tests.redis_server import RedisServer


@pytest.fixture
def stage(redis_url: str) -> Iterator[Stage]:
    stage = Stage(redis_url)
    stage.add_nodes("n1", "n2", "n3")
    yield stage
    stage.close()


class Scrapes:
    """Scrapes a stage; time passes only when it is said."""

    def __init__(self, stage: Stage) -> None:
        self.herd = stage.herd
        self.now = 100.0
        self.metrics = HerdMetrics(self._herd, Clock(monotonic=lambda: self.now))

    def _herd(self) -> Herd:
        self.herd.follower.sync()
        return self.herd

    def take(self) -> dict[str, dict[str, float]]:
        """By metric, values by their labels as text."""
        return {
            family.name: {",".join(sample.labels.values()): sample.value for sample in family.samples}
            for family in text_string_to_metric_families(self.metrics.render())
        }


def test_a_migration_shows_while_it_runs_and_not_afterwards(stage: Stage) -> None:
    stage.add_vm("a", "n1")
    scrapes = Scrapes(stage)
    before = scrapes.take()
    assert before["vmherd_slots_cap"][""] == 3
    assert before["vmherd_slots_in_use"][""] == 0
    assert before["vmherd_node_virtualmachines"] == {"n1": 1, "n2": 0, "n3": 0}
    operation = stage.evict("a")
    waiting = scrapes.take()
    assert sum(waiting["vmherd_operations_pending"].values()) == 1
    stage.play(lambda: stage.operation(operation).status.grant is not None)
    granted = stage.operation(operation).status.grant
    assert granted is not None
    running = scrapes.take()
    assert running["vmherd_slots_in_use"][""] == 1
    assert running["vmherd_node_migrations_outbound"]["n1"] == 1
    assert running["vmherd_node_migrations_inbound"][granted.target] == 1
    reserved = running["vmherd_node_memory_reserved_bytes"]
    assert reserved[granted.target] == reserved["n1"] > 0, "both ends have its memory"
    assert sum(running["vmherd_grants"].values()) == 1
    stage.play(lambda: not stage.operation(operation).is_active)
    after = scrapes.take()
    assert after["vmherd_slots_in_use"][""] == 0
    assert after["vmherd_node_virtualmachines"][granted.target] == 1
    assert after["vmherd_node_memory_reserved_bytes"]["n1"] == 0
    assert "vmherd_operations_pending" not in after
    assert sum(after["vmherd_grants"].values()) == 0


def test_a_deleted_documents_series_go_with_it(stage: Stage) -> None:
    vm = stage.add_vm("a", "n1")
    scrapes = Scrapes(stage)
    assert len(scrapes.take()["d8_virtualization_virtualmachine_status_phase"]) == 1
    stage.store.must_commit(stage.store.batch().delete(vm))
    assert "d8_virtualization_virtualmachine_status_phase" not in scrapes.take()
    assert not any(vm.metadata.uid in line for line in scrapes.metrics.render().splitlines())


def test_queues_lengths_and_how_long_the_next_message_has_been_the_next(stage: Stage) -> None:
    scrapes = Scrapes(stage)
    queue = migrate_queue("n1")
    redis = stage.store.redis
    assert scrapes.take()["vmherd_queue_length"][queue] == 0
    redis.lpush(queue, "first", "second")
    assert scrapes.take()["vmherd_queue_age_seconds"][queue] == 0
    scrapes.now += 30
    shown = scrapes.take()
    assert (shown["vmherd_queue_length"][queue], shown["vmherd_queue_age_seconds"][queue]) == (2, 30)
    assert shown["vmherd_queue_age_seconds"][CONTROL] == 0
    redis.rpop(queue)  # a worker takes the first
    assert scrapes.take()["vmherd_queue_age_seconds"][queue] == 0
    scrapes.now += 5
    redis.lpush(queue, "third")
    assert scrapes.take()["vmherd_queue_age_seconds"][queue] == 5


def test_a_leases_age_is_by_redis_own_clock_and_rubbish_in_it_is_that_nodes_alone(stage: Stage) -> None:
    redis = stage.store.redis
    seconds, _ = redis.time()
    redis.set(keys.lease("n1"), json.dumps({"renewed_ms": (seconds - 60) * 1000}))
    redis.set(keys.lease("n2"), "rubbish")
    redis.delete(keys.lease("n3"))
    ages = Scrapes(stage).take()["vmherd_node_lease_age_seconds"]
    assert set(ages) == {"n1"}
    assert 60 <= ages["n1"] < 90


def test_whether_a_node_or_its_rack_could_be_lost_shows_once_it_was_looked_at(stage: Stage) -> None:
    def look() -> dict[str, dict[str, float]]:
        stage.herd.follower.sync()
        capacity.watch(stage.ctx, stage.herd)
        return scrapes.take()

    scrapes = Scrapes(stage)
    stage.add_vm("a", "n1", selector={"disk": "ssd"})
    for node, labels in {"n1": {"disk": "ssd", "rack": "r1"}, "n2": {"rack": "r1"}, "n3": {"rack": "r2"}}.items():
        set_labels(stage.ctx, node, dict(labels))
    before = scrapes.take()
    assert not {"vmherd_node_failover_ready", "vmherd_failure_domain_ready"} & set(before)
    stranded = look()
    assert stranded["vmherd_node_failover_ready"] == {"n1": 0, "n2": 1, "n3": 1}
    assert stranded["vmherd_failure_domain_ready"] == {"n1": 0, "n2": 0, "n3": 1}
    set_labels(stage.ctx, "n3", {"disk": "ssd"})
    fitting = look()
    assert fitting["vmherd_node_failover_ready"] == {"n1": 1, "n2": 1, "n3": 1}
    assert fitting["vmherd_failure_domain_ready"] == {"n1": 1, "n2": 1, "n3": 1}
    set_labels(stage.ctx, "n1", {"rack": None})
    assert look()["vmherd_failure_domain_ready"] == {"n2": 1, "n3": 1}, "what is in no rack says nothing of one"


def test_a_drain_shows_its_vms_and_when_it_ends_once_that_can_be_foreseen(stage: Stage) -> None:
    vms = [stage.add_vm(name, "n1").name for name in ("a", "b", "c")]
    scrapes = Scrapes(stage)
    assert "vmherd_node_drain_phase" not in scrapes.take()
    drains.begin(stage.ctx, "n1", DrainSpec())
    begun = scrapes.take()
    assert begun["vmherd_node_drain_phase"] == {"n1,Draining": 1}
    assert begun["vmherd_node_drain_virtualmachines"] == {"n1,Moving": 3}
    assert "vmherd_node_drain_eta_seconds" not in begun, "no rate was measured yet"
    stage.play(lambda: "n1,Left" in scrapes.take()["vmherd_node_drain_virtualmachines"])
    moving = scrapes.take()
    assert list(moving["vmherd_node_drain_eta_seconds"]) == ["n1"]
    assert moving["vmherd_node_drain_virtualmachines"]["n1,Moving"] >= 1
    stage.play(lambda: stage.is_at_rest(*vms) and not stage.world.hosts["n1"])
    stage.nodes["n1"].list_all()
    stage.read()
    ended = scrapes.take()
    assert ended["vmherd_node_drain_phase"] == {"n1,Drained": 1}
    assert "vmherd_node_drain_eta_seconds" not in ended


def test_a_lost_node_shows_its_evidence_and_how_long_its_recovery_took(stage: Stage) -> None:
    stage.add_vm("a", "n1")
    herd = FencingStage(stage)
    scrapes = Scrapes(stage)
    assert "vmherd_node_lost_timestamp_seconds" not in scrapes.take()
    herd.configure("n1", bmc=a_bmc("n1", attempts=1))
    herd.switches.stuck.add("n1")
    herd.lose("n1")
    herd.until_tried("n1")
    unconfirmed = scrapes.take()
    assert unconfirmed["vmherd_node_fencing_phase"]["n1,FenceUnconfirmed"] == 1
    assert "vmherd_node_evidence_timestamp_seconds" not in unconfirmed
    (lost_at,) = unconfirmed["vmherd_node_lost_timestamp_seconds"].values()
    herd.switches.stuck.clear()
    herd.scan(40)
    herd.settle()
    recovered = scrapes.take()
    assert recovered["vmherd_node_fencing_phase"]["n1,Recovered"] == 1
    assert recovered["vmherd_node_lost_timestamp_seconds"] == {"n1": lost_at}, "as it was noticed first"
    assert recovered["vmherd_node_evidence_timestamp_seconds"]["n1,BMC"] >= lost_at
    since = herd.fencing("n1").status.since
    assert since is not None
    assert recovered["vmherd_node_recovery_seconds"]["n1"] == pytest.approx(since.timestamp() - lost_at, abs=1e-6)


def test_recovery_mode_shows(stage: Stage) -> None:
    scrapes = Scrapes(stage)
    stage.store.redis.hset(keys.IDENTITY, "state", "recovery")
    assert scrapes.take()["vmherd_recovery_mode"][""] == 1
    stage.store.redis.hset(keys.IDENTITY, "state", "normal")
    assert scrapes.take()["vmherd_recovery_mode"][""] == 0


def test_without_redis_nothing_of_the_herd_is_shown(durable_redis: RedisServer) -> None:
    stage = Stage(durable_redis.url)
    stage.add_nodes("n1")
    stage.herd.follower.sync()
    metrics = HerdMetrics(lambda: stage.herd)
    assert "vmherd_slots_cap 1" in metrics.render()
    durable_redis.kill()
    (family,) = text_string_to_metric_families(metrics.render())
    assert (family.name, family.samples[0].value) == ("vmherd_redis_up", 0)
    stage.close()


def test_without_a_copy_yet_it_is_as_without_redis() -> None:
    def none_yet() -> Herd:
        raise StoreUnavailable("no Redis")

    assert "vmherd_redis_up 0" in HerdMetrics(none_yet).render()


def test_a_scrape_asks_redis_once_however_many_nodes_there_are(stage: Stage) -> None:
    scrapes = Scrapes(stage)
    scrapes.take()
    before = stage.store.redis.info("stats")["total_reads_processed"]
    scrapes.metrics.render()  # without the test's own `sync`, which is another
    few = stage.store.redis.info("stats")["total_reads_processed"] - before
    stage.add_nodes(*(f"m{number}" for number in range(50)))
    stage.herd.follower.sync()
    assert len(stage.herd.follower.all(Node)) == 53
    before = stage.store.redis.info("stats")["total_reads_processed"]
    HerdMetrics(lambda: stage.herd).render()
    many = stage.store.redis.info("stats")["total_reads_processed"] - before
    assert many <= few + 3


def test_all_that_is_shown_is_declared(stage: Stage) -> None:
    stage.add_vm("a", "n1")
    stage.evict("a")
    declared = {family.name: set(family.labels) for family in FAMILIES}
    families = list(text_string_to_metric_families(Scrapes(stage).metrics.render()))
    assert len(families) > 25
    for family in families:
        for sample in family.samples:
            assert set(sample.labels) == declared[family.name]

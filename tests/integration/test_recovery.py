"""Redis restarted or failed over: nothing is granted until each live node has listed its domains; nothing is lost."""

from collections import deque
from collections.abc import Iterator

import pytest

from orchestrator.errors import StoreUnavailable, VersionExpired
from orchestrator.resources import Node, NodeInventory, OperationPhase
from orchestrator.services.recovery import SKIP, recover
from orchestrator.store import Store, keys
from orchestrator.store.connection import connect
from tests.fakes import Copy, Stage
from tests.redis_server import RedisServer
from tests.threads import in_threads
from tests.waiting import wait_until


@pytest.fixture
def durable(durable_redis: RedisServer) -> Iterator[Stage]:
    stage = Stage(durable_redis.url)
    stage.add_nodes("n1", "n2", "n3")
    yield stage
    stage.close()


def restart(server: RedisServer, stage: Stage) -> None:
    server.kill()
    server.start()
    wait_until(lambda: is_up(stage.store), 10, "Redis is back")


def is_up(store: Store) -> bool:
    try:
        return store.version() >= 0
    except StoreUnavailable:
        return False


def state(stage: Stage) -> str:
    return str(stage.store.redis.hget(keys.IDENTITY, "state"))


def test_nothing_is_granted_until_all_live_nodes_have_listed(durable: Stage, durable_redis: RedisServer) -> None:
    durable.add_vm("a", "n1")
    operation = durable.evict("a")
    epoch, version = durable.store.next_epochs(1)[0], durable.store.version()
    restart(durable_redis, durable)
    assert durable.grant() == []  # before anybody has noticed: the commit itself finds another run id
    durable.reconcile()
    assert state(durable) == "recovering"
    assert durable.grant() == []
    for name in ("n1", "n3"):
        durable.nodes[name].answer()
    durable.read()
    durable.reconcile()
    assert state(durable) == "recovering"
    assert durable.grant() == []
    durable.nodes["n2"].answer()
    durable.read()
    durable.reconcile()
    assert state(durable) == "normal"
    (message,) = durable.grant()
    grant = durable.nodes["n1"].begin(message)
    assert grant is not None
    assert grant.epoch > epoch + SKIP
    assert durable.store.version() > version + SKIP
    assert durable.operation(operation).version > version + SKIP


def test_a_node_that_is_not_ready_is_not_waited_for(durable: Stage, durable_redis: RedisServer) -> None:
    durable.nodes["n3"].store.report("HypervisorLost", {})
    durable.read()
    restart(durable_redis, durable)
    durable.reconcile()
    for name in ("n1", "n2"):
        durable.nodes[name].answer()
    durable.read()
    durable.reconcile()
    assert state(durable) == "normal"


def test_a_listing_from_before_does_not_count(durable: Stage, durable_redis: RedisServer) -> None:
    restart(durable_redis, durable)
    durable.reconcile()
    for node in durable.nodes.values():
        node.list_all()
        node.list_all("recovery-of-another")
    durable.read()
    durable.reconcile()
    assert state(durable) == "recovering"


def test_epochs_go_past_the_highest_that_a_host_has_seen(durable: Stage, durable_redis: RedisServer) -> None:
    durable.nodes["n2"].domains["u"] = Copy("", epoch=7 * SKIP)
    restart(durable_redis, durable)
    durable.recover()
    assert state(durable) == "normal"
    assert durable.store.next_epochs(1)[0] > 7 * SKIP


def test_what_was_under_way_goes_on(durable: Stage, durable_redis: RedisServer) -> None:
    durable.add_vm("a", "n1")
    operation = durable.evict("a")
    (message,) = durable.grant()
    grant = durable.nodes["n1"].begin(message)
    assert grant is not None
    durable.read()
    durable.expire(keys.DEADLINES, operation.key)  # an outage makes no grant suspect
    restart(durable_redis, durable)
    durable.recover()
    assert [call for call in durable.world.calls if call.startswith("kill")] == []
    durable.nodes["n1"].switch_over(grant)
    durable.nodes["n1"].end(grant)
    durable.play(lambda: durable.operation(operation).status.phase is OperationPhase.COMPLETED)
    assert durable.is_at_rest("a")


def test_those_who_follow_read_anew_and_old_watches_end(durable: Stage, durable_redis: RedisServer) -> None:
    watch = durable.store.watch(durable.store.version(), block_ms=1)
    assert next(watch) is None
    version = durable.store.version()
    restart(durable_redis, durable)
    durable.recover()
    with pytest.raises(VersionExpired):
        deque(watch, maxlen=0)
    for old in (version, version + 1, version + SKIP // 2):  # none of these was ever in the history that is told now
        with pytest.raises(VersionExpired):
            next(durable.store.watch(old, block_ms=1))
    durable.herd.follower.sync()
    assert len(durable.herd.follower.all(Node)) == 3


def test_an_idle_herd_is_in_step_after_the_skip(durable_redis: RedisServer) -> None:
    """No node, no VM: recovery itself changes no document, and still whoever waits for the last version gets it."""
    stage = Stage(durable_redis.url)
    stage.reconcile()
    restart(durable_redis, stage)
    stage.reconcile()
    assert state(stage) == "normal"
    stage.herd.follower.sync(2.0)
    stage.close()


def test_a_redis_that_lost_everything_learns_the_herd_anew(durable: Stage, durable_redis: RedisServer) -> None:
    durable.add_vm("a", "n1")
    with durable_redis.client() as client:
        client.flushall()
    durable.reconcile()
    assert state(durable) == "normal"  # there is nobody to wait for
    wait_until(lambda: durable.herd.follower.all(Node) == [] or None, 5, "the old herd is forgotten", interval=0.1)


def test_two_that_notice_at_once_enter_once(durable: Stage, durable_redis: RedisServer) -> None:
    epoch = durable.store.next_epochs(1)[0]
    restart(durable_redis, durable)
    in_threads(4, lambda _: recover(durable.ctx))
    taken = durable.store.next_epochs(1)[0]
    assert epoch + SKIP < taken < epoch + 2 * SKIP


def test_a_failover_to_a_replica_that_lacks_the_last_grant(stage: Stage) -> None:
    """The grant is lost, and its migration runs: the herd sees it on the host, and begins no second one."""
    vm = stage.add_vm("a", "n1")
    operation = stage.evict("a")
    before = stage.operation(operation)
    (message,) = stage.grant()
    grant = stage.nodes["n1"].begin(message)
    assert grant is not None
    # As the replica has it: without the grant, under another replication id.
    lost = stage.operation(operation)
    stage.store.must_commit(stage.store.batch().put(lost, lost.with_(status=before.status)))
    stage.store.redis.hset(keys.IDENTITY, "replid", "0" * 40)
    stage.nodes["n1"].domains[vm.metadata.uid].job = True
    assert stage.grant() == []
    stage.recover()
    assert stage.grant() == []
    assert stage.operation(operation).message == "a migration that vmherd did not begin runs on node n1"
    stage.nodes["n1"].switch_over(grant)
    stage.nodes["n2"].tell(vm.metadata.uid)
    stage.nodes["n1"].tell(vm.metadata.uid, "migrated")
    stage.read()
    assert stage.vm("a").status.node_name == "n2"


def test_connections_say_what_is_wrong_while_it_is_away(durable_redis: RedisServer) -> None:
    url = durable_redis.url
    stage = Stage(url)
    durable_redis.kill()
    store = Store(connect(url, retries=0), stage.store.config)
    for call in (lambda: store.all(NodeInventory), store.version, lambda: store.commit(store.batch())):
        with pytest.raises(StoreUnavailable, match=r"^no Redis at redis://127\.0\.0\.1:\d+/0: "):
            call()
    stage.close()

"""A Redis with a real replica: what would start a VM counts only once the replica has it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.queues import Task
from orchestrator.resources import OperationType
from orchestrator.services.failover import recover_node
from orchestrator.services.fencing import confirm
from orchestrator.services.membership import keep_membership
from orchestrator.services.operations import create_operation, new_operation
from orchestrator.store import Store, keys
from orchestrator.store.connection import connect
from tests.builders import a_lease
from tests.fakes import Stage
from tests.fencing import FencingStage
from tests.redis_server import RedisServer
from tests.waiting import wait_until

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RedisServer, RedisServer]]:
    folder: Path = tmp_path_factory.mktemp("replicated")
    primary = RedisServer(folder / "primary")
    primary.start()
    replica = RedisServer(folder / "replica", arguments=("--replicaof", "127.0.0.1", str(primary.port)))
    replica.start()
    yield primary, replica
    for server in (replica, primary):
        server.kill()


@pytest.fixture
def replica(servers: tuple[RedisServer, RedisServer]) -> Iterator[RedisServer]:
    """The replica, which follows; one that a test has frozen goes on."""
    primary, replica = servers
    with primary.client() as client:
        wait_until(lambda: client.wait(1, 1000) == 1 or None, 60, "the replica follows")
        yield replica
        replica.resume()


@pytest.fixture
def stage(servers: tuple[RedisServer, RedisServer], replica: RedisServer) -> Iterator[Stage]:
    primary, _ = servers
    primary.clear()
    stage = Stage(primary.url)
    stage.add_nodes("n1", "n2", "n3")
    yield stage
    stage.close()


def test_another_process_s_writes_are_waited_for(stage: Stage, replica: RedisServer) -> None:
    other = Store(connect(stage.url))
    assert other.is_replicated()
    replica.pause()
    stage.store.next_epochs(1)
    assert not other.is_replicated()
    replica.resume()
    wait_until(lambda: other.is_replicated() or None, 60, "the replica has it")
    other.close()


def test_a_start_is_sent_once_a_replica_has_its_grant(stage: Stage, replica: RedisServer) -> None:
    vm = stage.add_vm("a", "n1", policy="Manual")
    stage.nodes["n1"].power_off(vm.metadata.uid)
    stage.read()
    create_operation(stage.ctx, new_operation("a", OperationType.START))
    replica.pause()
    assert stage.grant() == []
    held = stage.store.redis.hgetall(keys.OPEN_GRANTS)
    assert list(held) == ["default/a"]
    assert not stage.outbox.take(Task.NODE_START)
    replica.resume()
    (operation,) = held.values()
    stage.expire(keys.AWAITING, str(operation))
    stage.reconcile()
    assert len(stage.outbox.take(Task.NODE_START)) == 1


def test_a_set_number_is_waited_for_even_while_none_is_connected(redis_url: str) -> None:
    stage = Stage(redis_url, redis_replicas=1)
    assert not stage.store.is_replicated()
    stage.close()


def test_evidence_starts_nothing_before_a_replica_has_it(stage: Stage, replica: RedisServer) -> None:
    stage.add_vm("a", "n1")
    herd = FencingStage(stage)
    herd.lose("n1")
    herd.until_tried("n1")
    confirm(herd.ctx, "n1", "a person")
    replica.pause()
    assert not recover_node(herd.ctx, stage.herd, "n1")
    assert stage.vm("a").status.node_name == "n1"
    replica.resume()
    wait_until(lambda: recover_node(herd.ctx, stage.herd, "n1") or None, 60, "it is recovered")


def test_a_membership_is_published_once_a_replica_has_it(stage: Stage, replica: RedisServer) -> None:
    for name, node in stage.nodes.items():
        node.store.renew_lease(a_lease(1, address=f"{name}:7949"))
    stage.herd.follower.sync()
    replica.pause()
    assert keep_membership(stage.ctx, stage.herd) is None
    assert stage.store.redis.get(keys.MEMBERSHIP) is None
    # A failover here leaves what is prepared: whoever joins meanwhile waits for the next one.
    stage.add_nodes("n4")
    stage.nodes["n4"].store.renew_lease(a_lease(1, address="n4:7949"))
    stage.herd.follower.sync()
    replica.resume()
    published = wait_until(lambda: keep_membership(stage.ctx, stage.herd), 60, "it is published")
    assert published is not None
    assert (published.version, sorted(published.members)) == (1, ["n1", "n2", "n3"])

"""What one node's Redis user may do: all that its processes do, and nothing to anybody else's keys.

Node `n1` is tried against node `n10`, whose name begins with its own.
"""

from collections.abc import Iterator

import pytest
import redis

from orchestrator.errors import Invalid, StoreUnavailable
from orchestrator.queues import lifecycle_queue, migrate_queue
from orchestrator.resources import GrantState, VirtualMachineOperation
from orchestrator.store import Store, access, keys
from orchestrator.store.connection import connect
from orchestrator.store.node_store import NodeStore
from tests.builders import a_grant, a_lease, a_node, an_operation
from tests.redis_contents import contents
from tests.redis_server import RedisServer

Command = tuple[str | int, ...]


@pytest.fixture
def node(store: Store, redis_server: RedisServer) -> Iterator["redis.Redis"]:
    """Node n1's connection; the herd has a second node n10 with a grant, and everything else that there is to touch."""
    for name in ("n1", "n10"):
        access.enroll(store.redis, name, f"secret-{name}")
    batch = store.batch().create(a_node("n1")).create(a_node("n10"))
    for number, (source, target) in enumerate((("n1", "n10"), ("n10", "n1"))):
        grant = a_grant(node=source, target=target, epoch=number + 1)
        batch.create(an_operation(f"op{number}", f"vm{number}", grant=grant))
    batch.wake("n1", "test").wake("n10", "test")
    store.must_commit(batch)
    other = NodeStore(store.redis, "n10")
    other.renew_lease(a_lease())
    other.report("Domain", {"uuid": "u"})
    store.redis.lpush("node.n10.migrate", "message")
    store.redis.lpush("control", "message")
    store.redis.hset(keys.CURSORS, "n1", "0-0")
    store.redis.hset(keys.IDENTITY, "state", "normal")
    client = connect(as_node(redis_server, "n1"), retries=0)
    yield client
    client.close()


def as_node(server: RedisServer, name: str, password: str | None = None) -> str:
    return f"redis://{access.user_name(name)}:{password or f'secret-{name}'}@127.0.0.1:{server.port}/0"


def test_a_nodes_processes_can_do_all_that_they_do(node: "redis.Redis", store: Store) -> None:
    mine = NodeStore(node, "n1")
    mine.renew_lease(a_lease())
    assert mine.report("Domain", {"uuid": "u"}) == 1
    assert mine.counter() == 1
    mine.show_alive("g-1")
    assert mine.grant("default/op0") is not None
    claimed = mine.claim("default/op0", 1, "worker")
    assert claimed is not None
    assert claimed.target == "n10"
    assert mine.counter() == 2
    assert mine.orders() == {}
    assert mine.order("x") is None
    assert mine.wait_for_wake("0-0", 0.01) != "0-0"
    assert store.redis.exists(keys.lease("n1"))


def test_its_scripts_work_when_redis_does_not_have_them_yet(node: "redis.Redis", store: Store) -> None:
    store.redis.script_flush()
    assert NodeStore(node, "n1").report("Domain", {}) == 1


@pytest.mark.parametrize("queue", [migrate_queue("n1"), lifecycle_queue("n1")])
def test_its_workers_can_use_their_queues(node: "redis.Redis", queue: str) -> None:
    short = queue.rpartition(".")[2]
    prefix = access.unacked_prefix("n1", short)
    node.lpush(queue, "message")
    assert node.llen(queue) == 1
    assert list(node.brpop([queue], 1) or ()) == [queue, "message"]
    node.sadd(f"_kombu.binding.{queue}", "x")
    assert node.smembers(f"_kombu.binding.{queue}") == {"x"}
    node.smembers("_kombu.binding.node.n10.migrate")
    with node.pipeline() as pipe:
        pipe.zadd(f"{prefix}_index", {"tag": 1})
        pipe.hset(prefix, "tag", "message")
        pipe.execute()
    assert node.set(f"{prefix}_mutex", "x", nx=True, ex=10)
    node.publish("/0.celeryev/worker.heartbeat", "{}")


FOREIGN_KEYS: list[str] = [
    keys.lease("n10"),
    keys.counter("n10"),
    keys.reports("n10"),
    keys.grants("n10"),
    keys.orders("n10"),
    keys.wake("n10"),
    keys.taken_over("n10"),
    keys.disarm("n10"),
    "node:{n10}:claim:1",
    "node:{n1}",
    "node.n10.migrate",
    "node.n10.lifecycle",
    access.unacked_prefix("n10", "migrate"),
    f"{access.unacked_prefix('n10', 'lifecycle')}_index",
    "control",
    "liveness",
    "fencing",
    "unacked",
    "unacked_index",
    "celery-task-meta-1",
    keys.VERSION,
    keys.EPOCH,
    keys.IDENTITY,
    keys.CHANGES,
    keys.SCHEDULABLE,
    keys.ACTIVE_OPERATIONS,
    keys.SLOTS_CLUSTER,
    keys.slots_outbound("n1"),
    keys.slots_inbound("n1"),
    keys.claims("n1"),
    keys.DEADLINES,
    keys.AWAITING,
    keys.CURSORS,
    keys.wanted("grant"),
    keys.tick("reconcile", 1),
    keys.resources("Node"),
    keys.resources("VirtualMachine"),
    keys.resources("VirtualMachineOperation"),
    "request:1",
    "celery.pidbox",
    "node:*",
    "anything",
]


@pytest.mark.parametrize("key", FOREIGN_KEYS)
def test_foreign_keys_can_neither_be_read_nor_written(node: "redis.Redis", store: Store, key: str) -> None:
    before = contents(store.redis)
    for command in (
        ("GET", key),
        ("SET", key, "x"),
        ("DEL", key),
        ("HGET", key, "f"),
        ("HSET", key, "f", "x"),
        ("HGETALL", key),
        ("SADD", key, "x"),
        ("SREM", key, "n10"),
        ("SMEMBERS", key),
        ("LPUSH", key, "x"),
        ("RPOP", key),
        ("BRPOP", key, 1),
        ("ZADD", key, 1, "x"),
        ("XADD", key, "*", "f", "x"),
        ("XREAD", "COUNT", 1, "STREAMS", key, "0"),
        ("EXPIRE", key, 1),
        ("INCR", key),
        ("EXISTS", key),
        ("EVAL", "return redis.call('DEL', KEYS[1])", 1, key),
        ("EVAL", "return redis.call('GET', ARGV[1])", 0, key),
        ("EVAL", "return redis.call('SET', ARGV[1], 'x')", 0, key),
    ):
        denied(node, command)
    assert contents(store.redis) == before


READ_ONLY = [
    keys.grants("n1"),
    keys.orders("n1"),
    keys.wake("n1"),
    "_kombu.binding.control",
    keys.MEMBERSHIP,
    keys.PEER_KEY,
    keys.SUSPICIONS,
    keys.taken_over("n1"),
    keys.disarm("n1"),
]


@pytest.mark.parametrize("key", READ_ONLY)
def test_what_the_control_plane_tells_it_can_be_read_only(node: "redis.Redis", store: Store, key: str) -> None:
    before = contents(store.redis)
    for command in (
        ("SET", key, "x"),
        ("DEL", key),
        ("HSET", key, "f", "x"),
        ("HDEL", key, "default/op0"),
        ("SADD", key, "x"),
        ("XADD", key, "*", "f", "x"),
        ("EXPIRE", key, 1),
        ("EVAL", "return redis.call('HSET', ARGV[1], 'f', 'x')", 0, key),
        ("EVAL", "return redis.call('DEL', ARGV[1])", 0, key),
    ):
        denied(node, command)
    assert contents(store.redis) == before


@pytest.mark.parametrize(
    "command",
    [
        ("KEYS", "*"),
        ("SCAN", 0),
        ("RANDOMKEY",),
        ("DBSIZE",),
        ("FLUSHALL",),
        ("FLUSHDB",),
        ("SWAPDB", 0, 1),
        ("CONFIG", "GET", "*"),
        ("CONFIG", "SET", "maxmemory", 1),
        ("ACL", "LIST"),
        ("ACL", "WHOAMI"),
        ("ACL", "SETUSER", "node-n1", "allkeys"),
        ("SCRIPT", "FLUSH"),
        ("SCRIPT", "KILL"),
        ("FUNCTION", "LOAD", "x"),
        ("MONITOR",),
        ("SHUTDOWN", "NOSAVE"),
        ("DEBUG", "SLEEP", 0),
        ("REPLICAOF", "127.0.0.1", 1),
        ("FAILOVER",),
        ("CLIENT", "LIST"),
        ("CLIENT", "KILL", "TYPE", "normal"),
        ("CLIENT", "PAUSE", 1),
        ("SAVE",),
        ("BGREWRITEAOF",),
        ("MIGRATE", "127.0.0.1", 1, "node:{n1}:lease", 0, 1),
        ("RENAME", "node:{n1}:lease", "node:{n1}:other"),
        ("COPY", "node:{n1}:lease", "node:{n10}:lease"),
        ("SORT", "node:{n1}:list"),
        ("OBJECT", "ENCODING", "node:{n1}:lease"),
        ("XTRIM", "node:{n1}:reports", "MAXLEN", 0),
        ("PUBSUB", "CHANNELS"),
        ("LATENCY", "RESET"),
        ("SLOWLOG", "GET"),
        ("MODULE", "LIST"),
    ],
    ids=lambda command: " ".join(str(word) for word in command[:2]),
)
def test_commands_that_it_does_not_need_are_denied(node: "redis.Redis", store: Store, command: Command) -> None:
    before = contents(store.redis)
    denied(node, command)
    assert contents(store.redis) == before


@pytest.mark.parametrize(
    "command",
    [
        ("PUBLISH", "/0.celery.pidbox", '{"method":"shutdown"}'),
        ("PUBLISH", "/0.reply.celery.pidbox", "{}"),
        ("PUBLISH", "anything", "x"),
        ("SUBSCRIBE", "/0.celery.pidbox"),
        ("PSUBSCRIBE", "*"),
        ("PSUBSCRIBE", "/0.*"),
    ],
    ids=lambda command: f"{command[0]} {command[1]}",
)
def test_it_can_not_speak_to_other_workers(node: "redis.Redis", command: Command) -> None:
    denied(node, command)


def test_it_can_not_take_a_neighbours_grant(node: "redis.Redis", store: Store) -> None:
    """Neither as itself nor by naming keys of its own beside the neighbour's grants: scripts run with its rights."""
    before = contents(store.redis)
    with pytest.raises(StoreUnavailable, match="does not permit"):
        NodeStore(node, "n10").claim("default/op1", 2, "worker")
    script = NodeStore(node, "n1")._claim
    own = ["node:{n1}:claim:2", keys.counter("n1"), keys.reports("n1")]
    with pytest.raises(redis.ResponseError, match="executing the script can't access"):
        script(keys=own, args=[keys.grants("n10"), "default/op1", 2, "me", 100, "{}"])
    with pytest.raises(StoreUnavailable):
        NodeStore(node, "n10").report("Ended", {"operation": "default/op1", "epoch": 2})
    assert contents(store.redis) == before


def test_the_users_password_is_needed(store: Store, redis_server: RedisServer) -> None:
    access.enroll(store.redis, "n1", "secret-n1")
    for url in (as_node(redis_server, "n1", "wrong"), as_node(redis_server, "n2")):
        with pytest.raises(StoreUnavailable, match=r"refuses the user or password.*"):
            NodeStore(connect(url, retries=0), "n1").counter()


def test_enrolling_again_gives_a_new_password_and_the_old_one_is_void(store: Store, redis_server: RedisServer) -> None:
    old = access.enroll(store.redis, "n1")
    new = access.enroll(store.redis, "n1")
    assert NodeStore(connect(as_node(redis_server, "n1", new)), "n1").counter() == 0
    with pytest.raises(StoreUnavailable):
        NodeStore(connect(as_node(redis_server, "n1", old), retries=0), "n1").counter()


def test_expelling_ends_it_at_once(node: "redis.Redis", store: Store) -> None:
    assert access.enrolled(store.redis) == {"n1", "n10"}
    assert node.ping()
    access.expel(store.redis, "n1")
    assert access.enrolled(store.redis) == {"n10"}
    with pytest.raises(redis.RedisError):
        node.ping()


def test_users_outlive_a_restart_of_redis(durable_redis: RedisServer) -> None:
    with durable_redis.client() as client:
        access.enroll(client, "n1", "secret-n1")
    durable_redis.kill()
    durable_redis.start()
    assert NodeStore(connect(as_node(durable_redis, "n1")), "n1").counter() == 0


@pytest.mark.parametrize("name", ["n*", "n1}", "n1 ~*", "N1", "", "n1\nallkeys", "~*", "n?"])
def test_a_name_that_could_widen_the_rights_is_refused(store: Store, name: str) -> None:
    with pytest.raises((ValueError, Invalid)):
        access.enroll(store.redis, name)
    assert access.enrolled(store.redis) == set()


def test_a_claim_withdrawn_is_not_given(node: "redis.Redis", store: Store) -> None:
    old = store.get(VirtualMachineOperation, "default/op0")
    store.must_commit(store.batch().put(old, old.with_grant(state=GrantState.SETTLING)))
    assert NodeStore(node, "n1").claim("default/op0", 1, "worker") is None


def denied(client: "redis.Redis", command: Command) -> None:
    with pytest.raises(redis.ResponseError, match=r"no permissions|executing the script can't|not allowed"):
        client.execute_command(*command)  # type: ignore[no-untyped-call]

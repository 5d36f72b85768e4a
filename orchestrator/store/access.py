"""Redis ACLs: what one node may do. A stolen host can't touch another's keys, slots, documents, or the control plane.

Lua runs with its caller's rights, so `report.lua`, `claim.lua` and `lease.lua` need nothing beyond this list. The keys
of a node's Celery queues are granted by their exact names; Kombu's bindings are readable, and writable only for these
queues. `INFO` tells the node's processes that Redis was restarted.
"""

import secrets
from typing import cast

import redis

from orchestrator.queues import lifecycle_queue, migrate_queue
from orchestrator.resources.names import check_name
from orchestrator.store import keys
from orchestrator.store.connection import redis_errors

_COMMANDS = (
    "brpop ping hello auth client|setname client|no-evict client|id select multi exec watch unwatch "
    "discard zadd zrem zrange zrevrangebyscore zrangebyscore hset hget hdel hgetall lpush rpush llen rpop sadd srem "
    "smembers set get setex expire pexpire del exists publish subscribe unsubscribe psubscribe punsubscribe eval "
    "evalsha script|load script|exists mget info incr xadd xread time"
)


def user_name(node: str) -> str:
    """Name of a node's Redis user."""
    return f"node-{node}"


def unacked_prefix(node: str, queue: str) -> str:
    """Kombu's own bookkeeping of one queue's worker: per node, else every node could read and edit all messages."""
    return f"node.{node}.{queue}.unacked"


def node_rules(node: str) -> list[str]:
    """Give the ACL rules of a node's user, without its password."""
    queues = (migrate_queue(node), lifecycle_queue(node))
    patterns = [
        f"~{keys.node_prefix(node)}*",
        f"%R~{keys.grants(node)}",
        f"%R~{keys.orders(node)}",
        f"%R~{keys.wake(node)}",
        *(f"%R~{key}" for key in (keys.MEMBERSHIP, keys.PEER_KEY, keys.SUSPICIONS)),
        *(f"%R~{key}" for key in (keys.taken_over(node), keys.disarm(node))),
        "%R~_kombu.binding.*",
    ]
    for queue, short in zip(queues, ("migrate", "lifecycle"), strict=True):
        prefix = unacked_prefix(node, short)
        names = (queue, f"_kombu.binding.{queue}", f"_kombu.binding_permanent.{queue}")
        patterns += [f"~{name}" for name in (*names, prefix, f"{prefix}_index", f"{prefix}_mutex")]
    channels = ["&/*.celeryev/*"]  # its events, which Flower shows; not `celery.pidbox`, which commands all workers
    return [
        "reset",
        "on",
        *patterns,
        "resetchannels",
        *channels,
        "-@all",
        *(f"+{command}" for command in _COMMANDS.split()),
    ]


_WITNESS_COMMANDS = "ping hello auth client|setname client|id select eval evalsha script|load get set hgetall time"


def witness_rules(node: str) -> list[str]:
    """Give the ACL rules of a witness's user: it renews a lease, and does nothing else."""
    readable = (keys.MEMBERSHIP, keys.PEER_KEY, keys.SUSPICIONS, keys.taken_over(node), keys.disarm(node))
    patterns = [f"~{keys.lease(node)}", *(f"%R~{key}" for key in readable)]
    commands = [f"+{command}" for command in _WITNESS_COMMANDS.split()]
    return ["reset", "on", *patterns, "resetchannels", "-@all", *commands]


def enroll(client: "redis.Redis", node: str, password: str | None = None, *, is_witness: bool = False) -> str:
    """Create or renew a node's Redis user.

    Args:
        client: With the right to change ACLs.
        node: A DNS label.
        password: Chosen at random when not given.
        is_witness: It is a machine without VMs.

    Returns:
        The password. It is stored as a hash only, and can't be read again.
    """
    check_name(node)
    password = password or secrets.token_urlsafe(24)
    with redis_errors(client):
        rules = witness_rules(node) if is_witness else node_rules(node)
        _acl(client, "SETUSER", user_name(node), *rules, f">{password}")
        client.set(keys.PEER_KEY, secrets.token_hex(32), nx=True)
        _save(client)
    return password


def expel(client: "redis.Redis", node: str) -> None:
    """Remove a node's Redis user and close its connections. It knows the key by which members speak: they get another.

    Members learn it with their next renewal; until then those that have it can't ask those that have not.
    """
    with redis_errors(client):
        _acl(client, "DELUSER", user_name(node))
        client.set(keys.PEER_KEY, secrets.token_hex(32))
        _save(client)


def enrolled(client: "redis.Redis") -> set[str]:
    """Give the names of the nodes that have a user."""
    prefix = user_name("")
    with redis_errors(client):
        users = cast("list[str]", _acl(client, "USERS"))
    return {user.removeprefix(prefix) for user in users if user.startswith(prefix)}


def _save(client: "redis.Redis") -> None:
    """Write the users to Redis's ACL file, where it has one; without one a restart of Redis forgets them."""
    if cast("dict[str, str]", client.config_get("aclfile")).get("aclfile"):
        _acl(client, "SAVE")


def _acl(client: "redis.Redis", *arguments: str) -> object:
    return client.execute_command("ACL", *arguments)  # type: ignore[no-untyped-call] # redis-py leaves it untyped

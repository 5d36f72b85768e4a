"""All that a Redis holds, to be compared before and after."""

from typing import Any

import redis


def contents(client: "redis.Redis", *, ignoring: tuple[str, ...] = ("request:",)) -> dict[str, Any]:
    """Read all keys and what they hold.

    Args:
        client: Gives text.
        ignoring: Keys that begin so are left out; by default the answers kept for repeated requests.
    """
    names = sorted(key for key in client.scan_iter() if not key.startswith(ignoring))
    return {name: _value(client, name) for name in names}


def _value(client: "redis.Redis", name: str) -> Any:
    match client.type(name):
        case "hash":
            return client.hgetall(name)
        case "set":
            return client.smembers(name)
        case "list":
            return client.lrange(name, 0, -1)
        case "zset":
            return client.zrange(name, 0, -1, withscores=True)
        case "stream":
            return client.xrange(name)
        case _:
            return client.get(name)

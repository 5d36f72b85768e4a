"""What fencing reaches out of the herd with, and the right to: one agent at a time works on a node."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit
from uuid import uuid4

from orchestrator.fencing.agents import FenceAgents, PowerSwitch
from orchestrator.resources import Node
from orchestrator.resources.looking import LIBVIRT_PORTS
from orchestrator.services.context import Context
from orchestrator.store import keys
from orchestrator.store.connection import redis_errors

_CONNECT_S = 1.0


def is_listening(host: str, port: int) -> bool:
    """Whether something takes connections there."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S):
            return True
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Tools:
    """What reaches out of the herd; the scenarios hand in simulated ones.

    Attributes:
        switch: Reads and cuts power.
        is_listening: Whether a port of a host takes connections.
    """

    switch: PowerSwitch
    is_listening: Callable[[str, int], bool] = is_listening


def default_tools() -> Tools:
    """Give the fence agents of this machine."""
    return Tools(FenceAgents())


def is_answering(tools: Tools, node: Node) -> bool:
    """Whether a host's libvirt daemon takes connections."""
    parts = urlsplit(node.status.hypervisor.migration_uri)
    port = parts.port or LIBVIRT_PORTS.get(parts.scheme.partition("+")[2])
    return bool(parts.hostname) and port is not None and tools.is_listening(str(parts.hostname), port)


@contextmanager
def alone(ctx: Context, name: str) -> Iterator[bool]:
    """Hold the right to run agents for a node; it ends by itself when this process dies, after the longest agent."""
    token, redis = uuid4().hex, ctx.store.redis
    with redis_errors(redis):
        is_ours = bool(redis.set(keys.fencing(name), token, nx=True, px=keys.FENCING_TTL_MS))
    try:
        yield is_ours
    finally:
        if is_ours:
            with redis_errors(redis):
                if redis.get(keys.fencing(name)) == token:
                    redis.delete(keys.fencing(name))


def hold_on(ctx: Context, name: str) -> None:
    """Hold the right for one agent more."""
    with redis_errors(ctx.store.redis):
        ctx.store.redis.pexpire(keys.fencing(name), keys.FENCING_TTL_MS)

"""What is in use of hosts, as their agents measure it: for people to look at. Nothing is decided by it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from pydantic import TypeAdapter, ValidationError

from orchestrator.store import Store, keys
from orchestrator.store.connection import redis_errors


@dataclass(frozen=True, slots=True)
class Use:
    """Of one host.

    Attributes:
        cpu: The share of its CPUs that was busy over the last ten seconds, 0 to 1; guests and the host's own work.
        memory_mib: Memory that is neither free nor the page cache's.
    """

    cpu: float
    memory_mib: int


_USE = TypeAdapter(Use)


def read_uses(store: Store, nodes: Iterable[str]) -> dict[str, Use]:
    """Read what is in use of some nodes, in one round trip; those that have not told within a minute are left out."""
    names = list(nodes)
    if not names:
        return {}
    with redis_errors(store.redis):
        texts = cast("list[str | None]", store.redis.mget([keys.use(name) for name in names]))
    found: dict[str, Use] = {}
    for name, text in zip(names, texts, strict=True):
        try:
            if text is not None:
                found[name] = _USE.validate_json(text)
        except ValidationError:
            continue  # a node can write anything into its own keys: it shows as one that has not told
    return found


__all__ = ["Use", "read_uses"]

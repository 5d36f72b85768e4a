"""Whether what Redis holds is what `orchestrator.store.keys` declares: the table in its docstring is read."""

import re
from dataclasses import dataclass

import redis

from orchestrator.store import keys

_PLACEHOLDER = re.compile(r"<[a-zA-Z]+>")


@dataclass(frozen=True)
class Declared:
    """One key of the table.

    Attributes:
        types: Redis's names of the types that it may have.
        expires: Whether it must have an expiry; else it must have none.
    """

    name: str
    pattern: re.Pattern[str]
    types: tuple[str, ...]
    expires: bool


def declared() -> list[Declared]:
    """Read the table."""
    text = re.sub(r"\n  (?=\S)", " ", keys.__doc__ or "")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    result = []
    for names, types, _, expiry in rows:
        for name in re.findall(r"`([^`]+)`", names):
            pattern = "".join(
                ".+" if _PLACEHOLDER.fullmatch(part) else re.escape(part)
                for part in re.split(rf"({_PLACEHOLDER.pattern})", name)
            )
            found = tuple(re.findall(r"string|hash|zset|set|list|stream", types))
            expires = not expiry.strip().startswith(("none", "bounded"))
            result.append(Declared(name, re.compile(pattern), found, expires))
    return result


def check_keys(client: "redis.Redis") -> set[str]:
    """Compare all keys with the table.

    Returns:
        The names, as the table has them, of the keys that are there.

    Raises:
        AssertionError: A key that the table does not have, or one of another type, or with or without an expiry
            against what the table says.
    """
    table = declared()
    seen: set[str] = set()
    problems: list[str] = []
    for key in sorted(str(name) for name in client.scan_iter(count=1000)):
        kind, ttl = client.type(key), client.pttl(key)
        if kind == "none":
            continue  # it expired after it was listed
        # The longest name is the most exact one: `node.<n>.<role>.unacked` is no queue.
        matching = [entry for entry in table if entry.pattern.fullmatch(key) and kind in entry.types]
        if not matching:
            problems.append(f"{key} ({kind!s}) is not declared")
            continue
        entry = max(matching, key=lambda entry: len(entry.name))
        seen.add(entry.name)
        if (ttl > 0) != entry.expires and ttl != -2:  # -2: it has just expired
            problems.append(f"{key} has {'an' if ttl > 0 else 'no'} expiry, against {entry.name}")
    assert not problems, "\n".join(problems)
    return seen

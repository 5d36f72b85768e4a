"""Connections to Redis, and Redis's own errors put in our words."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import resources as package_files
from typing import cast
from urllib.parse import urlsplit

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.commands.core import Script
from redis.retry import Retry

from orchestrator.errors import Invalid, StoreUnavailable

SOCKET_TIMEOUT_S = 5.0


def connect(url: str, *, timeout_s: float = SOCKET_TIMEOUT_S, retries: int = 2) -> "redis.Redis":
    """Open a pool of connections; nothing is sent yet.

    The client sends a command again when a reply is lost (redis-py would do so ten times by default). Each of our
    scripts gives the same answer when it is run twice; nothing else that we send is harmed by it.

    Raises:
        Invalid: The URL can't be used.
    """
    tcp = {} if url.startswith("unix://") else {"socket_connect_timeout": min(3.0, timeout_s), "socket_keepalive": True}
    try:
        client = redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=timeout_s,
            **tcp,
            health_check_interval=15,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), retries),
        )
        client.connection_pool.make_connection()  # an unknown option of the URL is refused here, not at first use
        _check_database(url)
    except (ValueError, TypeError) as error:
        raise Invalid(
            f"VMHERD_REDIS_URL: {error} (expected redis://[user:password@]host:port/db or unix:///path?db=0)"
        ) from error
    return client


_SHARED = ("host", "port", "db", "username", "password", "path", "decode_responses", "socket_timeout")
"""Options that threads' and asyncio's connections have in common, besides those of TLS."""


def connect_async(client: "redis.Redis") -> "redis.asyncio.Redis":
    """Open a pool of asyncio's own connections to where a client's go; nothing is sent yet, and nothing sent twice."""
    given = client.connection_pool.connection_kwargs
    options = {name: value for name, value in given.items() if name in _SHARED or name.startswith("ssl_")}
    kind: type[redis.asyncio.Connection | redis.asyncio.UnixDomainSocketConnection] = redis.asyncio.Connection
    if "path" in options:
        kind = redis.asyncio.UnixDomainSocketConnection
    elif client.connection_pool.connection_class is redis.SSLConnection:
        kind = redis.asyncio.SSLConnection
    pool = redis.asyncio.ConnectionPool(connection_class=kind, **options, retry=AsyncRetry(NoBackoff(), 0))
    return redis.asyncio.Redis(connection_pool=pool)


def _check_database(url: str) -> None:
    path = urlsplit(url).path.strip("/")
    if path and not path.isdecimal() and not url.startswith("unix:"):
        raise ValueError(f"the database is a number, not {path!r}")  # redis-py would take 0


def where(client: "redis.Redis") -> str:
    """Say which Redis a client talks to, without its password."""
    options = client.connection_pool.connection_kwargs
    if "path" in options:
        return f"unix://{options['path']}"
    scheme = "rediss" if client.connection_pool.connection_class is redis.SSLConnection else "redis"
    return f"{scheme}://{options.get('host', 'localhost')}:{options.get('port', 6379)}/{options.get('db') or 0}"


def without_password(url: str) -> str:
    """Give a URL that may be logged."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


# For some codes redis-py has a class, and drops the code from the text; in a pipeline the text has more before it.
_LATER = (
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.MasterDownError,
    redis.exceptions.ExecAbortError,
)
_LATER_CODES = re.compile(r"(^|: )(LOADING|READONLY|MISCONF|OOM|NOREPLICAS|MASTERDOWN|BUSY)\b")
"""What passes by itself, or once a person has made room."""


@contextmanager
def redis_errors(client: "redis.Redis") -> Iterator[None]:
    """Turn Redis's errors into ours, naming the server.

    Raises:
        StoreUnavailable: No connection, no answer, or the password or the rights are not enough.
    """
    try:
        yield
    except redis.exceptions.AuthenticationError as error:
        raise StoreUnavailable(f"Redis at {where(client)} refuses the user or password: {error}") from error
    except redis.exceptions.NoPermissionError as error:
        raise StoreUnavailable(f"Redis at {where(client)} does not permit this user to do that: {error}") from error
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as error:
        raise StoreUnavailable(f"no Redis at {where(client)}: {error}") from error
    except redis.exceptions.ResponseError as error:
        if isinstance(error, _LATER) or _LATER_CODES.search(str(error)):
            raise StoreUnavailable(f"Redis at {where(client)} can't take this now: {error}") from error
        if "executing the script can't" in str(error):  # NOPERM, as a script's caller is told it
            raise StoreUnavailable(f"Redis at {where(client)} does not permit this user to do that: {error}") from error
        raise
    except (KeyboardInterrupt, SystemExit):
        # It comes between any two instructions: a reply may be left unread, and would be taken for the next command's.
        client.connection_pool.disconnect(inuse_connections=False)
        raise


@cache
def _source(name: str) -> str:
    return (package_files.files("orchestrator.store") / "lua" / f"{name}.lua").read_text()


def script(client: "redis.Redis", name: str) -> Script:
    """Register one of `lua/*.lua` on a client."""
    return client.register_script(_source(name))


Entries = list[tuple[str, dict[str, str]]]


def read_streams(answer: object) -> list[tuple[str, Entries]]:
    """Read XREAD's answer, which is a list under RESP2 and a mapping under RESP3.

    Returns:
        Pairs of a stream's name and its entries, each an id and its fields.
    """
    if not answer:
        return []
    if isinstance(answer, dict):
        streams = cast("dict[str, list[Entries] | Entries]", answer)
        return [
            (name, cast("Entries", entries[0] if entries and isinstance(entries[0], list) else entries))
            for name, entries in streams.items()
        ]
    return cast("list[tuple[str, Entries]]", answer)

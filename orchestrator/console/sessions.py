"""Who is signed in: a session begins with an API token and is worth what that token is worth.

The browser has a random number in a cookie, Redis has its digest with the token's name and uid: so each server knows
each session, a restart ends none, and whoever reads Redis can't take one over. The token itself is not kept. Its
document is looked up each time, so a session ends in the moment in which its token is revoked or expires.
"""

import asyncio
import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

from orchestrator.api.access import Access, Identity
from orchestrator.errors import Unauthorized
from orchestrator.store import Store, keys
from orchestrator.store.connection import redis_errors

LASTS_S: Final = 12 * 3600
"""A session ends after so long, whatever is done in it."""
_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Session:
    """One person in one browser.

    Attributes:
        key: Of Redis; not what the cookie holds.
        identity: Whose token it began with.
        csrf: Goes with each form of this session.
    """

    key: str
    identity: Identity
    csrf: str


class Sessions:
    """Begins, finds and ends sessions. Its methods wait for Redis in a thread.

    Args:
        store: Where they are kept.
        access: Knows tokens.
    """

    def __init__(self, store: Store, access: Access) -> None:
        self._store = store
        self._access = access

    async def begin(self, token: str) -> tuple[str, Session]:
        """Begin one.

        Returns:
            What the cookie is to hold, and the session.

        Raises:
            Unauthorized: The token is not valid.
            StoreUnavailable: Redis does not answer.
        """
        identity = self._access.authenticate(f"Bearer {token}")
        number, csrf = secrets.token_urlsafe(_BYTES), secrets.token_urlsafe(_BYTES)
        key = _key(number)
        kept = json.dumps({"token": identity.name, "uid": identity.uid, "csrf": csrf})
        await self._ask(lambda: self._store.redis.set(key, kept, ex=LASTS_S))
        return number, Session(key, identity, csrf)

    async def find(self, number: str) -> Session | None:
        """Give the session of a cookie; None where there is none, or no more.

        Raises:
            StoreUnavailable: Redis does not answer.
        """
        return await self._read(_key(number)) if number else None

    async def renewed(self, session: Session) -> Session:
        """Give a session as it is now.

        Raises:
            Unauthorized: It has ended.
            StoreUnavailable: Redis does not answer.
        """
        found = await self._read(session.key)
        if found is None:
            raise Unauthorized("the session has ended: sign in again")
        return found

    def is_valid(self, session: Session) -> bool:
        """Whether its token still counts, as far as this server knows; that it was ended is not looked at."""
        return self._access.is_valid(session.identity)

    async def end(self, session: Session) -> None:
        """End one."""
        await self._ask(lambda: self._store.redis.delete(session.key))

    async def _read(self, key: str) -> Session | None:
        kept = cast("str | None", await self._ask(lambda: self._store.redis.get(key)))
        if kept is None:
            return None
        found = json.loads(kept)
        identity = self._access.identify(found["token"], found["uid"])
        return Session(key, identity, found["csrf"]) if identity is not None else None

    async def _ask(self, what: Callable[[], Any]) -> Any:
        def ask() -> Any:
            with redis_errors(self._store.redis):
                return what()

        return await asyncio.to_thread(ask)


def _key(number: str) -> str:
    return keys.console_session(hashlib.sha256(number.encode()).hexdigest())

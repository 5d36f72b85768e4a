"""Asking Redis how far the herd's history has come: one question for all who want to know at a time."""

import asyncio
from typing import cast

import redis
import redis.asyncio

from orchestrator.errors import StoreUnavailable
from orchestrator.store import keys
from orchestrator.store.connection import connect_async


class Newest:
    """Reads the counter of changes. For one event loop.

    Args:
        client: Says where Redis is.
    """

    def __init__(self, client: "redis.Redis") -> None:
        self._redis = connect_async(client)
        self._next: asyncio.Future[int] | None = None
        self._reader: asyncio.Task[None] | None = None

    async def ask(self) -> int:
        """Give a version that is at least what was committed before this call.

        A question that is under way does not count: Redis may have answered it before the call. All who come meanwhile
        share the next one.

        Raises:
            StoreUnavailable: Redis does not answer.
        """
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
            if self._reader is None or self._reader.done():
                self._reader = asyncio.create_task(self._read())
        return await asyncio.shield(self._next)

    async def close(self) -> None:
        """Close the connection."""
        if self._reader is not None:
            self._reader.cancel()
        await self._redis.aclose()

    async def _read(self) -> None:
        while (asked := self._next) is not None:
            self._next = None
            try:
                answer = await self._redis.get(keys.VERSION)
                asked.set_result(int(cast("str | None", answer) or 0))
            except (redis.RedisError, OSError, ValueError) as error:
                asked.set_exception(StoreUnavailable(f"Redis does not answer: {error}"))
                asked.exception()  # who asked may have gone meanwhile

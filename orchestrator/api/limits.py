"""What one client may take of a server: the size and depth of what it sends, and how much it has going on at a time."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from orchestrator.api import protobuf
from orchestrator.errors import BadRequest, TooLarge, TooManyRequests, UnsupportedMediaType
from orchestrator.resources.manifest import check_size
from orchestrator.resources.names import shown

_JSON = frozenset({"", "application/json"})


class Shares:
    """Counts what each client has going on; refuses what is beyond its share.

    Args:
        most: For one client at a time.
        what: In words: `watches`.
    """

    def __init__(self, most: int, what: str) -> None:
        self._most = most
        self._what = what
        self._held: Counter[str] = Counter()

    def take(self, client: str) -> Callable[[], None]:
        """Take one; gives the function that gives it back.

        Raises:
            TooManyRequests: The client has as many as it may.
        """
        if self._held[client] >= self._most:
            raise TooManyRequests(f"{client!r} has {self._most} {self._what} open at this server: end some first")
        self._held[client] += 1
        is_held = True

        def give_back() -> None:
            nonlocal is_held
            if is_held:
                is_held = False
                self._held[client] -= 1
                if not self._held[client]:
                    del self._held[client]

        return give_back

    @contextmanager
    def one(self, client: str) -> Iterator[None]:
        """Hold one for as long as the block takes."""
        give_back = self.take(client)
        try:
            yield
        finally:
            give_back()


async def read_body(request: Request, most: int) -> bytes:
    """Read a body.

    Raises:
        TooLarge: It has more than `most` bytes.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > most:  # noqa: PLR2004 - digits
        raise TooLarge(f"the request has {declared} bytes, at most {most} are taken")
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise TooLarge(f"the request has more than the {most} bytes that are taken")
            parts.append(part)
    except ClientDisconnect as error:
        raise BadRequest("the client went before it had sent its request") from error
    return b"".join(parts)


def media_type(request: Request) -> str:
    """Give the body's media type without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_document(request: Request, most: int) -> Any:
    """Read a body of JSON, or of what Kubernetes' own clients send in its place; empty gives None.

    Raises:
        UnsupportedMediaType: It is declared as something else.
        TooLarge, BadRequest, Invalid: As `read_body` and `parse_json`.
    """
    kind = media_type(request)
    if kind not in _JSON and kind != protobuf.MEDIA_TYPE:
        raise UnsupportedMediaType(f"the body of the request is {shown(kind)}; application/json is taken")
    body = await read_body(request, most)
    if kind == protobuf.MEDIA_TYPE:
        document = protobuf.read(body)
        check_size(document)
        return document
    return parse_json(body)


def parse_json(body: bytes) -> Any:
    """Parse a body; empty gives None.

    Raises:
        BadRequest: It is not JSON, or has in it what no document can: NaN, infinity, half of a surrogate pair.
        Invalid: It is nested too deep, or has too many values.
    """
    if not body.strip():
        return None
    try:
        text = body.decode()
        data = json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
        if "\\u" in text:
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {str(error)[:200]}") from error
    check_size(data)
    return data


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that is given twice, of which one would silently be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{shown(twice)} is given twice")
    return found

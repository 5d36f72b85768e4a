"""Get and list, from the copy in memory."""

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from orchestrator.api.entries import ApiResource, Entry
from orchestrator.api.forms import Form
from orchestrator.api.mirror import Mirror
from orchestrator.api.targets import Choice, Parameters, Target
from orchestrator.cli.tables import Around, count_vms
from orchestrator.errors import BadRequest, NotFound, VersionExpired
from orchestrator.resources import Key, VirtualMachine, make_key

_MOST_AT_ONCE: Final = 10**6


def not_found(target: Target) -> NotFound:
    """Make the error that one resource is not there, in Kubernetes' words."""
    return NotFound(f'{target.api.full_name} "{target.name}" not found')


def around(mirror: Mirror, api: ApiResource) -> Around:
    """Give what the cells of a kind's table need besides the resource."""
    counted = api.table.counts_vms
    vms = mirror.documents.get(VirtualMachine.kind_name, {}).values() if counted else ()
    return Around(datetime.now(UTC), count_vms(vms))


async def get(mirror: Mirror, target: Target, parameters: Parameters) -> Entry:
    """Give one resource.

    Raises:
        NotFound: It is not there.
        VersionExpired: A version is asked for that this Redis never had.
    """
    await at_least(mirror, parameters.version())
    entry = mirror.entries[target.api.plural].get(make_key(target.name, target.namespace))
    if entry is None:
        raise not_found(target)
    return entry


async def at_least(mirror: Mirror, version: int | None) -> None:
    """Wait until the copy is as new as asked for; no version means the newest there is, 0 any.

    Raises:
        VersionExpired: This Redis never had that version.
    """
    if version == 0 or (version is not None and version <= mirror.version):
        return
    newest = await mirror.newest()
    if version is not None and version > newest:
        raise VersionExpired(f"version {version} is not this Redis's, whose last is {newest}: list again")


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list, or all of it.

    Attributes:
        version: That all parts are of.
        rest: How many come after it.
        last: Key of its last one.
    """

    entries: list[Entry]
    version: int
    rest: int
    last: Key

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The list's metadata."""
        found: dict[str, Any] = {"resourceVersion": str(self.version)}
        if self.rest:
            found |= {"continue": _token(self.version, self.last), "remainingItemCount": self.rest}
        return found


async def page(mirror: Mirror, target: Target, parameters: Parameters) -> Page:
    """Give what is listed.

    Raises:
        BadRequest: Parameters are wrong, or contradict each other.
        VersionExpired: Of a version that is too old, or that this Redis never had.
    """
    choice = parameters.choice(target)
    limit = parameters.number("limit", _MOST_AT_ONCE) or 0
    version, match = parameters.version(), parameters.text("resourceVersionMatch")
    after = Key("")
    if match not in {"", "Exact", "NotOlderThan"}:
        raise BadRequest("resourceVersionMatch: must be Exact or NotOlderThan")
    if match and version is None:
        raise BadRequest("resourceVersionMatch: is for use with resourceVersion")
    if match == "Exact" and version == 0:
        raise BadRequest('resourceVersionMatch: Exact is not for resourceVersion "0"')
    if token := parameters.text("continue"):
        if version or match:
            raise BadRequest("continue: is not for use with resourceVersion")
        version, after = _read_token(token)
        match = "Exact"
    await at_least(mirror, version)
    if match == "Exact" and version is not None:
        held: Mapping[Key, Entry] = mirror.at(target.api, version)
    else:
        held, version = mirror.entries[target.api.plural], mirror.version
    return _cut(held, choice, version=version, after=after, limit=limit)


def _cut(held: Mapping[Key, Entry], choice: Choice, *, version: int, after: Key, limit: int) -> Page:
    found = [(k, e) for k, e in held.items() if k > after] if after else list(held.items())
    if not choice.is_all:
        found = [(key, entry) for key, entry in found if choice.takes(entry)]
    found.sort(key=lambda pair: pair[0])
    chosen = found[:limit] if limit else found
    last = chosen[-1][0] if chosen else after
    return Page([entry for _, entry in chosen], version, len(found) - len(chosen), last)


def writer(form: Form, found: Page, about: Around) -> Callable[[], bytes]:
    """Give the function that writes a page; it may run in any thread, and takes its time where the page is long."""
    return lambda: form.many(found.entries, found.metadata, about)


def _token(version: int, after: Key) -> str:
    return base64.urlsafe_b64encode(json.dumps([version, after]).encode()).decode()


def _read_token(token: str) -> tuple[int, Key]:
    try:
        found = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (binascii.Error, ValueError, RecursionError) as error:
        raise BadRequest("continue: is not a token that was given out here") from error
    match found:
        case [int(version), str(after)] if not isinstance(version, bool) and version > 0:
            return version, Key(after)
    raise BadRequest("continue: is not a token that was given out here")

"""What simulated hosts' drivers and their world's process say to each other: a line of JSON each way.

A connection begins with one request:

- `{"host": "h1", "call": "start", "arguments": [...]}`: a call of the port. Answered once, when it has ended, by
  `{"value": ...}` or `{"error": "DomainExists", "message": "..."}`.
- `{"host": "h1", "watch": true}`: answered by `{"value": null}` or an error, and then by `{"event": {...}}` for each
  event until either side closes the connection.
- `{"fault": "power_off", "arguments": {"host": "h1"}}`: a method of `simulated_faults.Faults`; answered once.
- `{"look": true}`: answered by what is true on all hosts.
"""

import json
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from orchestrator.errors import (
    DomainNotFound,
    HypervisorError,
    HypervisorUnavailable,
    OutcomeUnknown,
    VmherdError,
)
from workers.hypervisor.port import (
    Definition,
    Domain,
    DomainEvent,
    DomainExists,
    Host,
    HostUse,
    Job,
    Marker,
    MigrationRequest,
    MigrationResult,
    StorageLocked,
)

_uuid: Final = TypeAdapter(tuple[str])
_nothing: Final[TypeAdapter[Any]] = TypeAdapter(None)
_text_list: Final = TypeAdapter(list[str])
_truth: Final = TypeAdapter(bool)
CALLS: Final[dict[str, tuple[TypeAdapter[Any], TypeAdapter[Any]]]] = {
    "host": (TypeAdapter(tuple[()]), TypeAdapter(Host)),
    "use": (TypeAdapter(tuple[()]), TypeAdapter(HostUse)),
    "boot_id": (TypeAdapter(tuple[()]), TypeAdapter(str)),
    "domains": (TypeAdapter(tuple[()]), TypeAdapter(list[Domain])),
    "domain": (_uuid, TypeAdapter(Domain | None)),
    "start": (TypeAdapter(tuple[str, Marker]), TypeAdapter(Domain)),
    "destroy": (_uuid, _nothing),
    "shutdown": (_uuid, _nothing),
    "resume": (_uuid, _nothing),
    "migrate": (TypeAdapter(tuple[MigrationRequest]), TypeAdapter(MigrationResult)),
    "job": (_uuid, TypeAdapter(Job | None)),
    "abort": (_uuid, _truth),
    "start_post_copy": (_uuid, _truth),
    "dirty_rate": (TypeAdapter(tuple[str, float]), TypeAdapter(float | None)),
    "completed_job": (_uuid, TypeAdapter(dict[str, int])),
    "addresses": (_uuid, _text_list),
    "preflight": (TypeAdapter(tuple[str, tuple[str, ...]]), _text_list),
    "definition": (TypeAdapter(tuple[str, bool]), TypeAdapter(Definition | None)),
    "mark": (TypeAdapter(tuple[str, Marker]), _nothing),
    "unmark": (_uuid, _nothing),
    "define": (TypeAdapter(tuple[str, bool]), _nothing),
    "undefine": (_uuid, _nothing),
}
"""Arguments and value of each call of the port."""
_EVENT: Final = TypeAdapter(DomainEvent)
_ERRORS: Final[dict[str, type[VmherdError]]] = {
    error.__name__: error
    for error in (DomainExists, StorageLocked, DomainNotFound, HypervisorUnavailable, HypervisorError, OutcomeUnknown)
}
MOST_BYTES: Final = 2**24
"""Of one line: a domain's XML is at most some hundred kilobytes."""


def pack(message: dict[str, Any]) -> bytes:
    """Write one line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def pack_call(host: str, method: str, arguments: tuple[Any, ...]) -> bytes:
    """Write a call."""
    return pack({"host": host, "call": method, "arguments": CALLS[method][0].dump_python(arguments, mode="json")})


def unpack(line: bytes) -> dict[str, Any]:
    """Read one line.

    Raises:
        HypervisorError: It is something else.
    """
    try:
        message = json.loads(line)
    except ValueError as error:
        raise HypervisorError(f"no JSON: {error}") from error
    if not isinstance(message, dict):
        raise HypervisorError(f"not an object: {line[:100]!r}")
    return message


def read_arguments(method: str, arguments: Any) -> tuple[Any, ...]:
    """Read a call's arguments.

    Raises:
        HypervisorError: There is no such call, or it takes others.
    """
    if method not in CALLS:
        raise HypervisorError(f"a simulated host can't be asked to {method!r}")
    try:
        return tuple(CALLS[method][0].validate_json(json.dumps(arguments)))
    except ValidationError as error:
        raise HypervisorError(f"{method}: {error}") from error


def value_message(method: str, value: Any) -> dict[str, Any]:
    """Write a call's answer."""
    return {"value": CALLS[method][1].dump_python(value, mode="json")}


def error_message(error: VmherdError) -> dict[str, Any]:
    """Write an error as an answer."""
    name = type(error).__name__
    return {"error": name if name in _ERRORS else "HypervisorError", "message": str(error)}


def read_value(method: str, answer: dict[str, Any]) -> Any:
    """Read a call's answer, or raise the error that it is."""
    check_answer(answer)
    return CALLS[method][1].validate_json(json.dumps(answer.get("value")))


def check_answer(answer: dict[str, Any]) -> None:
    """Raise the error that an answer is, if it is one."""
    if "error" in answer:
        raise _ERRORS.get(answer["error"], HypervisorError)(answer.get("message", ""))


def event_message(event: DomainEvent) -> dict[str, Any]:
    """Write an event."""
    return {"event": _EVENT.dump_python(event, mode="json")}


def read_event(message: dict[str, Any]) -> DomainEvent:
    """Read an event."""
    return _EVENT.validate_json(json.dumps(message["event"]))

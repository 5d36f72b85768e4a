"""Errors as the `Status` objects that Kubernetes' clients read.

`VmherdError.reason` is the Status's reason; the HTTP code follows from it. An error that nothing here knows is ours,
and says no more than that.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from orchestrator.errors import Invalid, VmherdError

CODES: Final[Mapping[str, int]] = {
    "BadRequest": 400,
    "Unauthorized": 401,
    "Forbidden": 403,
    "NotFound": 404,
    "MethodNotAllowed": 405,
    "NotAcceptable": 406,
    "AlreadyExists": 409,
    "Conflict": 409,
    "Expired": 410,
    "RequestEntityTooLarge": 413,
    "UnsupportedMediaType": 415,
    "Invalid": 422,
    "TooManyRequests": 429,
    "InternalError": 500,
    "ServiceUnavailable": 503,
    "Timeout": 504,
    "OutcomeUnknown": 504,
}
"""HTTP codes by the Status's reason."""

_CAUSES_AT_MOST = 50
_SEPARATORS = (",", ":")
_encode = json.JSONEncoder(ensure_ascii=False, separators=_SEPARATORS).encode
_encode_ascii = json.JSONEncoder(separators=_SEPARATORS).encode
_CAUSES: Final[Mapping[str, str]] = {"unknown field": "FieldValueNotSupported", "is required": "FieldValueRequired"}
"""A cause's machine-readable reason by its words; `FieldValueInvalid` for all others."""


def status_of(error: Exception, *, kind: str = "", group: str = "", name: str = "") -> dict[str, Any]:
    """Make the Status of an error.

    Args:
        error: What was raised.
        kind: Plural of what was asked for; for `Invalid` its kind is shown instead by the caller.
        group: Of the kind.
        name: Of the one resource, if it was about one.
    """
    known = isinstance(error, VmherdError)
    reason = error.reason if isinstance(error, VmherdError) and error.reason in CODES else "InternalError"
    message = str(error) if known else "the server met an error that it does not know; its log has it"
    details: dict[str, Any] = {k: v for k, v in (("name", name), ("group", group), ("kind", kind)) if v}
    if isinstance(error, Invalid) and error.causes:
        details["causes"] = [
            {"reason": _CAUSES.get(why, "FieldValueInvalid"), "message": why, "field": path}
            for path, why in error.causes[:_CAUSES_AT_MOST]
        ]
    status: dict[str, Any] = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": CODES[reason],
    }
    if details:
        status["details"] = details
    return status


def success(*, kind: str, group: str, name: str, uid: str) -> dict[str, Any]:
    """Make the Status that says that something is gone."""
    details = {"name": name, "group": group, "kind": kind, "uid": uid}
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Success",
        "details": {key: value for key, value in details.items() if value},
    }


def to_json(value: Any) -> bytes:
    """Encode an answer. Half of a surrogate pair, which UTF-8 can't say, is escaped."""
    try:
        return _encode(value).encode()
    except UnicodeEncodeError:
        return _encode_ascii(value).encode()

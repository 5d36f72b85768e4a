"""Kubernetes' protobuf envelope, as far as kubectl sends it: for kinds that it knows by itself it has no JSON.

`kubectl create namespace`, `kubectl auth` and the evictions of `kubectl drain` come so. Only the fields that count here
are read; all else is passed over, as protobuf means it to be.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from orchestrator.errors import BadRequest

MEDIA_TYPE: Final = "application/vnd.kubernetes.protobuf"
_MAGIC: Final = b"k8s\x00"
_LONGEST_VARINT: Final = 10
_MOST_FIELDS: Final = 10_000

Reader = Callable[[bytes], Any]
Fields = Mapping[int, tuple[str, Reader, bool]]
"""By number: the name in JSON, how the value is read, and whether it is repeated."""


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise BadRequest("the protobuf body has a text in it that is not UTF-8") from error


def _message(fields: Fields) -> Reader:
    def read(raw: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for number, value in _fields(raw):
            if number not in fields or not isinstance(value, bytes):
                continue
            name, reader, is_repeated = fields[number]
            item = reader(value)
            if is_repeated:
                found.setdefault(name, []).append(item)
            elif isinstance(item, dict) and name in _MAPS:
                found.setdefault(name, {}).update({item.get("key", ""): item.get("value", "")})
            elif item != "":
                found[name] = item
        return found

    return read


_MAPS: Final = frozenset({"labels", "annotations"})
_PAIR = _message({1: ("key", _text, False), 2: ("value", _text, False)})
_META = _message(
    {
        1: ("name", _text, False),
        2: ("generateName", _text, False),
        3: ("namespace", _text, False),
        5: ("uid", _text, False),
        6: ("resourceVersion", _text, False),
        11: ("labels", _PAIR, False),
        12: ("annotations", _PAIR, False),
        14: ("finalizers", _text, True),
    }
)
_PRECONDITIONS = _message({1: ("uid", _text, False), 2: ("resourceVersion", _text, False)})
_DELETE_OPTIONS = _message({2: ("preconditions", _PRECONDITIONS, False), 5: ("dryRun", _text, True)})
_RESOURCE: Final = ("namespace", "verb", "group", "version", "resource", "subresource", "name")
_ASKED = _message(
    {
        1: ("resourceAttributes", _message({n: (name, _text, False) for n, name in enumerate(_RESOURCE, 1)}), False),
        2: ("nonResourceAttributes", _message({1: ("path", _text, False), 2: ("verb", _text, False)}), False),
    }
)
_KINDS: Final[Mapping[str, Reader]] = {
    "Namespace": _message({1: ("metadata", _META, False)}),
    "Eviction": _message({1: ("metadata", _META, False), 2: ("deleteOptions", _DELETE_OPTIONS, False)}),
    "DeleteOptions": _DELETE_OPTIONS,
    "SelfSubjectAccessReview": _message({2: ("spec", _ASKED, False)}),
    "SelfSubjectRulesReview": _message({2: ("spec", _message({1: ("namespace", _text, False)}), False)}),
    "SelfSubjectReview": _message({}),
}
_TYPE_META = _message({1: ("apiVersion", _text, False), 2: ("kind", _text, False)})
_ENVELOPE = _message({1: ("type", _TYPE_META, False), 2: ("raw", bytes, False)})


def read(body: bytes) -> dict[str, Any]:
    """Read a body as the JSON document that it stands for.

    Raises:
        BadRequest: It is not such an envelope, or of a kind that is not taken in this form.
    """
    if not body.startswith(_MAGIC):
        raise BadRequest("the body is not Kubernetes' protobuf")
    envelope = _ENVELOPE(body[len(_MAGIC) :])
    kind = envelope.get("type", {})
    reader = _KINDS.get(kind.get("kind", ""))
    if reader is None:
        raise BadRequest(f"kind {kind.get('kind', '')[:80]!r} is taken as JSON only")
    document: dict[str, Any] = reader(envelope.get("raw", b""))
    return {**kind, **document}


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Give a message's fields: numbers, and bytes for what is delimited by its length."""
    position = count = 0
    while position < len(raw):
        count += 1
        if count > _MOST_FIELDS:
            raise BadRequest("the protobuf body has too many fields")
        tag, position = _varint(raw, position)
        number, wire = tag >> 3, tag & 7
        match wire:
            case 0:
                value, position = _varint(raw, position)
                yield number, value
            case 1 | 5:
                position += 8 if wire == 1 else 4
            case 2:
                length, position = _varint(raw, position)
                end = position + length
                if end > len(raw):
                    raise BadRequest("the protobuf body is cut off")
                yield number, raw[position:end]
                position = end
            case _:
                raise BadRequest("the body is not protobuf")


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(_LONGEST_VARINT):
        if position >= len(raw):
            raise BadRequest("the protobuf body is cut off")
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:  # noqa: PLR2004 - the sign of the last byte
            return value, position
    raise BadRequest("the body is not protobuf")

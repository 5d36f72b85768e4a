"""What all resources share: the Kubernetes shape of metadata and conditions, names, quantities.

Resources are immutable values. A change makes a new one (`with_status`), and the store commits it against the version
that it was made from.
"""

import re
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import Annotated, Any, ClassVar, Final, Literal, NewType, Self, TypeVar
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError, ValidationInfo
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from orchestrator.errors import Invalid
from orchestrator.resources.names import SHOWN_AT_MOST, Annotations, Labels, check_name, shown

Key = NewType("Key", str)
"""`namespace/name`, or `name` alone for what has no namespace."""

_GENERATED_FROM = 58
"""As much of generateName is kept as leaves room for five characters, as Kubernetes does."""
GROUP_VERSION: Final = "virtualization.deckhouse.io/v1alpha2"
DEFAULT_NAMESPACE = "default"

STORED: Final = {"stored": True}
"""Validation context of what the store gives: it was checked at admission, and costly checks are not done again."""
_CAUSES_AT_MOST = 20
_MISPLACED: Final = "misplaced"


def _rfc3339(value: datetime) -> str:
    return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


Timestamp = Annotated[datetime, PlainSerializer(_rfc3339, return_type=str)]

_QUANTITY = re.compile(r"([0-9]{1,18})(Ki|Mi|Gi|Ti|k|M|G|T)?")
_FACTORS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@lru_cache(maxsize=4096)
def quantity_bytes(value: str) -> int:
    """Read a Kubernetes quantity of bytes (`192Mi`, `2Gi`, `1000000`)."""
    match = _QUANTITY.fullmatch(value)
    if match is None:
        raise ValueError(f"{shown(value)} is not a quantity such as 512Mi or 2Gi")
    return int(match[1]) * _FACTORS[match[2] or ""]


class Model(BaseModel):
    """Base of all parts of resources: camelCase outside, frozen, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True)

    def with_(self, **changes: Any) -> Self:
        """Give a copy with some fields changed; values are trusted, since only our own code passes them."""
        return self.model_copy(update=changes)

    def document(self) -> dict[str, Any]:
        """Give it as JSON-able data without empty fields.

        What people name themselves stays though it is empty: a label without a value is a label.
        """
        data: dict[str, Any] = _without_empty_fields(self, self.model_dump(mode="json", by_alias=True))
        return data


class ObjectMeta(Model):
    """Kubernetes' ObjectMeta, as far as it is used here.

    Attributes:
        name: Unique among resources of the kind in the namespace.
        generate_name: Begins a name that the server ends.
        namespace: The project that it is in.
        uid: Of this one alone, though another may get its name later. Of a VM: its domain's UUID.
        labels: By which it is selected.
        annotations: What people and programs note about it.
        creation_timestamp: When it was created.
        deletion_timestamp: When its deletion was asked for, while it is still there.
        finalizers: It stays after its deletion until these are gone.
        generation: Counts changes of the spec.
        resource_version: At which it was read; given with a change, the change is refused if another one is stored.
    """

    name: str = ""
    generate_name: str = ""
    namespace: str = ""
    uid: str = ""
    labels: Labels = Field(default_factory=dict)
    annotations: Annotations = Field(default_factory=dict)
    creation_timestamp: Timestamp | None = None
    deletion_timestamp: Timestamp | None = None
    finalizers: tuple[str, ...] = ()
    generation: int = 1
    resource_version: str = ""


class Condition(Model):
    """One condition of a resource's status.

    Attributes:
        type: What it is about.
        status: Whether it holds.
        reason: Why, in one word, for programs.
        message: Why, for people.
        last_transition_time: When its status changed last.
    """

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str = ""
    message: str = ""
    last_transition_time: Timestamp | None = None


class Resource(Model):
    """Base of what the store keeps and the API speaks.

    Attributes:
        created_version: The store's version at which it was created: orders resources by arrival. Not part of the
            document.
    """

    kind_name: ClassVar[str]
    group_version: ClassVar[str]
    plural: ClassVar[str]
    short: ClassVar[str]
    namespaced: ClassVar[bool] = True

    api_version: str
    kind: str
    metadata: ObjectMeta
    created_version: int = Field(0, exclude=True)

    @property
    def key(self) -> Key:
        """Its key in the store."""
        return make_key(self.metadata.name, self.metadata.namespace if self.namespaced else "")

    @property
    def name(self) -> str:
        """Its name."""
        return self.metadata.name

    @property
    def version(self) -> int:
        """The store's version that it was read at; 0 for what is not stored yet."""
        return int(self.metadata.resource_version or 0)

    def manifest(self) -> dict[str, Any]:
        """Give it as people are shown it."""
        return self.document()


@cache
def _fields(model: type[BaseModel]) -> tuple[tuple[str, str], ...]:
    """Give a model's fields, each with the name that it is written by."""
    return tuple((name, field.serialization_alias or field.alias or name) for name, field in model.model_fields.items())


def _without_empty_fields(value: Any, dumped: Any) -> Any:
    """Drop from a dump what is empty and a model's field; maps keep what is in them."""
    if isinstance(value, BaseModel) and isinstance(dumped, dict):
        result: dict[str, Any] = {}
        for name, alias in _fields(type(value)):
            kept = dumped.get(alias)
            if isinstance(kept, dict | list):
                kept = _without_empty_fields(getattr(value, name), kept)
            if kept is not None and kept not in ("", {}, []):
                result[alias] = kept
        return result
    if isinstance(value, dict) and isinstance(dumped, dict):
        return {str(key): _without_empty_fields(item, dumped[str(key)]) for key, item in value.items()}
    if isinstance(value, tuple | list) and isinstance(dumped, list):
        return [_without_empty_fields(item, shown) for item, shown in zip(value, dumped, strict=True)]
    return dumped


def prune(value: dict[str, Any]) -> dict[str, Any]:
    """Drop what is None, or an empty string, list or mapping, at every depth (False and 0 stay)."""
    result: dict[str, Any] = {}
    for key, item in value.items():
        kept = prune(item) if isinstance(item, dict) else item
        if isinstance(kept, list):
            kept = [prune(part) if isinstance(part, dict) else part for part in kept]
        if kept is None or kept in ("", {}, []):
            continue
        result[key] = kept
    return result


def make_key(name: str, namespace: str = "") -> Key:
    """Make a store key."""
    return Key(f"{namespace}/{name}" if namespace else name)


def split_key(key: Key) -> tuple[str, str]:
    """Give (namespace, name); the namespace is empty for what has none."""
    namespace, _, name = key.rpartition("/")
    return namespace, name


def with_condition(conditions: tuple[Condition, ...], new: Condition, now: datetime) -> tuple[Condition, ...]:
    """Set one condition; its transition time moves only when its status does. Order is by first appearance."""
    old = next((c for c in conditions if c.type == new.type), None)
    keep_time = old is not None and old.status == new.status and old.last_transition_time is not None
    stamped = new.with_(last_transition_time=old.last_transition_time if old is not None and keep_time else now)
    if old is None:
        return (*conditions, stamped)
    return tuple(stamped if c.type == new.type else c for c in conditions)


def find_condition(conditions: tuple[Condition, ...], kind: str) -> Condition | None:
    """Find a condition by its type."""
    return next((c for c in conditions if c.type == kind), None)


def new_metadata(meta: ObjectMeta, *, namespaced: bool, now: datetime, suffix: str = "") -> ObjectMeta:
    """Fill in what the server fills in at creation: name from generateName, namespace, uid, time.

    Raises:
        Invalid: The name is missing or not a DNS label.
    """
    generated = meta.generate_name[:_GENERATED_FROM] + (suffix or uuid4().hex[:5]) if meta.generate_name else ""
    name = meta.name or generated
    if not name:
        raise Invalid(
            "metadata.name: a name or a generateName is needed",
            (("metadata.name", "a name or a generateName is needed"),),
        )
    namespace = (meta.namespace or DEFAULT_NAMESPACE) if namespaced else ""
    for path, value in (("metadata.name", name), ("metadata.namespace", namespace)):
        if value:
            try:
                check_name(value)
            except ValueError as error:
                raise Invalid(f"{path}: {error}", ((path, str(error)),)) from error
    return meta.with_(
        name=name,
        namespace=namespace,
        uid=meta.uid or str(uuid4()),
        creation_timestamp=now,
        resource_version="",
        generation=1,
    )


def is_stored(info: ValidationInfo) -> bool:
    """Whether a validator runs on what was checked before."""
    return info.context is STORED


def misplaced(*causes: tuple[str, str]) -> PydanticCustomError:
    """Make the error of a validator that looks at several fields and knows which of them are wrong.

    Args:
        causes: Pairs of a path below the validator's model (`disks[1].name`) and what is wrong there; at least one.
    """
    summary = "; ".join(f"{path}: {why}" for path, why in causes)
    return PydanticCustomError(_MISPLACED, "{summary}", {"summary": summary, "causes": causes})


def unquoted(why: str) -> PydanticCustomError:
    """Make the error of a validator whose input must not be repeated: it may hold a secret."""
    return PydanticCustomError("unquoted", "{why}", {"why": why})


_Parsed = TypeVar("_Parsed", bound=BaseModel)


def parse(model: type[_Parsed], data: Any) -> _Parsed:
    """Validate outside data against a model.

    Raises:
        Invalid: Names each field by its path and says what is wrong with it (of very many, the first ones).
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        causes = tuple(cause for e in error.errors(include_url=False) for cause in _causes(e))
        said = [f"{path}: {why}" for path, why in causes[:_CAUSES_AT_MOST]]
        if len(causes) > _CAUSES_AT_MOST:
            said.append(f"and {len(causes) - _CAUSES_AT_MOST} more")
        raise Invalid("; ".join(said), causes) from error


def _causes(error: Any) -> list[tuple[str, str]]:
    path = _path(error["loc"])
    if error["type"] != _MISPLACED:
        return [(path, _say(error))]
    return [(f"{path}.{below}".removeprefix("document."), why) for below, why in error["ctx"]["causes"]]


def _path(location: tuple[int | str, ...]) -> str:
    parts = (f"[{p}]" if isinstance(p, int) else f".{_key(p)}" for p in location)
    return "".join(parts).lstrip(".") or "document"


def _key(name: str) -> str:
    """Write the name of a field, which may be anything: what can't be printed is escaped, and it is cut where long."""
    printed = name if name.isprintable() else name.encode("unicode_escape").decode()
    return printed if len(printed) <= SHOWN_AT_MOST else f"{printed[:SHOWN_AT_MOST]}…"


def _say(error: Any) -> str:
    match error["type"]:
        case "extra_forbidden":
            return "unknown field"
        case "missing":
            return "is required"
        case "unquoted":
            return str(error["msg"])
        case _:
            message: str = error["msg"].removeprefix("Value error, ")
            given = error.get("input")
            told = shown(given)
            tail = "" if isinstance(given, dict | list) or told in message else f" (given: {told})"
            return message[:1].lower() + message[1:] + tail

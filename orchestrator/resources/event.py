"""`Event`: what happened, in the shape of Kubernetes' core/v1 events."""

from datetime import datetime
from typing import ClassVar, Literal
from uuid import uuid4

from orchestrator.resources.meta import DEFAULT_NAMESPACE, Model, ObjectMeta, Resource, Timestamp


class ObjectReference(Model):
    """What an event is about."""

    kind: str
    name: str
    namespace: str = ""
    uid: str = ""


class EventSource(Model):
    """Who says so."""

    component: str = "vmherd"


class Event(Resource):
    """One thing that happened to one resource. Kept for an hour.

    Attributes:
        reason: What happened, in one word.
        message: What happened, for people.
        type: Warning: a person should look.
        first_timestamp: When it happened first.
        last_timestamp: When it happened last.
    """

    kind_name: ClassVar[str] = "Event"
    group_version: ClassVar[str] = "v1"
    plural: ClassVar[str] = "events"
    short: ClassVar[str] = "ev"

    api_version: Literal["v1"] = "v1"
    kind: Literal["Event"] = "Event"
    involved_object: ObjectReference
    reason: str
    message: str = ""
    type: Literal["Normal", "Warning"] = "Normal"
    count: int = 1
    first_timestamp: Timestamp
    last_timestamp: Timestamp
    source: EventSource = EventSource()


def event_about(subject: Resource, reason: str, message: str, now: datetime, *, warning: bool = False) -> Event:
    """Make an event about a resource.

    Args:
        subject: What it happened to.
        reason: In the past tense, CamelCase (`MigrationStarted`).
        message: One line for a person.
        now: When.
        warning: Whether a person should look.
    """
    meta = subject.metadata
    return Event(
        metadata=ObjectMeta(
            name=f"{meta.name[:45]}-{uuid4().hex[:16]}",
            namespace=meta.namespace or DEFAULT_NAMESPACE,
            uid=str(uuid4()),
            creation_timestamp=now,
        ),
        involved_object=ObjectReference(kind=subject.kind_name, name=meta.name, namespace=meta.namespace, uid=meta.uid),
        reason=reason,
        message=message,
        type="Warning" if warning else "Normal",
        first_timestamp=now,
        last_timestamp=now,
    )

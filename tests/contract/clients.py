"""Both ways to a herd, for the suites that run over them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.client import Client
from orchestrator.client.local import LocalClient
from orchestrator.client.place import Place
from orchestrator.client.remote import RemoteClient
from orchestrator.resources import Node, Resource, Role
from orchestrator.services.context import Context
from orchestrator.services.tokens import create_token
from orchestrator.settings import Settings
from orchestrator.store import Store
from orchestrator.store.connection import connect
from tests.api import ServedApi
from tests.fakes import Outbox
from tests.waiting import wait_until


class Herd:
    """What the suite works with.

    Attributes:
        client: Under test.
        store: To say what happens in the herd, and to look at it.
    """

    def __init__(self, client: Client, store: Store, url: str) -> None:
        self.client = client
        self.store = store
        self.url = url

    def put(self, *resources: Resource) -> None:
        batch = self.store.batch()
        for resource in resources:
            batch.create(resource)
        self.store.must_commit(batch)

    def change(self, old: Resource, **changes: Any) -> None:
        stored = self.store.get(type(old), old.key)
        self.store.must_commit(self.store.batch().put(stored, stored.with_status(**changes)))  # type: ignore[attr-defined]


@contextmanager
def locally(url: str) -> Iterator[Client]:
    client = LocalClient(Context(Store(connect(url, timeout_s=3, retries=0), Settings()), Outbox()))
    yield client
    client.close()


@contextmanager
def remotely(url: str) -> Iterator[Client]:
    with ServedApi(url) as served:
        _, token = create_token(Context(served.store, served.outbox), "suite", Role.ADMIN)
        client = RemoteClient(Place(served.url, token))
        wait_until(lambda: can_read(client), 10, "the token is known")
        yield client
        client.close()


def can_read(client: Client) -> bool:
    try:
        client.all(Node)
    except Exception:  # noqa: BLE001 - not yet
        return False
    return True


WAYS = {"redis": locally, "api": remotely}


def is_stored(herd: Herd, resource: Resource) -> bool:
    """Whether the store has it so; times are kept in milliseconds."""
    stored = herd.store.get(type(resource), resource.key)
    return resource.manifest() == stored.manifest() and resource.created_version == stored.created_version

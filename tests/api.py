"""The API served for tests: in this process and without TLS, where HTTP is what is tested; see `tests.kubectl` else."""

import json
import threading
from types import TracebackType
from typing import Any, Self

import httpx

from orchestrator.api.app import create_app
from orchestrator.api.audit import Audit
from orchestrator.api.serving import Serving
from orchestrator.resources import Role
from orchestrator.services.context import Context
from orchestrator.services.tokens import create_token
from orchestrator.settings import Settings
from orchestrator.store import Store
from orchestrator.store.connection import connect
from tests.fakes import Outbox
from tests.redis_server import free_port
from tests.waiting import wait_until

GROUP = "/apis/virtualization.deckhouse.io/v1alpha2"
VMS = f"{GROUP}/namespaces/default/virtualmachines"
OPERATIONS = f"{GROUP}/namespaces/default/virtualmachineoperations"
MERGE = {"content-type": "application/merge-patch+json"}


class ServedApi:
    """One server on a Redis; a context manager.

    Args:
        url: Of Redis.
        settings: The `api_` settings that are not the defaults.

    Attributes:
        store: The test's own.
        outbox: What the server's services sent.
    """

    def __init__(self, url: str, **settings: Any) -> None:
        self.port = free_port()
        self.config = Settings(api_port=self.port, api_tls=False, **settings)
        self.store = Store(connect(url), self.config)
        self.outbox = Outbox()
        self._served = Store(connect(url, retries=0), self.config)
        self.url = f"http://127.0.0.1:{self.port}"
        self.app = create_app(Context(self._served, self.outbox), Audit(self._served), self.config)
        self._server = Serving(self.app, self.config, None)
        self._thread = threading.Thread(target=self._server.run, name="api", daemon=True)
        self._clients: list[httpx.Client] = []

    def __enter__(self) -> Self:
        self._thread.start()
        wait_until(lambda: self._server.started or not self._thread.is_alive(), 10, "the API listens")
        assert self._server.started
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()
        self.store.close()
        self._served.close()

    def stop(self) -> None:
        """End the server; watches end with it."""
        for client in self._clients:
            client.close()
        self._server.should_exit = True
        self._thread.join(15)
        assert not self._thread.is_alive()

    def client(self, name: str = "root", role: Role = Role.ADMIN, namespaces: list[str] | None = None) -> httpx.Client:
        """A client with a new token, which the server has in its copy already."""
        token, text = create_token(Context(self.store, self.outbox), name, role, namespaces)
        wait_until(lambda: self.mirror.version >= token.version, 20, "the server knows the token")
        return self.client_with(text)

    def client_with(self, text: str) -> httpx.Client:
        """A client with a token's text; empty: none."""
        headers = {"authorization": f"Bearer {text}"} if text else {}
        client = httpx.Client(base_url=self.url, headers=headers, timeout=30)
        self._clients.append(client)
        return client

    @property
    def mirror(self) -> Any:
        """The server's copy."""
        return self.app.state.mirror


class Watching:
    """A watch that is read in a thread.

    Attributes:
        events: What came, in order.
    """

    def __init__(
        self, client: httpx.Client, path: str, headers: dict[str, str] | None = None, **parameters: Any
    ) -> None:
        self.events: list[dict[str, Any]] = []
        self.is_over = threading.Event()
        self._begun = threading.Event()
        self._client = client
        self._request = client.build_request("GET", path, params={"watch": "true", **parameters}, headers=headers)
        self.status = 0
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert self._begun.wait(10)

    def _read(self) -> None:
        try:
            response = self._client.send(self._request, stream=True)
            self.status = response.status_code
            self._begun.set()
            for line in response.iter_lines():
                self.events.append(json.loads(line))
        except (httpx.HTTPError, RuntimeError):
            pass  # cut off
        finally:
            self._begun.set()
            self.is_over.set()

    def seen(self) -> list[tuple[str, str]]:
        """Pairs of type and name."""
        return [(e["type"], e["object"].get("metadata", {}).get("name", "")) for e in list(self.events)]

    def wait(self, *wanted: tuple[str, str]) -> None:
        """Wait until exactly these have come."""
        expected = list(wanted)
        wait_until(lambda: len(self.events) >= len(expected), 10, lambda: f"{expected}; came: {self.events}")
        assert self.seen() == expected

    def ended(self) -> dict[str, Any]:
        """Wait for its end; gives the last event."""
        assert self.is_over.wait(15), self.events
        return self.events[-1] if self.events else {}

"""The heartbeat's own link to Redis, beside the one by redis-py: one contract; and what only the link promises."""

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import redis

from orchestrator.errors import Invalid, StoreUnavailable
from orchestrator.lease import Membership, Suspicion, read_lease
from orchestrator.store import Store, access, keys
from orchestrator.store.connection import connect
from orchestrator.store.node_store import NodeStore
from tests.builders import a_lease
from tests.redis_server import RedisServer
from workers.renewal import LeaseStore, RedisLink

TIMEOUT_S = 2.0


def url(server: RedisServer, name: str = "n1") -> str:
    return f"redis://{access.user_name(name)}:secret@127.0.0.1:{server.port}/0"


@pytest.fixture(params=["link", "link of a witness", "redis-py"])
def lease_store(request: pytest.FixtureRequest, store: Store, redis_server: RedisServer) -> Iterator[LeaseStore]:
    access.enroll(store.redis, "n1", "secret", is_witness="witness" in request.param)
    if request.param == "redis-py":
        client = connect(url(redis_server), retries=0)
        yield NodeStore(client, "n1")
        client.close()
        return
    link = RedisLink(url(redis_server), "n1", TIMEOUT_S)
    yield link
    link.close()


def test_a_renewal_is_stored_and_answered(lease_store: LeaseStore, store: Store) -> None:
    members = Membership(7, {f"n{number}": f"192.0.2.{number}:7949" for number in range(1, 200)}, 1)
    store.redis.set(keys.MEMBERSHIP, members.text())
    store.redis.set(keys.PEER_KEY, "k\u00e9y")
    store.redis.hset(keys.SUSPICIONS, "n2", Suspicion("id", "g", 1).text())
    reply = lease_store.renew_lease(a_lease(1))
    assert (reply.refused, reply.membership, reply.peer_key) == ("", members, "k\u00e9y")
    assert reply.suspicions == {"n2": "id"}
    stored = read_lease(str(store.redis.get(keys.lease("n1"))))
    assert stored is not None
    assert stored.lease == a_lease(1)
    again = lease_store.renew_lease(a_lease(2, membership=7), "k\u00e9y")
    assert (again.membership, again.peer_key) == (None, None)


def test_the_script_is_sent_where_redis_has_forgotten_it(lease_store: LeaseStore, store: Store) -> None:
    lease_store.renew_lease(a_lease(1))
    store.redis.script_flush()
    assert lease_store.renew_lease(a_lease(2)).refused == ""


def test_what_was_taken_over_is_refused(lease_store: LeaseStore, store: Store) -> None:
    store.redis.set(keys.taken_over("n1"), "b g")
    assert lease_store.renew_lease(a_lease(1)).refused == "taken over"


def test_without_redis_it_says_so_and_goes_on_when_it_is_back(
    lease_store: LeaseStore, store: Store, redis_server: RedisServer
) -> None:
    lease_store.renew_lease(a_lease(1))
    redis_server.kill()
    with pytest.raises(StoreUnavailable):
        lease_store.renew_lease(a_lease(2))
    redis_server.start()
    access.enroll(store.redis, "n1", "secret")
    assert lease_store.renew_lease(a_lease(3)).refused == ""


def test_another_nodes_lease_is_not_its_own(lease_store: LeaseStore, store: Store, redis_server: RedisServer) -> None:
    other = RedisLink(url(redis_server), "n2", TIMEOUT_S)
    with pytest.raises(StoreUnavailable, match=r"No permissions|no permissions|can't access|NOPERM"):
        other.renew_lease(a_lease(1))
    assert not store.redis.exists(keys.lease("n2"))


def test_a_wrong_password(store: Store, redis_server: RedisServer) -> None:
    access.enroll(store.redis, "n1", "another")
    with pytest.raises(StoreUnavailable, match="refuses AUTH: WRONGPASS"):
        RedisLink(url(redis_server), "n1", TIMEOUT_S).renew_lease(a_lease(1))


def test_through_a_unix_socket_and_another_database(store: Store, redis_server: RedisServer) -> None:
    link = RedisLink(f"redis://127.0.0.1:{redis_server.port}/3", "n1", TIMEOUT_S)
    link.renew_lease(a_lease(1))
    with redis.Redis(port=redis_server.port, db=3, decode_responses=True) as third:
        assert third.exists(keys.lease("n1"))
        third.flushdb()
    assert not store.redis.exists(keys.lease("n1"))
    assert link.own_address() == "127.0.0.1"


class Server:
    """Something that listens where Redis should be. It takes connections and answers each with `says`, or nothing."""

    def __init__(self, says: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._says = says
        self._clients: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._clients.append(client)
            if self._says:
                client.sendall(self._says)

    def close(self) -> None:
        self._listener.close()
        for client in self._clients:
            client.close()


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (b"", "it does not answer in time|timed out"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it is no Redis"),
        (b"$-1\r\n", "does not take the renewal: None"),
        (b"$999999999\r\n", "a reply of 999999999 bytes"),
        (b"$5\r\nhello\r\n", "Expecting value"),
        (b"$2\r\n{}\r\n", "membership"),
        (b"$2\r\n[]\r\n", "no Redis at"),
        (b"-OOM command not allowed\r\n", "does not take the renewal: OOM"),
        (b"$10\r\nhal", "it does not answer in time|timed out"),
    ],
)
def test_whatever_answers_instead_of_redis_is_no_ok(says: bytes, message: str) -> None:
    server = Server(says)
    link = RedisLink(f"redis://127.0.0.1:{server.port}/0", "n1", 0.3)
    try:
        with pytest.raises(StoreUnavailable, match=message):
            link.renew_lease(a_lease(1))
    finally:
        link.close()
        server.close()


def test_an_answer_that_came_too_late_is_not_taken_for_the_next_ones(store: Store, redis_server: RedisServer) -> None:
    """What was not answered in time closes the connection."""
    link = RedisLink(f"redis://127.0.0.1:{redis_server.port}/0", "n1", 0.3)
    link.renew_lease(a_lease(1))
    redis_server.pause()
    with pytest.raises(StoreUnavailable):
        link.renew_lease(a_lease(2))
    redis_server.resume()
    store.redis.set(keys.taken_over("n1"), "b g")
    assert link.renew_lease(replace(a_lease(3), armed=True)).refused == "taken over"


@pytest.mark.parametrize(
    "text", ["http://h", "redis://h:port/0", "redis://h:1/x", "redis://h:99999/0", "127.0.0.1:6379"]
)
def test_a_url_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="VMHERD_REDIS_URL"):
        RedisLink(text, "n1", 1.0)

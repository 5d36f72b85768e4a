"""Whatever is sent, by our own OpenAPI or as bytes that mean nothing: the answer is never a 5xx."""

import contextlib
import json
import socket
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from orchestrator.api.catalog import RESOURCES
from orchestrator.api.openapi import OpenApi
from tests.api import GROUP, MERGE, OPERATIONS, VMS, ServedApi
from tests.builders import a_class, a_node, a_vm, an_operation
from tests.redis_server import RedisServer

EXAMPLES = 6
KNOWN = {"name": ("linux-vm", "n1", "op", "generic", "default"), "namespace": ("default",)}
DOCUMENTS = {path: json.loads(body) for path, body in OpenApi(RESOURCES).documents.items() if path != "/openapi/v3"}
CASES = [
    (document, path, method)
    for document, described in DOCUMENTS.items()
    for path, methods in described["paths"].items()
    for method in methods
    if method != "parameters"
]
BOUNDED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # what fails is shown as it is: shrinking would send hundreds more
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApi]:
    redis = RedisServer(tmp_path_factory.mktemp("redis"))
    redis.start()
    with ServedApi(redis.url, api_watches_per_client=10_000) as api:
        api.store.must_commit(
            api.store.batch()
            .create(a_node("n1"))
            .create(a_vm("linux-vm"))
            .create(an_operation("op"))
            .create(a_class("generic"))
        )
        yield api
    redis.kill()


@pytest.fixture(scope="module")
def root(api: ServedApi) -> httpx.Client:
    return api.client()


@pytest.fixture(scope="module")
def session(api: ServedApi, root: httpx.Client) -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.headers["authorization"] = root.headers["authorization"]
        yield session


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("document", "path", "method"), CASES, ids=str)
def test_our_own_openapi(
    api: ServedApi, session: requests.Session, document: str, path: str, method: str, mode: GenerationMode
) -> None:
    operation = schemathesis.openapi.from_dict(DOCUMENTS[document])[path][method]

    @seed(zlib.crc32(f"{path} {method} {mode}".encode()))
    @BOUNDED
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        for name, known in KNOWN.items():
            given_name = (case.path_parameters or {}).get(name)
            if given_name is not None and len(str(given_name)) % 2:  # half of them are about what is there
                case.path_parameters[name] = known[len(str(given_name)) // 2 % len(known)]
        arguments = case.as_transport_kwargs(base_url=api.url)
        try:
            # A watch goes on: what counts is how it begins.
            with session.request(**arguments, timeout=20, stream=True) as answer:
                assert answer.status_code < 500, (arguments, answer.text[:500])
                if "watch" not in answer.url:
                    check(answer.status_code, answer.content)
        except (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL, UnicodeError):
            pass  # can't be sent

    send()


def check(code: int, body: bytes) -> None:
    """An answer is JSON, and a refusal is a Status that says why."""
    document = json.loads(body)
    if code >= 400:
        assert (document["kind"], document["code"]) == ("Status", code)
        assert document["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text()
            | st.sampled_from(
                [
                    "metadata",
                    "spec",
                    "status",
                    "name",
                    "labels",
                    "finalizers",
                    "cpu",
                    "memory",
                    "op",
                    "path",
                    "value",
                    "$patch",
                ]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)
TYPES = st.sampled_from(
    [
        "application/json",
        "application/merge-patch+json",
        "application/json-patch+json",
        "application/strategic-merge-patch+json",
        "application/apply-patch+yaml",
        "application/vnd.kubernetes.protobuf",
        "text/plain",
        "",
    ]
)
PLACES = st.sampled_from(
    [
        ("POST", VMS),
        ("POST", OPERATIONS),
        ("POST", f"{GROUP}/virtualmachineclasses"),
        ("POST", "/api/v1/namespaces"),
        ("POST", "/api/v1/namespaces/default/pods/x/eviction"),
        ("PUT", f"{VMS}/linux-vm"),
        ("PUT", "/api/v1/nodes/n1"),
        ("PATCH", f"{VMS}/linux-vm"),
        ("PATCH", f"{OPERATIONS}/op"),
        ("PATCH", f"{GROUP}/virtualmachineclasses/generic"),
        ("PATCH", "/api/v1/nodes/n1"),
        ("PATCH", "/api/v1/namespaces/default"),
        ("DELETE", f"{VMS}/nope"),
        ("DELETE", f"{OPERATIONS}/nope"),
        *(("POST", f"/apis/vmherd.dev/v1/{kind}") for kind in ("nodedrains", "maintenances", "nodefencings")),
        ("POST", "/apis/vmherd.dev/v1/nodedrains/-/plan"),
        ("PATCH", "/apis/vmherd.dev/v1/rebalancepolicies/cluster?fieldManager=fuzz"),
    ]
)


def test_bodies_of_all_kinds(root: httpx.Client) -> None:
    @seed(20261128)
    @settings(BOUNDED, max_examples=300)
    @given(place=PLACES, body=JSON | st.binary(), media_type=TYPES, magic=st.booleans())
    def send(place: tuple[str, str], body: Any, media_type: str, *, magic: bool) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        if magic and isinstance(body, bytes):
            content = b"k8s\x00" + content
        answer = root.request(*place, content=content, headers={"content-type": media_type})
        assert answer.status_code < 500, (place, content, media_type, answer.text)
        check(answer.status_code, answer.content)

    send()


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"[" * 100_000, 400),
        (b'{"a":' * 50 + b"1" + b"}" * 50, 422),
        (b'{"metadata":{"name":"a","name":"b"}}', 400),
        (b'{"a":NaN}', 400),
        (b'{"a":"\\ud800"}', 400),
        (b"\xff\xfe", 400),
        (b'{"a":' + b"9" * 5_000 + b"}", 400),
        (b"x" * (1024 * 1024 + 1), 413),
        (b"", 400),
        (b"null", 400),
        (b"7", 400),
    ],
    ids=[
        "deep array",
        "deep object",
        "twice",
        "NaN",
        "surrogate",
        "not UTF-8",
        "huge number",
        "large",
        "empty",
        "null",
        "7",
    ],
)
def test_what_is_not_read(root: httpx.Client, content: bytes, code: int) -> None:
    answer = root.post(VMS, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == code, answer.text
    check(code, answer.content)


def test_a_large_body_without_its_length_is_cut_off(root: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield b"x" * 65_536

    try:
        answer = root.patch(f"{VMS}/linux-vm", content=chunks(), headers=MERGE)
    except httpx.WriteError:
        return  # the server hung up on it
    assert answer.status_code == 413


@pytest.mark.parametrize("name", [b"X: ", b"GET /"], ids=["a header", "a path"])
def test_a_head_without_an_end_is_hung_up_on(api: ServedApi, name: bytes) -> None:
    start = name if name.startswith(b"GET") else b"GET / HTTP/1.1\r\n" + name
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as one:
        sent = start + b"x" * 4096
        answer = b""
        try:
            for _ in range(1_000):
                one.sendall(sent)
                sent = b"x" * 4096
        except OSError:
            pass  # hung up
        else:
            pytest.fail("4 MiB of a head were taken")
        with contextlib.suppress(OSError):  # reset, with what was not read
            answer = one.recv(4096)
        assert not answer or b" 400 " in answer
    assert httpx.get(f"{api.url}/healthz").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/x",
        "/api/v2",
        "/api/v1/nope",
        "/api/v1/nodes/n1/nope",
        "/api/v1/nodes/n1/status/x",
        "/api/v1/namespaces/default/nodes",
        "/api/v1/pods/x",
        "/api/v1//nodes",
        "/api/v1/nodes/%2e%2e",
        "/api/v1/nodes/%00",
        "/apis/virtualization.deckhouse.io/v1",
        "/openapi/v3/apis/nope",
        "/api/v1/namespaces/a/b/c/d/e/f",
        "/api/v1/nodes/" + "x" * 5_000,
    ],
)
def test_what_is_not_there(root: httpx.Client, path: str) -> None:
    answer = root.get(path)
    assert answer.status_code == 404, answer.text
    check(404, answer.content)


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "OPTIONS", "BREW", "HEAD"])
def test_methods_that_are_none(api: ServedApi, root: httpx.Client, method: str) -> None:
    answer = root.request(method, VMS)
    assert answer.status_code in {400, 404, 405}

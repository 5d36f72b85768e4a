"""Where the API is and who we are to it; and its answers put in our words."""

import base64
import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr

from orchestrator.cli.kubeconfig import document
from orchestrator.client.documents import body_of, decode
from orchestrator.client.place import Place, check_url, find_place, read_kubeconfig
from orchestrator.client.remote import RemoteClient
from orchestrator.client.session import ApiSession, ServerUnavailable, new_queue, status_error
from orchestrator.errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    OutcomeUnknown,
    Refused,
    StoreUnavailable,
    Unauthorized,
    VersionExpired,
    VmherdError,
)
from orchestrator.resources import Node, OperationType, VirtualMachine
from orchestrator.services.manifests import read_manifest
from orchestrator.services.operations import new_operation
from orchestrator.settings import Settings
from tests.builders import a_vm

TOKEN = "vmherd_ci_" + "x" * 43
URL = "https://api.example:8080"
PEM = "-----BEGIN CERTIFICATE-----\n"


class TestWhereItIs:
    def test_nothing_says_that_there_is_one(self) -> None:
        assert find_place(Settings()) is None
        assert find_place(Settings(token=SecretStr(TOKEN))) is None

    def test_from_settings(self, tmp_path: Path) -> None:
        (tmp_path / "token").write_text(f"{TOKEN}\n")
        (tmp_path / "ca").write_text(PEM)
        given = Settings(server=f"{URL}/", token_file=tmp_path / "token", ca_file=tmp_path / "ca")
        assert find_place(given) == Place(URL, TOKEN, PEM)
        assert find_place(given, "https://other") == Place("https://other", TOKEN, PEM)
        direct = Settings(server=URL, token=SecretStr("t"), token_file=tmp_path / "token")
        assert find_place(direct) == Place(URL, "t")

    def test_the_token_is_in_no_repr(self) -> None:
        assert TOKEN not in repr(Place(URL, TOKEN))
        assert TOKEN not in repr(Settings(token=SecretStr(TOKEN)))

    @pytest.mark.parametrize(
        "url",
        ["", "api.example", "api.example:8080", "ftp://x", "https://", "https://u:p@x", "https://x:y", "https://x?y"],
    )
    def test_no_url(self, url: str) -> None:
        with pytest.raises(Invalid, match="is not a URL"):
            check_url(url)

    def test_a_token_goes_in_clear_on_this_machine_only(self) -> None:
        for host in ("localhost", "127.0.0.1:8080", "127.9.9.9", "[::1]:8080"):
            assert check_url(f"http://{host}/") == f"http://{host}"
        for host in ("192.0.2.1", "api.example", "localhost.example", "0.0.0.0"):
            with pytest.raises(Invalid, match="in clear; use https"):
                check_url(f"http://{host}")

    @pytest.mark.parametrize("setting", ["token_file", "ca_file", "kubeconfig"])
    def test_a_file_that_is_not_there_is_named_with_its_setting(self, setting: str, tmp_path: Path) -> None:
        with pytest.raises(Invalid, match=f"VMHERD_{setting.upper()}: .*nowhere: No such file"):
            find_place(Settings(server=URL, **{setting: tmp_path / "nowhere"}))  # type: ignore[arg-type]


def a_kubeconfig(**cluster: object) -> dict[str, Any]:
    data = document(URL, TOKEN, "ci", PEM)
    data["clusters"][0]["cluster"] |= cluster
    return data


def written(folder: Path, data: object) -> Path:
    path = folder / "config"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


class TestKubeconfig:
    def test_ours_is_read_back(self, tmp_path: Path) -> None:
        path = written(tmp_path, a_kubeconfig())
        assert read_kubeconfig(path) == Place(URL, TOKEN, PEM)
        assert find_place(Settings(kubeconfig=path)) == Place(URL, TOKEN, PEM)
        assert find_place(Settings(kubeconfig=path, server="https://x", token=SecretStr("t"))) == Place(
            "https://x", "t", PEM
        )

    def test_files_that_it_names_lie_beside_it(self, tmp_path: Path) -> None:
        data = a_kubeconfig()
        cluster, user = data["clusters"][0]["cluster"], data["users"][0]["user"]
        del cluster["certificate-authority-data"], user["token"]
        cluster["certificate-authority"], user["tokenFile"] = "ca.crt", "token"
        (tmp_path / "ca.crt").write_text(PEM)
        (tmp_path / "token").write_text(TOKEN)
        assert read_kubeconfig(written(tmp_path, data)) == Place(URL, TOKEN, PEM)

    def test_the_current_context_counts(self, tmp_path: Path) -> None:
        data = a_kubeconfig()
        data["contexts"].insert(0, {"name": "other", "context": {"cluster": "other", "user": "other"}})
        assert read_kubeconfig(written(tmp_path, data)).url == URL
        data["current-context"] = "other"
        with pytest.raises(Invalid, match="has no cluster named 'other'"):
            read_kubeconfig(written(tmp_path, data))
        data["current-context"] = ""
        with pytest.raises(Invalid, match="has no context named ''"):
            read_kubeconfig(written(tmp_path, data))

    @pytest.mark.parametrize(
        ("data", "why"),
        [
            ("", "is not a kubeconfig"),
            ("[1]", "is not a kubeconfig"),
            ("a: b: c", "VMHERD_KUBECONFIG"),
            (a_kubeconfig(**{"insecure-skip-tls-verify": True}), "insecure-skip-tls-verify is not taken"),
            (a_kubeconfig(**{"tls-server-name": "x"}), "tls-server-name is not taken"),
            (a_kubeconfig(**{"proxy-url": "http://x"}), "proxy-url is not taken"),
            (a_kubeconfig(**{"certificate-authority-data": "%"}), "is not base64"),
            (a_kubeconfig(server="http://192.0.2.1"), "in clear"),
            ({**a_kubeconfig(), "users": [{"name": "ci", "user": {"client-certificate": "x"}}]}, "has no token"),
        ],
    )
    def test_what_is_not_taken(self, tmp_path: Path, data: object, why: str) -> None:
        with pytest.raises(Invalid, match=why):
            read_kubeconfig(written(tmp_path, data))

    def test_as_kubectl_wants_it(self) -> None:
        data = document(URL, TOKEN, "ci", PEM, "shop")
        cluster = data["clusters"][0]["cluster"]
        assert cluster == {"server": URL, "certificate-authority-data": base64.b64encode(PEM.encode()).decode()}
        assert data["contexts"] == [
            {"name": "vmherd", "context": {"cluster": "vmherd", "user": "ci", "namespace": "shop"}}
        ]
        assert "certificate-authority-data" not in document(URL, TOKEN, "ci", "")["clusters"][0]["cluster"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ({"reason": "NotFound"}, NotFound),
        ({"reason": "AlreadyExists"}, AlreadyExists),
        ({"reason": "Conflict"}, Conflict),
        ({"reason": "Invalid"}, Invalid),
        ({"reason": "Forbidden"}, Refused),
        ({"reason": "Forbidden", "message": 'pods is forbidden: User "x" cannot list'}, Forbidden),
        ({"reason": "Unauthorized"}, Unauthorized),
        ({"reason": "Expired"}, VersionExpired),
        ({"reason": "TooManyRequests"}, Refused),
        ({"reason": "ServiceUnavailable"}, StoreUnavailable),
        ({"reason": "OutcomeUnknown"}, OutcomeUnknown),
        ({"reason": "InternalError"}, VmherdError),
        ({"code": 500}, VmherdError),
        ({}, VmherdError),
    ],
)
def test_errors_are_those_that_services_raise(status: dict[str, Any], kind: type[VmherdError]) -> None:
    error = status_error({"message": "why", **status})
    assert type(error) is kind
    assert str(error).startswith(str(status.get("message", "why")))


def test_an_invalid_field_keeps_its_path() -> None:
    causes = [{"field": "spec.cpu.cores", "message": "must be more", "reason": "FieldValueInvalid"}]
    error = status_error({"reason": "Invalid", "message": "x", "details": {"causes": causes}})
    assert isinstance(error, Invalid)
    assert error.causes == (("spec.cpu.cores", "must be more"),)


class TestWhatIsSent:
    def test_what_was_given_empty_or_not(self) -> None:
        given = {
            "apiVersion": "virtualization.deckhouse.io/v1alpha2",
            "kind": "VirtualMachine",
            "metadata": {"name": "a", "labels": {"empty": ""}},
            "spec": {
                "memory": {"size": "1Gi"},
                "cpu": {"cores": 1},
                "runPolicy": "Manual",
                "nodeSelector": {"gpu": ""},
            },
        }
        given["spec"]["disks"] = [{"name": "root", "file": {"path": "/srv/a.qcow2"}}]  # type: ignore[index]
        assert body_of(read_manifest(given)) == given

    def test_nothing_of_the_servers(self) -> None:
        body = body_of(a_vm("a"))
        assert "status" not in body
        assert "createdVersion" not in body
        operation = body_of(new_operation("a", OperationType.EVICT))
        assert operation["kind"] == "VirtualMachineOperation"
        assert operation["spec"] == {"type": "Evict", "virtualMachineName": "a"}

    def test_another_kind_than_was_asked_for_is_told(self) -> None:
        with pytest.raises(Invalid, match="answered with a Node, where a VirtualMachine was asked for"):
            decode(VirtualMachine, {"kind": "Node"})

    def test_a_newer_servers_fields_are_no_error(self) -> None:
        data = a_vm("a").model_dump(mode="json", by_alias=True, exclude_none=True)
        read = decode(
            VirtualMachine, {**data, "newField": 1, "createdVersion": 7, "spec": {**data["spec"], "alsoNew": {}}}
        )
        assert read == a_vm("a").with_(created_version=7)


@contextmanager
def answering(*answers: bytes, closing: bool = False) -> Iterator[str]:
    """A server that gives raw answers, one a connection; `closing`: and ends each at once."""

    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(left.pop(0) if left else b"")
            self.wfile.flush()
            if not closing:
                stop.wait(20)

    left, stop = list(answers), threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        stop.set()
        server.shutdown()


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


class TestConversation:
    def test_a_read_whose_connection_broke_is_asked_again(self) -> None:
        with answering(b"", ok(b'{"kind":"x"}'), closing=True) as url:
            assert ApiSession(Place(url)).read("/x") == {"kind": "x"}

    def test_a_change_without_an_answer_is_not_done_again(self) -> None:
        with (
            answering(b"", ok(b"{}"), closing=True) as url,
            pytest.raises(OutcomeUnknown, match="look whether it was done"),
        ):
            ApiSession(Place(url)).write("POST", "/x", {})

    def test_nobody_listens(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        session = ApiSession(Place(f"http://127.0.0.1:{port}"))
        with pytest.raises(ServerUnavailable, match=f"no API at http://127.0.0.1:{port}: "):
            session.read("/x")
        with pytest.raises(ServerUnavailable):
            session.write("POST", "/x", {})
        with pytest.raises(ServerUnavailable):
            session.open_stream("/x", {}, new_queue(), "x")

    @pytest.mark.parametrize(
        "answer",
        [
            ok(b"<html>"),
            b"HTTP/1.1 404 No\r\ncontent-length: 4\r\n\r\nnope",
            b"HTTP/1.1 302 x\r\nlocation: http://x/\r\ncontent-length: 0\r\n\r\n",
        ],
    )
    def test_who_is_no_vmherd_is_told(self, answer: bytes) -> None:
        with answering(answer, closing=True) as url, pytest.raises(VmherdError, match="answers as no vmherd API does"):
            ApiSession(Place(url)).read("/x")

    def test_a_404_of_a_stranger_is_not_taken_as_not_there(self) -> None:
        with answering(b"HTTP/1.1 404 No\r\ncontent-length: 4\r\n\r\nnope", closing=True) as url:
            with pytest.raises(VmherdError, match="answers as no vmherd API does") as refused:
                RemoteClient(Place(url)).find(Node, "n1")
            assert not isinstance(refused.value, NotFound)

    def test_a_ca_that_is_none(self) -> None:
        with pytest.raises(Invalid, match="VMHERD_CA_FILE: holds no certificate"):
            ApiSession(Place(URL, "", "nonsense"))


class TestStream:
    def test_lines_whatever_stands_in_them_and_however_they_are_cut(self) -> None:
        text = '{"a":"\u2028\u0085\u000b"}\n{"b":1}\n'.encode()
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in text)
        lines: queue.Queue[tuple[str, bytes | None]] = new_queue()
        with answering(head + chunks + b"0\r\n\r\n") as url:
            stream = ApiSession(Place(url)).open_stream("/x", {}, lines, "vm")
            first, second, *_ = text.split(b"\n")
            got = [lines.get(timeout=10) for _ in range(3)]
            stream.close()
        assert got == [("vm", first), ("vm", second), ("vm", None)]

    def test_is_closed_while_it_waits(self) -> None:
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        lines: queue.Queue[tuple[str, bytes | None]] = new_queue()
        with answering(head) as url:
            stream = ApiSession(Place(url)).open_stream("/x", {}, lines, "vm")
            closing = threading.Thread(target=stream.close)
            closing.start()
            closing.join(10)
            assert not closing.is_alive()
            assert lines.empty()

    def test_a_full_queue_does_not_keep_it_from_closing(self) -> None:
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        lines: queue.Queue[tuple[str, bytes | None]] = queue.Queue(1)
        with answering(head + b"6\r\na\nb\nc\n\r\n") as url:
            stream = ApiSession(Place(url)).open_stream("/x", {}, lines, "vm")
            assert lines.get(timeout=10) == ("vm", b"a")
            closing = threading.Thread(target=stream.close)
            closing.start()
            closing.join(10)
            assert not closing.is_alive()

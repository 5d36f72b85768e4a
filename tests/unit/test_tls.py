"""The API's certificates: made, shared, renewed; and what a client makes of them."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from orchestrator.api.tls import ServerCertificate, ca_certificate, ensure_certificate, server_names
from orchestrator.errors import Invalid, NotFound
from orchestrator.settings import Settings
from tests.waiting import wait_until

NAMES = ("api.example", "192.0.2.1")
LATER = timedelta(days=61)


def now() -> datetime:
    return datetime.now(UTC)


def certificate_in(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@contextmanager
def served(context: ssl.SSLContext) -> Iterator[int]:
    """A server that shakes hands and says nothing; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                try:
                    with context.wrap_socket(connection, server_side=True) as shaken:
                        shaken.recv(1)
                except OSError:
                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def shake_hands(port: int, ca: Path, name: str) -> x509.Certificate:
    client = ssl.create_default_context(cafile=ca)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    with (
        socket.create_connection(("127.0.0.1", port), 20) as plain,
        client.wrap_socket(plain, server_hostname=name) as shaken,
    ):
        return x509.load_der_x509_certificate(shaken.getpeercert(binary_form=True) or b"")


class TestTheFirstStart:
    def test_makes_what_a_strict_client_trusts(self, tmp_path: Path) -> None:
        config = Settings(tls_dir=tmp_path / "new" / "tls", tls_names="api.example, 192.0.2.1")
        server = ServerCertificate(config, ["0.0.0.0", "127.0.0.2"])
        ca = config.tls_dir / "ca.crt"
        with served(server.context) as port:
            for name in ("api.example", "192.0.2.1", "localhost", "127.0.0.1", "127.0.0.2", socket.gethostname()):
                shake_hands(port, ca, name)
            for name in ("other.example", "0.0.0.0", "192.0.2.2"):
                with pytest.raises(ssl.SSLCertVerificationError):
                    shake_hands(port, ca, name)

    def test_another_herds_ca_is_not_trusted(self, tmp_path: Path) -> None:
        server = ServerCertificate(Settings(tls_dir=tmp_path / "a"))
        ServerCertificate(Settings(tls_dir=tmp_path / "b"))
        with served(server.context) as port, pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(port, tmp_path / "b" / "ca.crt", "localhost")

    def test_keys_are_their_owners_alone(self, tmp_path: Path) -> None:
        path = ensure_certificate(tmp_path / "tls", NAMES, now())
        assert (tmp_path / "tls").stat().st_mode & 0o777 == 0o700
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
        assert modes == {"ca.crt": 0o644, "ca.pem": 0o600, path.name: 0o600, "lock": 0o600}
        assert "PRIVATE" not in (path.parent / "ca.crt").read_text()

    def test_many_at_once_make_one_ca(self, tmp_path: Path) -> None:
        found: list[Path] = []
        threads = [
            threading.Thread(target=lambda: found.append(ensure_certificate(tmp_path, NAMES, now()))) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8
        certificate_in(found[0]).verify_directly_issued_by(certificate_in(tmp_path / "ca.crt"))
        assert len(list(tmp_path.iterdir())) == 4


class TestRenewal:
    def test_nothing_is_made_anew_while_it_lasts(self, tmp_path: Path) -> None:
        path = ensure_certificate(tmp_path, NAMES, now())
        before = path.read_bytes()
        assert ensure_certificate(tmp_path, NAMES, now() + timedelta(days=59)).read_bytes() == before

    def test_renewed_a_month_before_its_end_under_the_same_ca(self, tmp_path: Path) -> None:
        old = certificate_in(ensure_certificate(tmp_path, NAMES, now()))
        ca = (tmp_path / "ca.crt").read_bytes()
        new = certificate_in(ensure_certificate(tmp_path, NAMES, now() + LATER))
        assert new.not_valid_after_utc - old.not_valid_after_utc > timedelta(days=60)
        assert (tmp_path / "ca.crt").read_bytes() == ca
        new.verify_directly_issued_by(certificate_in(tmp_path / "ca.crt"))

    def test_other_names_make_another(self, tmp_path: Path) -> None:
        old = certificate_in(ensure_certificate(tmp_path, NAMES, now()))
        new = certificate_in(ensure_certificate(tmp_path, (*NAMES, "second.example"), now()))
        assert old.serial_number != new.serial_number

    def test_a_server_shows_the_new_one_without_a_restart(self, tmp_path: Path) -> None:
        days = [timedelta(0)]
        server = ServerCertificate(Settings(tls_dir=tmp_path), now=lambda: now() + days[0])
        with served(server.context) as port:
            old = shake_hands(port, tmp_path / "ca.crt", "localhost")
            assert not server.renew_if_due()
            assert shake_hands(port, tmp_path / "ca.crt", "localhost") == old
            days[0] = LATER
            # Valid from an hour before its making: a client of today would not take it yet.
            assert server.renew_if_due()
            with pytest.raises(ssl.SSLCertVerificationError, match="not yet valid"):
                shake_hands(port, tmp_path / "ca.crt", "localhost")

    def test_it_is_kept_current_and_a_failure_is_tried_again(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        days, told = [timedelta(0)], [""]
        server = ServerCertificate(Settings(tls_dir=tmp_path), now=lambda: now() + days[0])
        path = next(tmp_path.glob("server-*.pem"))
        first = certificate_in(path)

        def said(words: str) -> bool:
            told[0] += "".join(capfd.readouterr())
            return words in told[0]

        path.chmod(0o644)  # refused as long as others may read the key
        days[0] = LATER
        loop = asyncio.new_event_loop()
        keeping = loop.create_task(server.keep_current(every_s=0.01))
        thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([keeping])))
        thread.start()
        try:
            wait_until(lambda: said("others than its owner may read it"), 10, "the failure is told")
            assert certificate_in(path) == first
            path.chmod(0o600)
            wait_until(lambda: certificate_in(path) != first, 10, "a new certificate")
        finally:
            loop.call_soon_threadsafe(keeping.cancel)
            thread.join(10)
            loop.close()

    def test_never_longer_than_its_ca(self, tmp_path: Path) -> None:
        ensure_certificate(tmp_path, NAMES, now())
        ca = certificate_in(tmp_path / "ca.crt")
        near = ca.not_valid_after_utc - timedelta(days=40)
        made = certificate_in(ensure_certificate(tmp_path, NAMES, near))
        assert made.not_valid_after_utc == ca.not_valid_after_utc


class TestSeveralServers:
    def test_share_a_ca_by_a_copy_of_it(self, tmp_path: Path) -> None:
        ensure_certificate(tmp_path / "a", NAMES, now())
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "ca.pem").write_bytes((tmp_path / "a" / "ca.pem").read_bytes())
        (tmp_path / "b" / "ca.pem").chmod(0o600)
        path = ensure_certificate(tmp_path / "b", NAMES, now())
        assert (tmp_path / "b" / "ca.crt").read_bytes() == (tmp_path / "a" / "ca.crt").read_bytes()
        certificate_in(path).verify_directly_issued_by(certificate_in(tmp_path / "a" / "ca.crt"))

    def test_a_certificate_of_another_ca_is_made_anew(self, tmp_path: Path) -> None:
        path = ensure_certificate(tmp_path / "a", NAMES, now())
        other = ensure_certificate(tmp_path / "b", NAMES, now())
        other.write_bytes(path.read_bytes())
        ensure_certificate(tmp_path / "b", NAMES, now())
        certificate_in(other).verify_directly_issued_by(certificate_in(tmp_path / "b" / "ca.crt"))

    def test_without_the_cas_key_it_serves_while_its_certificate_lasts(self, tmp_path: Path) -> None:
        path = ensure_certificate(tmp_path, NAMES, now())
        (tmp_path / "ca.pem").unlink()
        assert ensure_certificate(tmp_path, NAMES, now()) == path
        with pytest.raises(Invalid, match=r"ca\.pem: is not there, and a certificate has to be made"):
            ensure_certificate(tmp_path, NAMES, now() + LATER)


class TestBadFiles:
    def test_a_key_that_others_may_read_is_refused(self, tmp_path: Path) -> None:
        ensure_certificate(tmp_path, NAMES, now())
        (tmp_path / "ca.pem").chmod(0o640)
        with pytest.raises(Invalid, match=r"others than its owner may read it: chmod 600 .*ca\.pem"):
            ensure_certificate(tmp_path, NAMES, now())

    def test_what_is_no_key_is_named(self, tmp_path: Path) -> None:
        path = ensure_certificate(tmp_path, NAMES, now())
        for broken in (b"", b"nonsense", (tmp_path / "ca.crt").read_bytes()):
            path.write_bytes(broken)
            with pytest.raises(Invalid, match=r"server-.*\.pem: does not hold a certificate and its key"):
                ensure_certificate(tmp_path, NAMES, now())
        other = ensure_certificate(tmp_path / "other", NAMES, now()).read_text()
        path.write_text(other.partition("-----BEGIN CERT")[0] + (tmp_path / "ca.crt").read_text())
        with pytest.raises(Invalid, match="don't go together"):
            ensure_certificate(tmp_path, NAMES, now())

    def test_a_directory_that_cant_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(Invalid, match="file"):
            ensure_certificate(tmp_path / "file" / "tls", NAMES, now())

    def test_names_that_are_none(self) -> None:
        for names in ("a b", "-x", "https://x", "x:443", "a..b"):
            with pytest.raises(Invalid, match="VMHERD_TLS_NAMES"):
                server_names(Settings(tls_names=names))
        assert "*.example" in server_names(Settings(tls_names="*.Example,,"))


class TestOwnFiles:
    def test_are_read_again_when_they_change(self, tmp_path: Path) -> None:
        first = ensure_certificate(tmp_path / "a", ("localhost",), now())
        own, key = tmp_path / "own.crt", tmp_path / "own.key"
        split(first, own, key)
        config = Settings(tls_dir=tmp_path / "unused", tls_cert_file=own, tls_key_file=key)
        server = ServerCertificate(config)
        with served(server.context) as port:
            assert shake_hands(port, tmp_path / "a" / "ca.crt", "localhost") == certificate_in(own)
            assert not server.renew_if_due()
            second = ensure_certificate(tmp_path / "b", ("localhost",), now())
            split(second, own, key)
            assert server.renew_if_due()
            assert shake_hands(port, tmp_path / "b" / "ca.crt", "localhost") == certificate_in(second)
            own.write_text("half written")
            with pytest.raises(Invalid, match=r"own\.crt"):
                server.renew_if_due()
            assert shake_hands(port, tmp_path / "b" / "ca.crt", "localhost") == certificate_in(second)
        assert not config.tls_dir.exists()

    def test_both_or_none(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="go together"):
            Settings(tls_cert_file=tmp_path / "x")

    def test_that_are_not_there_are_named(self, tmp_path: Path) -> None:
        config = Settings(tls_cert_file=tmp_path / "x.crt", tls_key_file=tmp_path / "x.key")
        with pytest.raises(Invalid, match=r"x\.crt: No such file"):
            ServerCertificate(config)


def split(pair: Path, certificate: Path, key: Path) -> None:
    head, mark, tail = pair.read_text().partition("-----BEGIN CERTIFICATE")
    certificate.write_text(mark + tail)
    key.write_text(head)


class TestTheCaForClients:
    def test_is_the_certificate_without_the_key(self, tmp_path: Path) -> None:
        ensure_certificate(tmp_path, NAMES, now())
        pem = ca_certificate(Settings(tls_dir=tmp_path))
        assert pem == (tmp_path / "ca.crt").read_text()
        assert ca_certificate(Settings(tls_ca_file=tmp_path / "ca.pem")) == pem, "a key beside it is left out"

    def test_says_where_it_would_be(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match=r"ca\.crt: there is no CA's certificate"):
            ca_certificate(Settings(tls_dir=tmp_path))
        with pytest.raises(NotFound, match="VMHERD_TLS_CA_FILE is needed"):
            ca_certificate(Settings(tls_cert_file=tmp_path / "x", tls_key_file=tmp_path / "x"))
        (tmp_path / "ca.crt").write_text("nonsense")
        with pytest.raises(Invalid, match="holds no certificate"):
            ca_certificate(Settings(tls_dir=tmp_path))

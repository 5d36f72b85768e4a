"""TLS for the API: a CA and a certificate are made at the first start, and the certificate is renewed before it ends.

The CA is the herd's own, and its certificate is what clients are given (`vmherd kubeconfig` embeds it). Its key lies
in `VMHERD_TLS_DIR`, readable by the API's user alone, and nowhere else: in Redis, whoever could read the herd's state
could also pose as its API, and be sent everybody's tokens. So several servers share a CA by sharing the directory, or
by `ca.pem` copied into it before the first start; each makes its own certificate there, named by its host.

| file | holds | mode |
|---|---|---|
| `ca.crt` | the CA's certificate, for clients | 0644 |
| `ca.pem` | the CA's certificate and key | 0600 |
| `server-<host>.pem` | a server's certificate and key | 0600 |

A certificate and its key are one file, replaced as a whole: no crash leaves two that don't fit. Whoever has a CA
already gives certificate files of its own (`VMHERD_TLS_CERT_FILE`, `VMHERD_TLS_KEY_FILE`), and nothing is made here;
they are read again when they change.
"""

import asyncio
import fcntl
import ipaddress
import os
import re
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from orchestrator.errors import Invalid, NotFound, VmherdError
from orchestrator.logs import logger
from orchestrator.settings import Settings

log = logger(__name__)

CA_LIFETIME: Final = timedelta(days=3650)
SERVER_LIFETIME: Final = timedelta(days=90)
RENEWED_BEFORE: Final = timedelta(days=30)
_CLOCKS_APART: Final = timedelta(hours=1)
"""Certificates are valid from an hour ago, for clients whose clocks are behind."""
CA_FILE: Final = "ca.crt"
_CA_WITH_KEY: Final = "ca.pem"
_LOCK: Final = "lock"
_OTHERS: Final = 0o077
_DNS_NAME = re.compile(r"(\*\.)?([a-z0-9_]([-a-z0-9_]{0,61}[a-z0-9_])?)(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*")


@dataclass(frozen=True, slots=True)
class _Pair:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def pem(self) -> bytes:
        key = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return key + self.certificate.public_bytes(serialization.Encoding.PEM)


class ServerCertificate:
    """The certificate that one server shows. New connections get the new one after a renewal; open ones go on.

    Args:
        config: The `tls_` settings.
        listens: Addresses or names that the server is bound to; those of all interfaces are no names.
        now: The time of day.

    Attributes:
        context: For the server; stays the same object.

    Raises:
        Invalid: A file is missing, is not what it should be, or is readable by others; says which.
    """

    def __init__(
        self, config: Settings, listens: Iterable[str] = (), now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._config = config
        self._now = now
        self._names = server_names(config, listens)
        self._loaded: tuple[tuple[int, int], ...] | None = None
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.renew_if_due()

    def renew_if_due(self) -> bool:
        """Renew the certificate where its end is near, or read it again where its file was changed.

        What fails leaves the certificate as it is.

        Returns:
            Whether new connections are shown another one from now on.

        Raises:
            Invalid: As the constructor.
        """
        return self._load(*self._prepare())

    async def keep_current(self, every_s: float = 3600.0) -> None:
        """Call `renew_if_due` again and again, for ever; what fails is logged, and tried the next time.

        The context is changed in the event loop's thread, which makes all connections from it: OpenSSL does not take
        both at once.
        """
        while True:
            await asyncio.sleep(every_s)
            try:
                self._load(*await asyncio.to_thread(self._prepare))
            except VmherdError as error:
                log.error("certificate not renewed", error=str(error))

    def _prepare(self) -> tuple[Path, Path | None]:
        config = self._config
        if config.tls_cert_file is not None:
            return config.tls_cert_file, config.tls_key_file
        return ensure_certificate(config.tls_dir, self._names, self._now()), None

    def _load(self, certificate: Path, key: Path | None) -> bool:
        try:
            looked = [path.stat() for path in (certificate, key) if path is not None]
            stamps = tuple((file.st_ino, file.st_mtime_ns) for file in looked)
            if stamps == self._loaded:
                return False
            # Tried on a context of its own first: what can't be read must not reach the one in use.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
            self.context.load_cert_chain(certificate, key)
        except ssl.SSLError as error:
            raise Invalid(f"{certificate}: is not a certificate that goes with its key: {error.reason}") from error
        except OSError as error:
            raise Invalid(f"{error.filename or certificate}: {error.strerror}") from error
        self._loaded = stamps
        log.info("certificate loaded", file=str(certificate))
        return True


def server_names(config: Settings, listens: Iterable[str] = ()) -> tuple[str, ...]:
    """Give the names and addresses that a server's certificate is for, in order, each once.

    Raises:
        Invalid: One of `VMHERD_TLS_NAMES` is neither a DNS name nor an IP address.
    """
    wanted = [name.strip().lower() for name in config.tls_names.split(",") if name.strip()]
    for name in wanted:
        if not _is_address(name) and not _DNS_NAME.fullmatch(name):
            raise Invalid(f"VMHERD_TLS_NAMES: {name!r} is neither a DNS name nor an IP address")
    own = [socket.gethostname().lower(), "localhost", "127.0.0.1", "::1"]
    bound = [name.lower() for name in listens if not (_is_address(name) and ipaddress.ip_address(name).is_unspecified)]
    found = [str(ipaddress.ip_address(name)) if _is_address(name) else name for name in (*own, *bound, *wanted)]
    return tuple(dict.fromkeys(name for name in found if _is_address(name) or _DNS_NAME.fullmatch(name)))


def ensure_certificate(directory: Path, names: tuple[str, ...], now: datetime) -> Path:
    """Make the CA and this host's certificate, where they are not there; renew the certificate where it is due.

    Args:
        directory: Made where it is not there.
        names: DNS names and IP addresses that it has to be for; one that is for others is made anew.
        now: The time of day.

    Returns:
        The file with the certificate and its key.

    Raises:
        Invalid: A file can't be read or written, or is not what it should be.
    """
    try:
        with _locked(directory):
            path = directory / f"server-{socket.gethostname()}.pem"
            ca = _ca(directory, now)
            authority = ca if isinstance(ca, x509.Certificate) else ca.certificate
            if authority.not_valid_after_utc - now < CA_LIFETIME / 20:
                log.warning("the CA ends soon: see docs/access.md", at=authority.not_valid_after_utc.isoformat())
            if path.exists() and _is_good(_read_pair(path).certificate, authority, names, now):
                return path
            if isinstance(ca, x509.Certificate):
                raise Invalid(
                    f"{directory / _CA_WITH_KEY}: is not there, and a certificate has to be made: copy it from another "
                    "server, or give VMHERD_TLS_CERT_FILE and VMHERD_TLS_KEY_FILE"
                )
            made = _issue(ca, names, now)
            _replace(path, made.pem(), mode=0o600)
            log.info("certificate made", file=str(path), until=made.certificate.not_valid_after_utc.isoformat())
            return path
    except OSError as error:
        raise Invalid(f"{error.filename or directory}: {error.strerror}") from error


def ca_certificate(config: Settings) -> str:
    """Read the certificate of the CA that clients are to trust, as PEM.

    Raises:
        NotFound: This machine has none: says where it would be.
        Invalid: It is not one.
    """
    path = config.tls_ca_file or config.tls_dir / CA_FILE
    if config.tls_ca_file is None and config.tls_cert_file is not None:
        raise NotFound("VMHERD_TLS_CA_FILE is needed beside VMHERD_TLS_CERT_FILE: the CA that clients are to trust")
    try:
        return read_certificates(path)
    except FileNotFoundError as error:
        raise NotFound(
            f"{path}: there is no CA's certificate: `vmherd api` makes one at its first start on this machine"
        ) from error


def read_certificates(path: Path) -> str:
    """Read a file of certificates, and give them as PEM, without what else is in it.

    Raises:
        Invalid: There is none in it.
        OSError: It can't be read.
    """
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except ValueError as error:
        raise Invalid(f"{path}: holds no certificate in PEM form") from error
    return "".join(certificate.public_bytes(serialization.Encoding.PEM).decode() for certificate in found)


def _ca(directory: Path, now: datetime) -> _Pair | x509.Certificate:
    """Read the CA, or make it; without its key where only the certificate is there."""
    with_key, public = directory / _CA_WITH_KEY, directory / CA_FILE
    if with_key.exists():
        pair = _read_pair(with_key)
        pem = pair.certificate.public_bytes(serialization.Encoding.PEM)
        if not public.exists() or public.read_bytes() != pem:
            _replace(public, pem, mode=0o644)
        return pair
    if public.exists():
        return x509.load_pem_x509_certificate(read_certificates(public).encode())
    pair = _new_ca(now)
    _replace(with_key, pair.pem(), mode=0o600)
    _replace(public, pair.certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
    log.info("CA made", file=str(with_key), until=pair.certificate.not_valid_after_utc.isoformat())
    return pair


def _new_ca(now: datetime) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    # A name of its own: clients that trust two herds would else try one's key on the other's certificates.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"vmherd CA {serial % 16**8:08x}")])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - _CLOCKS_APART)
        .not_valid_after(now + CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _Pair(certificate, key)


def _issue(ca: _Pair, names: tuple[str, ...], now: datetime) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(ca.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_APART)
        .not_valid_after(min(now + SERVER_LIFETIME, ca.certificate.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(authority, critical=False)
        .sign(ca.key, hashes.SHA256())
    )
    return _Pair(certificate, key)


def _is_good(certificate: x509.Certificate, authority: x509.Certificate, names: tuple[str, ...], now: datetime) -> bool:
    """Whether a certificate is this CA's, for these names, and lasts."""
    try:
        certificate.verify_directly_issued_by(authority)
        listed = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (InvalidSignature, ValueError, TypeError, x509.ExtensionNotFound):
        return False
    is_current = certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc - RENEWED_BEFORE
    return is_current and set(listed) == {_general_name(name) for name in names}


def _read_pair(path: Path) -> _Pair:
    if path.stat().st_mode & _OTHERS:
        raise Invalid(f"{path}: holds a key, and others than its owner may read it: chmod 600 {path}")
    pem = path.read_bytes()
    try:
        key = serialization.load_pem_private_key(pem, password=None)
        certificate = x509.load_pem_x509_certificate(pem)
    except (ValueError, TypeError) as error:
        raise Invalid(f"{path}: does not hold a certificate and its key in PEM form") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise Invalid(f"{path}: holds a certificate and a key that don't go together")
    return _Pair(certificate, key)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _general_name(name: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(name)) if _is_address(name) else x509.DNSName(name)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other servers out of a directory meanwhile: two that start at once must not make two CAs."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace(path: Path, content: bytes, *, mode: int) -> None:
    """Write a file as a whole, so that it is there complete or as it was."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    draft = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(mode)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)

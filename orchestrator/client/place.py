"""Where the API is, and who we are to it: from the settings, or from a kubeconfig's current context."""

import base64
import binascii
import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from orchestrator.errors import Invalid
from orchestrator.settings import Settings

_NOT_TAKEN = {
    "insecure-skip-tls-verify": "a server that is not verified could be anybody's",
    "tls-server-name": "put the name into the server's URL",
    "proxy-url": "proxies are not used",
}
"""Of a kubeconfig's cluster."""


@dataclass(frozen=True, slots=True)
class Place:
    """An API server.

    Attributes:
        url: `https://host:port`, without a slash at its end.
        token: Empty: none, which gets as far as `/version`.
        ca: Certificates as PEM; empty: the system's CAs count.
    """

    url: str
    token: str = field(default="", repr=False)
    ca: str = ""


def find_place(config: Settings, url: str = "") -> Place | None:
    """Read where the API is; None where nothing says that there is one.

    Args:
        config: `server`, `token`, `token_file`, `ca_file`, `kubeconfig`.
        url: In place of `server`.

    Raises:
        Invalid: What is said can't be used; names the setting.
    """
    from_file = read_kubeconfig(config.kubeconfig) if config.kubeconfig is not None else None
    server = url or config.server
    if not server and from_file is None:
        return None
    known = from_file or Place("")
    token = config.token.get_secret_value() or (read_token(config.token_file) if config.token_file else known.token)
    ca = _read(config.ca_file, "VMHERD_CA_FILE") if config.ca_file is not None else known.ca
    return Place(check_url(server or known.url), token, ca)


def check_url(text: str) -> str:
    """Give a server's URL without what a slash too many would do.

    Raises:
        Invalid: It is none, or would send the token in clear over a network.
    """
    refusal = Invalid(f"VMHERD_SERVER: {text!r} is not a URL such as https://api.example:8080")
    try:
        parts = urlsplit(text)
        good = parts.scheme in {"https", "http"} and bool(parts.hostname) and parts.port != 0 and "@" not in text
    except ValueError as error:
        raise refusal from error
    if not good or parts.query or parts.fragment:
        raise refusal
    if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
        raise Invalid(f"VMHERD_SERVER: {text}: by http the token would be sent in clear; use https")
    return text.rstrip("/")


def read_token(path: Path) -> str:
    """Read a token from a file.

    Raises:
        Invalid: It can't be read, or nothing is in it.
    """
    text = _read(path, "VMHERD_TOKEN_FILE").strip()
    if not text:
        raise Invalid(f"VMHERD_TOKEN_FILE: {path} is empty")
    return text


def read_kubeconfig(path: Path) -> Place:
    """Read the current context of a kubeconfig.

    Raises:
        Invalid: It can't be read, or has what is not taken here: says what.
    """
    try:
        data = yaml.safe_load(_read(path, "VMHERD_KUBECONFIG"))
    except yaml.YAMLError as error:
        raise Invalid(f"VMHERD_KUBECONFIG: {path}: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise Invalid(f"VMHERD_KUBECONFIG: {path} is not a kubeconfig")
    context = _named(data, "contexts", "context", str(data.get("current-context") or ""), path)
    cluster = _named(data, "clusters", "cluster", str(context.get("cluster") or ""), path)
    user = _named(data, "users", "user", str(context.get("user") or ""), path)
    for field_name, why in _NOT_TAKEN.items():
        if cluster.get(field_name):
            raise Invalid(f"VMHERD_KUBECONFIG: {path}: {field_name} is not taken: {why}")
    token = str(user.get("token") or "")
    if not token and user.get("tokenFile"):
        token = read_token(path.parent / str(user["tokenFile"]))
    if not token:
        raise Invalid(f"VMHERD_KUBECONFIG: {path}: its user has no token, which is all that is taken here")
    return Place(check_url(str(cluster.get("server") or "")), token, _ca(cluster, path))


def _ca(cluster: dict[str, Any], path: Path) -> str:
    inline = cluster.get("certificate-authority-data")
    if inline:
        try:
            return base64.b64decode(str(inline), validate=True).decode()
        except (binascii.Error, ValueError) as error:
            raise Invalid(f"VMHERD_KUBECONFIG: {path}: certificate-authority-data is not base64 of PEM") from error
    file = cluster.get("certificate-authority")
    return _read(path.parent / str(file), "VMHERD_KUBECONFIG") if file else ""


def _named(data: dict[str, Any], plural: str, singular: str, name: str, path: Path) -> dict[str, Any]:
    for one in data.get(plural) or ():
        if isinstance(one, dict) and one.get("name") == name and isinstance(one.get(singular), dict):
            found: dict[str, Any] = one[singular]
            return found
    raise Invalid(f"VMHERD_KUBECONFIG: {path}: has no {singular} named {name!r}")


def _read(path: Path, setting: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not text"
        raise Invalid(f"{setting}: {path}: {why}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

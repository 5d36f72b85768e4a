"""`vmherd kubeconfig`: how `kubectl`, and all that reads its configuration, find the API and who they are to it."""

import base64
import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from orchestrator.cli import terminal
from orchestrator.cli.files import ToFile, private_file
from orchestrator.client.place import read_token
from orchestrator.errors import Invalid
from orchestrator.resources.access_token import name_in
from orchestrator.settings import settings

EXAMPLES = """Examples:

$ vmherd kubeconfig --server https://api.example:8080 --token-file alice.token --to-file ~/.kube/vmherd

$ KUBECONFIG=~/.kube/vmherd kubectl get vm

On a machine where `vmherd api` does not run, --ca-file names a copy of its ca.crt.
"""


def kubeconfig(
    server: Annotated[str, typer.Option("--server", metavar="URL", help="Of the API.", show_default=False)] = "",
    token: Annotated[str, typer.Option("--token", metavar="TOKEN", help="- is standard input.")] = "",
    token_file: Annotated[Path | None, typer.Option("--token-file", metavar="FILE", help="Holds the token.")] = None,
    ca_file: Annotated[
        Path | None, typer.Option("--ca-file", metavar="FILE", help="The CA's certificate, if not this machine's own.")
    ] = None,
    namespace: Annotated[
        str, typer.Option("-n", "--namespace", metavar="NAME", help="Where kubectl looks.", show_default=False)
    ] = "",
    to_file: ToFile = None,
) -> None:
    """Print a kubeconfig, with the CA's certificate and the token in it.

    What is not given is taken from VMHERD_SERVER, VMHERD_TOKEN, VMHERD_TOKEN_FILE and VMHERD_CA_FILE.
    """
    import yaml  # noqa: PLC0415 - the other commands don't need it

    config = settings()
    url = _url(server or config.server)
    secret = sys.stdin.read().strip() if token == "-" else token  # noqa: S105 - standard input's sign
    if not secret:
        secret = read_token(token_file) if token_file is not None else ""
    if not secret:
        secret = config.token.get_secret_value() or (read_token(config.token_file) if config.token_file else "")
    name = name_in(secret)
    if name is None:
        raise Invalid("--token: give a token as `vmherd token create` prints it" if not secret else "--token: is none")
    data = document(url, secret, name, _ca(url, ca_file or config.ca_file), namespace)
    text = yaml.safe_dump(data, sort_keys=False)
    with private_file(to_file) as draft:
        if draft is not None:
            draft.write_text(text)
    terminal.write(text.rstrip("\n") if to_file is None else f"{to_file} written")


def document(url: str, token: str, name: str, ca: str, namespace: str = "") -> dict[str, Any]:
    """Make a kubeconfig.

    Args:
        url: Of the API.
        token: Its text.
        name: Of the token.
        ca: Certificates as PEM; empty: the system's CAs count.
        namespace: Of the context; empty: `default`.
    """
    cluster: dict[str, Any] = {"server": url}
    if ca:
        cluster["certificate-authority-data"] = base64.b64encode(ca.encode()).decode()
    context = {"cluster": "vmherd", "user": name, **({"namespace": namespace} if namespace else {})}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "vmherd", "cluster": cluster}],
        "users": [{"name": name, "user": {"token": token}}],
        "contexts": [{"name": "vmherd", "context": context}],
        "current-context": "vmherd",
    }


def _url(text: str) -> str:
    if not text:
        raise Invalid("--server: give the API's URL, such as https://api.example:8080")
    parts = urlsplit(text)
    if parts.scheme not in {"https", "http"} or not parts.hostname or parts.username is not None:
        raise Invalid(f"--server: {text!r} is not a URL such as https://api.example:8080")
    return text.rstrip("/")


def _ca(url: str, file: Path | None) -> str:
    if url.startswith("http:"):
        return ""
    from orchestrator.api.tls import ca_certificate, read_certificates  # noqa: PLC0415 - cryptography is slow to load

    return read_certificates(file) if file is not None else ca_certificate(settings())

"""`AccessToken`: who may use the API, and as what. Internal: no server lists it, and no `get` shows it.

A token is shown once, when it is made: `vmherd_<name>_<secret>`. Its name finds the document, so a server compares
with one digest and searches for none. What is kept is the SHA-256 of the whole text. Slow salted hashes (bcrypt,
Argon2) protect secrets that people choose, which can be guessed; this one has 256 random bits, so there is nothing to
guess, and a slow hash would only make every request slow and the server easy to overload.

That it is a document like all others makes every server learn of a new or a revoked token from the change stream.
"""

import hashlib
import hmac
import re
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from orchestrator.resources.meta import Model, Resource, Timestamp
from orchestrator.resources.names import Name

_TEXT = re.compile(r"vmherd_([a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?)_[A-Za-z0-9_-]{43}")
_NO_DIGEST = "0" * 64


class Role(StrEnum):
    """What somebody may do; each may do what those before it may (`orchestrator.api.rights`)."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


class AccessTokenSpec(Model):
    """What is kept of a token.

    Attributes:
        namespaces: Where the role counts; None: everywhere, and for what is in no namespace.
        sha256: Of the token's text, in hexadecimal.
        expires_at: From then on it is worth nothing; None: it stays until it is revoked.
    """

    role: Role
    namespaces: Annotated[tuple[Name, ...], Field(min_length=1, max_length=256)] | None = None
    sha256: str = Field(pattern="^[0-9a-f]{64}$", repr=False)
    expires_at: Timestamp | None = None


class AccessToken(Resource):
    """One token."""

    kind_name: ClassVar[str] = "AccessToken"
    group_version: ClassVar[str] = "vmherd.dev/v1"
    plural: ClassVar[str] = "accesstokens"
    short: ClassVar[str] = "token"
    namespaced: ClassVar[bool] = False

    api_version: Literal["vmherd.dev/v1"] = "vmherd.dev/v1"
    kind: Literal["AccessToken"] = "AccessToken"
    spec: AccessTokenSpec

    def manifest(self) -> dict[str, Any]:
        """Give it as JSON-able data, without its digest: whatever prints a resource must not print that."""
        data = super().manifest()
        data["spec"].pop("sha256", None)
        return data

    def has_expired(self, now: datetime) -> bool:
        """Whether its time is over."""
        return self.spec.expires_at is not None and now >= self.spec.expires_at

    def is_text(self, text: str) -> bool:
        """Whether a text is this token's; takes as long for a wrong one as for the right one."""
        return hmac.compare_digest(digest(text), self.spec.sha256)


def digest(text: str) -> str:
    """Give what is kept of a token's text."""
    return hashlib.sha256(text.encode()).hexdigest()


def token_text(name: str, secret: str) -> str:
    """Put a token's text together.

    Args:
        name: A DNS label.
        secret: 256 random bits in base64url, 43 characters.
    """
    return f"vmherd_{name}_{secret}"


def name_in(text: str) -> str | None:
    """Give the name that a token's text claims; None for what can't be a token."""
    match = _TEXT.fullmatch(text)
    return match[1] if match is not None else None


def compare_with_nothing(text: str) -> None:
    """Take the time that a comparison takes, so that an unknown name can't be told from a wrong secret."""
    hmac.compare_digest(digest(text), _NO_DIGEST)

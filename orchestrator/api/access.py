"""Who asks, whether they may, and what is kept of it: the API asks this module and no other.

Tokens are read from the server's copy of the herd, which the change stream keeps current: a request costs no round
trip, and a revocation reaches every server within milliseconds. A server that has lost Redis goes on with the copy it
has; it can change nothing then, and shows nothing newer than that copy.

How the server uses it:

1. `authenticate` for every path but `OPEN_PATHS`: 401 with `WWW-Authenticate: Bearer` on `Unauthorized`.
2. `check` before anything is read: 403 on `Forbidden`.
3. Of a change, `check_change` once old and new are known and before anything is stored.
4. `audit` when the answer is known; 401 and 403 too.
5. While a watch is open: `is_valid` whenever an `AccessToken` changed, and at `Identity.expires_at`; on False the watch
   ends at once.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Final, Protocol

from orchestrator.api.audit import Audit, Entry
from orchestrator.api.rights import NAMESPACES, Identity, beyond, is_allowed
from orchestrator.errors import Forbidden, Unauthorized
from orchestrator.resources import AccessToken, Resource
from orchestrator.resources.access_token import compare_with_nothing, name_in

OPEN_PATHS: Final = frozenset({"/healthz", "/readyz", "/version"})
"""What anybody may read. Prefixes count for nothing: `/healthz/x` is not open."""

GROUPS: Final = {
    "virtualmachines": "virtualization.deckhouse.io",
    "virtualmachineoperations": "virtualization.deckhouse.io",
    "virtualmachineclasses": "virtualization.deckhouse.io",
    "pods/eviction": "policy",
    "nodedrains": "vmherd.dev",
    "maintenances": "vmherd.dev",
    "rebalancepolicies": "vmherd.dev",
    "nodefencings": "vmherd.dev",
    "leases": "coordination.k8s.io",
}
"""API groups by resource; all others are in none."""


class Tokens(Protocol):
    """Where tokens are found; `store.Follower` is one."""

    def get(self, kind: type[AccessToken], key: str) -> AccessToken | None:
        """Give one, or None."""
        ...


class Access:
    """Decides for one server. Safe from several threads.

    Args:
        tokens: The server's copy of the herd, which must follow `AccessToken`.
        now: The time of day, to which tokens expire.
        audit: Where entries go.

    Attributes:
        now: As given.
    """

    def __init__(self, tokens: Tokens, now: Callable[[], datetime], audit: Audit) -> None:
        self._tokens = tokens
        self.now = now
        self._audit = audit

    def authenticate(self, authorization_header: str | None) -> Identity:
        """Say who asks.

        Args:
            authorization_header: The request's; None or empty: it has none.

        Raises:
            Unauthorized: There is no token in it, or one that is wrong, revoked or out of date. Which of these is not
                said, but of a token that is right and has expired.
        """
        scheme, _, text = (authorization_header or "").strip().partition(" ")
        text = text.strip()
        if not text or scheme.lower() != "bearer":
            raise Unauthorized("a bearer token is needed: `vmherd token create` makes one")
        name = name_in(text)
        token = self._tokens.get(AccessToken, name) if name is not None else None
        if token is None:
            compare_with_nothing(text)
        if token is None or not token.is_text(text):
            raise Unauthorized("the token is not valid: wrong, or revoked")
        if token.has_expired(self.now()):
            raise Unauthorized(f"token {token.name!r} has expired")
        return identity_of(token)

    def identify(self, name: str, uid: str) -> Identity | None:
        """Give who bears a token that was shown before; None when it is revoked or out of date.

        Args:
            name: Of the token.
            uid: Of its document.
        """
        token = self._tokens.get(AccessToken, name)
        if token is None or token.metadata.uid != uid or token.has_expired(self.now()):
            return None
        return identity_of(token)

    def check(self, identity: Identity, verb: str, resource: str, namespace: str | None) -> None:
        """Let a request pass, or not.

        Args:
            identity: Who asks.
            verb: `get`, `list`, `watch`, `create`, `update`, `patch` or `delete`.
            resource: In the plural, with its subresource: `pods/eviction`.
            namespace: None for what is in none, and for all namespaces at once. A request on one namespace is in
                that namespace.

        Raises:
            Forbidden: Says who may not do what, where.
        """
        if not is_allowed(identity, verb, resource, namespace or None):
            raise Forbidden(refusal(identity, verb, resource, namespace))

    def check_change(self, identity: Identity, verb: str, resource: str, old: Resource | None, new: Resource) -> None:
        """Let a change pass that `check` let pass as a request, or not: what it touches counts too.

        Args:
            identity: Who asks.
            verb: As of `check`.
            resource: As of `check`.
            old: As it is stored; None: it is created.
            new: As it would be.

        Raises:
            Forbidden: Says what it touches that takes another role.
        """
        why = beyond(identity, old, new)
        if why is not None:
            raise Forbidden(refusal(identity, verb, resource, new.metadata.namespace) + f": {why}")

    def is_valid(self, identity: Identity) -> bool:
        """Whether an identity still stands: its token is neither revoked nor out of date."""
        token = self._tokens.get(AccessToken, identity.name)
        return token is not None and token.metadata.uid == identity.uid and not token.has_expired(self.now())

    def audit(  # noqa: PLR0913 - a request is told whole, in one call
        self,
        identity: Identity | None,
        verb: str,
        resource: str,
        namespace: str | None,
        name: str,
        outcome: int,
        *,
        message: str = "",
        source: str = "",
        dry_run: bool = False,
    ) -> None:
        """Keep what was asked and what came of it. Returns at once.

        Args:
            identity: None: who asked is not known.
            verb: As of `check`.
            resource: As of `check`.
            namespace: As of `check`.
            name: Empty: of no single one. Of what was created with a generateName, the name that it got.
            outcome: The HTTP status of the answer.
            message: Of a refusal: what the answer said. Never a body: those hold secrets.
            source: The client's address.
            dry_run: Nothing was stored.
        """
        self._audit.take(
            Entry(
                at=self.now(),
                user=identity.name if identity is not None else "",
                role=identity.role.value if identity is not None else "",
                verb=verb,
                resource=resource,
                namespace=namespace or "",
                name=name,
                outcome=outcome,
                message=message,
                source=source,
                dry_run=dry_run,
            )
        )


def identity_of(token: AccessToken) -> Identity:
    """Give who bears a token."""
    spec = token.spec
    namespaces = frozenset(spec.namespaces) if spec.namespaces is not None else None
    return Identity(token.name, spec.role, namespaces, token.metadata.uid, spec.expires_at)


def group_of(resource: str) -> str:
    """Give the API group of a resource or of a part of one; empty for none."""
    return GROUPS.get(resource) or GROUPS.get(resource.partition("/")[0], "")


def refusal(identity: Identity, verb: str, resource: str, namespace: str | None) -> str:
    """Say who can't do what, in Kubernetes' manner, and where the role counts."""
    group = group_of(resource)
    inside = f'in the namespace "{namespace}"' if namespace and resource != NAMESPACES else "at the cluster scope"
    plural = resource.partition("/")[0] + (f".{group}" if group else "")
    return (
        f'{plural} is forbidden: User "{identity.name}" cannot {verb} resource "{resource}" in API group "{group}" '
        f"{inside} (its role is {identity.role}"
        + (" everywhere)" if identity.namespaces is None else f" in {', '.join(sorted(identity.namespaces))})")
    )


__all__ = ["OPEN_PATHS", "Access", "Audit", "Identity", "Tokens", "identity_of", "refusal"]

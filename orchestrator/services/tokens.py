"""Tokens for the API: made and revoked. A token's text is given once, to whoever makes it, and is kept nowhere."""

import secrets
from collections.abc import Sequence
from datetime import timedelta

from orchestrator.errors import Invalid
from orchestrator.planner.flow import Note
from orchestrator.resources import AccessToken, ObjectMeta, Role, new_metadata, parse
from orchestrator.resources.access_token import AccessTokenSpec, digest, token_text
from orchestrator.services.context import Context, add_notes, deciding

_SECRET_BYTES = 32
_MOST_DAYS = 3650


def create_token(
    ctx: Context, name: str, role: Role, namespaces: Sequence[str] | None = None, expires: timedelta | None = None
) -> tuple[AccessToken, str]:
    """Make a token.

    Args:
        ctx: To work with.
        name: Of the token, and so of whoever bears it, in the audit log.
        role: What it may do.
        namespaces: Where; None: everywhere, and with what is in no namespace.
        expires: After so long it is worth nothing; None: it stays until it is revoked.

    Returns:
        What was stored, and the token's text, which nothing can show again.

    Raises:
        AlreadyExists: One of that name is there.
        Invalid: The name or a namespace is not a DNS label, or the time is over already or longer than ten years.
    """
    if expires is not None and not timedelta(0) < expires <= timedelta(days=_MOST_DAYS):
        raise Invalid(f"spec.expiresAt: a token lasts longer than nothing and at most {_MOST_DAYS} days")
    at = ctx.store.now()
    meta = new_metadata(ObjectMeta(name=name), namespaced=False, now=at)
    text = token_text(meta.name, secrets.token_urlsafe(_SECRET_BYTES))
    fields = {"role": role, "namespaces": None if namespaces is None else sorted(set(namespaces))}
    spec = parse(AccessTokenSpec, {**fields, "sha256": digest(text)})
    token = AccessToken(metadata=meta, spec=spec.with_(expires_at=at + expires if expires is not None else None))
    batch = ctx.store.batch().create(token)
    where = "everywhere" if spec.namespaces is None else f"in {', '.join(spec.namespaces)}"
    until = f"until {token.spec.expires_at:%Y-%m-%d %H:%M} UTC" if token.spec.expires_at else "until it is revoked"
    add_notes(batch, (token,), (Note("TokenCreated", f"{spec.role} {where}, {until}"),), at)
    created = ctx.store.must_commit(batch)[0]
    return created, text  # type: ignore[return-value]


def revoke_token(ctx: Context, name: str) -> AccessToken:
    """Remove a token: it is worth nothing any more, and watches that were opened with it end.

    Raises:
        NotFound: No such token.
    """

    def decide() -> AccessToken:
        token = ctx.store.get(AccessToken, name)
        batch = ctx.store.batch().delete(token)
        add_notes(batch, (token,), (Note("TokenRevoked", "it is worth nothing any more"),), ctx.store.now())
        ctx.store.must_commit(batch)
        return token

    return deciding(decide)

"""`vmherd token create|revoke|list`: who may use the API. Works on Redis itself: whoever may do that needs no token."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from orchestrator.cli import terminal
from orchestrator.cli.acting import open_context
from orchestrator.cli.ages import UNKNOWN, age, duration
from orchestrator.cli.arguments import parse_duration
from orchestrator.cli.describe import grid
from orchestrator.cli.files import ToFile, private_file
from orchestrator.cli.output import AsDocument, Results, document
from orchestrator.cli.session import open_store
from orchestrator.cli.terminal import Failures
from orchestrator.errors import Conflict, NotFound
from orchestrator.resources import AccessToken, Role
from orchestrator.services.tokens import create_token, revoke_token

CREATE_EXAMPLES = """Examples:

$ vmherd token create alice --role admin

$ vmherd token create bob --role viewer --to-file bob.token

$ vmherd token create ci --role operator --namespace team-a --namespace team-b --expires 30d

$ vmherd kubeconfig --server https://api.example:8080 --token "$(vmherd token create bob --role viewer)"
"""
REVOKE_EXAMPLE = """Example:

$ vmherd token revoke ci
"""
LIST_EXAMPLE = """Example:

$ vmherd token list -o json
"""

token = typer.Typer(name="token", help="Make and revoke tokens for the API.", no_args_is_help=True)


@token.command("create", epilog=CREATE_EXAMPLES)
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of whoever bears it, as the audit log names them.")],
    role: Annotated[Role, typer.Option("--role", help="What it may do; docs/access.md has the table.")],
    namespaces: Annotated[
        list[str] | None,
        typer.Option("-n", "--namespace", metavar="NAME", help="Only there; may be given several times."),
    ] = None,
    expires: Annotated[
        float | None,
        typer.Option(
            "--expires", parser=parse_duration, metavar="DURATION", help="Worth nothing after so long: 30d, 12h."
        ),
    ] = None,
    to_file: ToFile = None,
    output: AsDocument = None,
) -> None:
    """Make a token, and print it. It can't be shown again."""
    lasts = timedelta(seconds=expires) if expires is not None else None
    with open_context() as ctx, private_file(to_file) as draft:
        made, text = create_token(ctx, name, role, namespaces or None, lasts)
        if draft is not None:
            draft.write_text(text + "\n")
    results, fields = Results(output), _fields(made, datetime.now(UTC))
    if to_file is None:
        results.add(text, **fields, token=text)
    else:
        results.add(f"token/{name} created", **fields, file=str(to_file))
    results.end()


@token.command("revoke", epilog=REVOKE_EXAMPLE)
def revoke(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Names of tokens.")],
    output: AsDocument = None,
) -> None:
    """Make tokens worth nothing, at once; watches that were opened with them end."""
    failures, results = Failures(), Results(output, is_list=True)
    with open_context() as ctx:
        for name in dict.fromkeys(names):
            try:
                revoke_token(ctx, name)
            except (Conflict, NotFound) as error:
                failures.add(str(error))
                continue
            results.add(f"token/{name} revoked", token=name, revoked=True)
    results.end()
    failures.end()


@token.command("list", epilog=LIST_EXAMPLE)
def list_(output: AsDocument = None) -> None:
    """Show all tokens, without their texts, which nobody has but those who were given them."""
    with open_store() as store:
        found = store.all(AccessToken)
    now = datetime.now(UTC)
    if output is not None:
        terminal.write(document([_fields(one, now) for one in found], output))
        return
    if not found:
        typer.echo("No tokens found.", err=True)
        return
    lines = grid(("NAME", "ROLE", "NAMESPACES", "EXPIRES", "AGE"), [_row(one, now) for one in found])
    terminal.write("\n".join(line.removeprefix("  ") for number, line in enumerate(lines) if number != 1))


def _fields(one: AccessToken, now: datetime) -> dict[str, Any]:
    """What a document has of a token: no digest."""
    spec, made_at = one.spec, one.metadata.creation_timestamp
    return {
        "name": one.name,
        "role": spec.role.value,
        "namespaces": list(spec.namespaces) if spec.namespaces is not None else None,
        "createdAt": made_at.isoformat(timespec="milliseconds") if made_at is not None else None,
        "expiresAt": spec.expires_at.isoformat(timespec="milliseconds") if spec.expires_at is not None else None,
        "expired": one.has_expired(now),
    }


def _row(one: AccessToken, now: datetime) -> tuple[str, ...]:
    spec = one.spec
    until = UNKNOWN
    if spec.expires_at is not None:
        until = "expired" if one.has_expired(now) else duration(spec.expires_at - now)
    where = ",".join(spec.namespaces) if spec.namespaces is not None else "*"
    return (one.name, spec.role.value, where, until, age(one.metadata.creation_timestamp, now))

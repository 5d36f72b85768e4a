"""`vmherd rebalance`, `vmherd explain`, `vmherd plan failure`: what the planner would do, does, and why."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from orchestrator.cli import terminal
from orchestrator.cli.acting import open_client
from orchestrator.cli.arguments import Namespace, parse_targets
from orchestrator.cli.output import AsDocument, Documents, document
from orchestrator.cli.progress import working
from orchestrator.cli.terminal import Failures, tell
from orchestrator.errors import Invalid
from orchestrator.planner.rebalance import Move, Plan
from orchestrator.resources import DEFAULT_NAMESPACE, RebalancePolicy, VirtualMachineOperation, make_key
from orchestrator.resources.rebalancing import EXPLANATION_ANNOTATION, REASON_ANNOTATION

REBALANCE_EXAMPLES = """Examples:

$ vmherd rebalance --dry-run

$ vmherd rebalance

$ vmherd rebalance --off

$ vmherd rebalance --set thresholds.cpu=75 --set maxMoves=4

$ vmherd rebalance --policy
"""
EXPLAIN_EXAMPLE = """Example:

$ vmherd explain vmop/rebalance-linux-vm-x7k2p
"""
FAILURE_EXAMPLES = """Examples:

$ vmherd plan failure node-1

$ vmherd plan failure --all
"""

plan = typer.Typer(name="plan", help="Say what would come of something, and do nothing.", no_args_is_help=True)


def rebalance(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be moved, and why.")] = False,
    on: Annotated[
        bool | None, typer.Option("--on/--off", help="Let it run by itself, or not.", show_default=False)
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the policy.", show_default=False),
    ] = None,
    policy: Annotated[bool, typer.Option("--policy", help="Show the policy.")] = False,
    output: AsDocument = None,
) -> None:
    """Put right where virtual machines are: first what breaks their rules, then nodes with too much reserved.

    It does so by itself, once in an interval, while it is on. Without an option, it is done now, on or off. The
    policy's hold is for its own scans: by hand a node is relieved at once.
    """
    wanted = dict(_change(text) for text in changes or ())
    if on is not None:
        wanted["enabled"] = on
    with open_client() as client:
        if wanted or policy:
            found = client.change_policy(wanted) if wanted else client.policy()
            _show_policy(found, output, is_changed=bool(wanted), is_wanted=policy)
            return
        made: list[VirtualMachineOperation] = []
        with working("plans what to move"):
            if dry_run:
                why, planned = client.plan_moves()
            else:
                why, planned, made = client.rebalance()
    if why:
        tell(f"nothing is moved now: {why}")
        raise typer.Exit(1)
    if output is not None:
        terminal.write(document(_as_data(planned, made), output))
        return
    _show(planned, is_dry=dry_run)
    for operation in made:
        terminal.write(f"virtualmachineoperation/{operation.name} created")


def explain(
    target: Annotated[str, typer.Argument(metavar="vmop/NAME", help="An operation.")],
    namespace: Namespace = DEFAULT_NAMESPACE,
    output: AsDocument = None,
) -> None:
    """Say why an operation was made: what was wrong, what it does about it, and what was found of other nodes."""
    kind, names = parse_targets(target, None, needs_name=True)
    if kind is not VirtualMachineOperation:
        raise typer.BadParameter("only a vmop can be explained")
    with open_client() as client:
        operation = client.get(VirtualMachineOperation, make_key(names[0], namespace))
    annotations = operation.metadata.annotations
    why = annotations.get(REASON_ANNOTATION, "a person, or another program, asked for it")
    text = annotations.get(EXPLANATION_ANNOTATION)
    move = _read_move(operation.name, text) if text is not None else None
    if output is not None:
        told = {
            "operation": operation.name,
            "type": operation.spec.type.value,
            "virtualMachine": operation.spec.virtual_machine_name,
            "priority": operation.priority.name.lower(),
            "why": why,
            "move": move and {"costMib" if field == "cost_mib" else field: value for field, value in move.items()},
            "phase": operation.status.phase.value,
            "message": operation.message,
        }
        terminal.write(document(told, output))
        return
    lines = {
        "Operation": f"{operation.name} ({operation.spec.type} of {operation.spec.virtual_machine_name})",
        "Priority": operation.priority.name.lower(),
        "Why": why,
    }
    if move is not None:
        lines["Move"] = f"from node {move['source']} to node {move['target']}"
        lines["Cost"] = f"{int(move['cost_mib']) / 1024:.1f} GiB to be sent"
        lines["Considered"] = str(move["considered"])
    lines["Now"] = f"{operation.status.phase}: {operation.message or 'nothing is said'}"
    width = max(len(name) for name in lines) + 2
    for name, value in lines.items():
        terminal.write(f"{name + ':':<{width}}{value}")


@plan.command("failure", epilog=FAILURE_EXAMPLES)
def failure(
    nodes: Annotated[list[str] | None, typer.Argument(metavar="NODE", show_default=False)] = None,
    every: Annotated[bool, typer.Option("--all", help="Each node, and each rack and zone.")] = False,
    output: AsDocument = None,
) -> None:
    """Say whether all protected virtual machines of a node would find a place elsewhere if it failed now.

    Ends with code 1 where one would not.
    """
    if bool(nodes) == every:
        raise typer.BadParameter("either NODE... or --all")
    failures = Failures()
    with open_client() as client, working("plans what would start where"):
        found = client.failures(nodes or [])
    for name, failure in found.items():
        line = f"{name}: {failure.message}"
        if failure.stranded:
            failures.add(line)
        elif output is None:
            terminal.write(line)
    if output is not None:
        told = [
            {
                "name": name,
                "nodes": list(failure.nodes),
                "protected": failure.protected,
                "stranded": {str(key): why for key, why in failure.stranded.items()},
            }
            for name, failure in found.items()
        ]
        terminal.write(document(told, output))
    failures.end()


def _change(text: str) -> tuple[str, object]:
    field, separator, value = text.partition("=")
    if not separator or not field:
        raise Invalid(f"--set {text!r}: FIELD=VALUE is wanted")
    try:
        return field, json.loads(value)
    except ValueError:
        return field, value


def _read_move(name: str, text: str) -> dict[str, Any]:
    try:
        move = json.loads(text)
        return {field: move[field] for field in ("source", "target", "cost_mib", "considered")}
    except (ValueError, KeyError, TypeError) as error:
        raise Invalid(f"vmop {name!r}: its annotation {EXPLANATION_ANNOTATION} can't be read") from error


def _show_policy(policy: RebalancePolicy, output: Documents | None, *, is_changed: bool, is_wanted: bool) -> None:
    if output is not None:
        terminal.write(document(policy.manifest(), output))
        return
    if is_changed:
        terminal.write(f"rebalancepolicy/{policy.name} configured")
    if not is_wanted:
        return
    for field, value in _flat(policy.spec.model_dump(mode="json", by_alias=True)):
        terminal.write(f"{field}={json.dumps(value)}")
    for what, why in policy.status.unresolved.items():
        terminal.write(f"unresolved: {what}: {why}")


def _as_data(found: Plan, made: Sequence[VirtualMachineOperation]) -> dict[str, Any]:
    return {
        "moves": [
            {
                "vm": str(move.vm),
                "source": move.source,
                "target": move.target,
                "cause": move.cause.value,
                "costMib": move.cost_mib,
                "why": move.why,
                "considered": move.considered,
                "after": list(move.after),
            }
            for move in found.moves
        ],
        "over": list(found.over),
        "unresolved": dict(found.unresolved),
        "isCut": found.is_cut,
        "operations": [operation.name for operation in made],
    }


def _flat(values: dict[str, object], prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name, value in values.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return found


def _show(found: Plan, *, is_dry: bool) -> None:
    if not found.moves and not found.unresolved:
        terminal.write("nothing to move: no rule is broken, and no node is over a threshold")
    for number, move in enumerate(found.moves):
        _show_move(number, move)
    if found.moves:
        gib = sum(move.cost_mib for move in found.moves) / 1024
        terminal.write(f"{len(found.moves)} moves, {gib:.1f} GiB" + (" (nothing was done)" if is_dry else ""))
    if found.is_cut:
        terminal.write("more is to be moved than one scan may (policy: maxMoves, maxGib)")
    for what, why in found.unresolved.items():
        terminal.write(f"unresolved: {what}: {why}")


def _show_move(number: int, move: Move) -> None:
    terminal.write(f"{number}. {move.vm}: {move.source} -> {move.target}, {move.cost_mib / 1024:.1f} GiB, {move.cause}")
    terminal.write(f"   {move.why}")
    terminal.write(f"   {move.considered}")
    if move.after:
        terminal.write(f"   after {', '.join(str(earlier) for earlier in move.after)}")

"""`vmherd fence` and `vmherd failover`: how nodes are fenced, what came of it, and what a person says of it."""

import getpass
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli import terminal
from orchestrator.cli.acting import open_client
from orchestrator.cli.output import AsDocument, Documents, Results, document
from orchestrator.cli.progress import working
from orchestrator.errors import Invalid
from orchestrator.resources import Node, NodeFencing, parse
from orchestrator.resources.fencing import Bmc, FencePhase, NodeFencingSpec
from orchestrator.store import keys

SET_EXAMPLES = """Examples:

$ vmherd fence set node-1 --agent fence_ipmilan --option ip=192.0.2.101 --option username=admin --option lanplus=1
  --password-file /etc/vmherd/bmc-node-1

$ vmherd fence set node-1 --enable

$ vmherd fence set node-1 --timeout 60 --attempts 5

$ vmherd fence set node-1 --no-bmc --disable
"""
TEST_EXAMPLE = """Example:

$ vmherd fence test node-1
"""
CONFIRM_EXAMPLE = """Example:

$ vmherd fence confirm node-1
"""
STATUS_EXAMPLE = """Examples:

$ vmherd fence status

$ vmherd fence status -o json
"""
DISARM_EXAMPLES = """Examples:

$ vmherd failover disarm --reason "switch maintenance"

$ vmherd failover arm --node node-1
"""

fence = typer.Typer(name="fence", help="Fence nodes: how, and what came of it.", no_args_is_help=True)
failover = typer.Typer(name="failover", help="Let nodes be fenced, or not.", no_args_is_help=True)

NodeName = Annotated[str, typer.Argument(metavar="NODE", help="The node's name.")]
OneNode = Annotated[str, typer.Option("--node", metavar="NODE", help="Of this node only.", show_default=False)]


@fence.command("status", epilog=STATUS_EXAMPLE)
def status(output: AsDocument = None) -> None:
    """Show how each node may be fenced, and what came of the last time."""
    with open_client() as client:
        nodes = {node.name: node for node in client.all(Node) if not node.spec.witness}
        fencings = {fencing.name: fencing for fencing in client.all(NodeFencing)}
        disarmed = client.disarmed()
    if output is not None:
        everywhere = disarmed.get(keys.DISARMED_ALL)
        found_all = [
            _fields(name, nodes.get(name), fencings.get(name), disarmed) for name in sorted({*nodes, *fencings})
        ]
        terminal.write(document({"disarmed": everywhere, "nodes": found_all}, output))
        return
    rows = [("NODE", "ENABLED", "BMC", "PHASE", "MESSAGE")]
    for name in sorted({*nodes, *fencings}):
        found = fencings.get(name) or NodeFencing.model_validate({"metadata": {"name": name}})
        labels = nodes[name].metadata.labels if name in nodes else {}
        said = found.status
        text = " ".join(part for part in (said.reason, said.message) if part)
        if said.deadline and said.phase.is_open:
            text = f"{text}; its watchdog's deadline does not count: {said.deadline}"
        if said.contradicted:
            text = f"contradicted: {said.contradicted}; {text}"
        if why := disarmed.get(name):
            text = f"disarmed: {why}; {text}".removesuffix("; ")
        bmc = found.spec.bmc.agent if found.spec.bmc else "-"
        rows.append((name, "yes" if found.is_enabled(labels) else "no", bmc, said.phase.value, text or "-"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        terminal.write("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]))
    if why := disarmed.get(keys.DISARMED_ALL):
        terminal.tell(f"failover is disarmed: {why} (vmherd failover arm)")


def _fields(name: str, node: Node | None, found: NodeFencing | None, disarmed: dict[str, str]) -> dict[str, Any]:
    fencing = found or NodeFencing.model_validate({"metadata": {"name": name}})
    return {
        "node": name,
        "enabled": fencing.is_enabled(node.metadata.labels if node is not None else {}),
        "inHerd": node is not None,
        "disarmed": disarmed.get(name),
        "spec": fencing.manifest()["spec"],
        "status": fencing.manifest().get("status", {}),
    }


@fence.command("set", epilog=SET_EXAMPLES)
def set_(  # noqa: PLR0913 - one option each
    name: NodeName,
    *,
    agent: Annotated[str, typer.Option(help="A fence agent, as it is installed.", show_default=False)] = "",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the agent's. No password.")
    ] = None,
    password_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the fencing workers read the password.")
    ] = None,
    password_env: Annotated[
        str, typer.Option(metavar="VARIABLE", help="Or a variable of theirs.", show_default=False)
    ] = "",
    timeout: Annotated[
        float | None,
        typer.Option(min=1, max=120, help="Seconds after which an agent is killed (20).", show_default=False),
    ] = None,
    attempts: Annotated[
        int | None,
        typer.Option(min=1, max=10, help="How often one fencing cuts the power (2).", show_default=False),
    ] = None,
    no_bmc: Annotated[bool, typer.Option("--no-bmc", help="Forget its BMC.")] = False,
    enable: Annotated[
        bool | None, typer.Option("--enable/--disable", help="Whether it may be fenced.", show_default=False)
    ] = None,
    leave_off: Annotated[
        bool | None,
        typer.Option("--leave-off/--power-on", help="What becomes of it afterwards.", show_default=False),
    ] = None,
    output: AsDocument = None,
) -> None:
    """Say how a node may be fenced. It may join later.

    What is given changes what is on record. With --agent the options and the password are those given, and no others.
    """
    options = {}
    for text in option or []:
        key, separator, value = text.partition("=")
        if not separator:
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE")
        options[key] = value
    given: dict[str, Any] = {"timeoutS": timeout, "attempts": attempts}
    given = {key: value for key, value in given.items() if value is not None}
    if password_file or password_env:
        given |= {"passwordFile": str(password_file or ""), "passwordEnv": password_env}
    if no_bmc and (agent or options or given):
        raise Invalid("--no-bmc: what is said of its BMC besides?")

    def change(old: NodeFencingSpec) -> NodeFencingSpec:
        new = old
        if agent or options or given:
            new = new.with_(bmc=_changed(old.bmc, agent, options, given))
        if no_bmc:
            new = new.with_(bmc=None)
        if enable is not None:
            new = new.with_(enabled=enable)
        if leave_off is not None:
            new = new.with_(afterwards="LeaveOff" if leave_off else "PowerOn")
        return new

    with open_client() as client:
        client.set_fencing(name, change)
    _say(output, f"nodefencing/{name} set", node=name, set=True)


def _changed(old: Bmc | None, agent: str, options: dict[str, str], given: dict[str, Any]) -> Bmc:
    """Give a BMC with what a person says of it; another agent has options and a password of its own."""
    if old is None and not agent:
        raise Invalid("--agent is missing: no BMC is on record whose options these could be")
    before = old.model_dump(by_alias=True) if old is not None else {}
    if agent:
        before = {key: before[key] for key in ("timeoutS", "attempts") if key in before}
        return parse(Bmc, {**before, "agent": agent, "options": options, **given})
    return parse(Bmc, {**before, "options": {**before["options"], **options}, **given})


@fence.command("test", epilog=TEST_EXAMPLE)
def try_power(name: NodeName, output: AsDocument = None) -> None:
    """Ask a node's BMC for the power state, from this machine (or the API's), and do nothing else."""
    with open_client() as client, working(f"asks the BMC of {name}"):
        power = str(client.test_power(name))
    _say(output, f"node/{name} power is {power}", node=name, power=power)


@fence.command("confirm", epilog=CONFIRM_EXAMPLE)
def confirm(
    name: NodeName,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    output: AsDocument = None,
) -> None:
    """Say that a lost node runs nothing any more: its virtual machines start elsewhere.

    If it does run them, they run twice, and their disks are destroyed. Look at its power first.
    """
    if not yes:
        typer.confirm(f"Is node {name} powered off, for certain? Its virtual machines start elsewhere", abort=True)
    with open_client() as client:
        found = client.find(NodeFencing, name)
        client.confirm_fencing(name, getpass.getuser())
    was = f" (was {found.status.phase})" if found and found.status.phase is not FencePhase.IDLE else ""
    _say(output, f"node/{name} fenced{was}", node=name, fenced=True)


@failover.command("disarm", epilog=DISARM_EXAMPLES)
def disarm(
    node: OneNode = "",
    reason: Annotated[str, typer.Option(help="For people.")] = "by a person",
    output: AsDocument = None,
) -> None:
    """Let nothing be fenced. A fencing under way comes to its end first."""
    with open_client() as client:
        is_deferred = client.disarm(node, reason)
    line = f"failover disarmed{f' for node/{node}' if node else ''}"
    _say(output, line, armed=False, node=node or None, reason=reason, fencingGoesOn=is_deferred)
    if is_deferred:
        terminal.tell("a fencing is under way: it goes on to its end")


@failover.command("arm", epilog=DISARM_EXAMPLES)
def arm(node: OneNode = "", output: AsDocument = None) -> None:
    """Let nodes be fenced again."""
    with open_client() as client:
        changed = client.arm(node)
    line = f"failover {'armed' if changed else 'is armed'}{f' for node/{node}' if node else ''}"
    _say(output, line, armed=True, node=node or None, changed=changed)


def _say(output: Documents | None, line: str, **fields: Any) -> None:
    results = Results(output)
    results.add(line, **fields)
    results.end()

"""`vmherd cordon`, `uncordon`, and `vmherd node`: how hosts join and leave the herd."""

from typing import Annotated, cast
from urllib.parse import quote, urlsplit, urlunsplit

import typer

from orchestrator.cli.acting import open_client, open_context
from orchestrator.cli.completion import complete_nodes
from orchestrator.cli.files import ToFile, private_file
from orchestrator.cli.output import AsDocument, Documents, Results
from orchestrator.cli.terminal import Failures, tell
from orchestrator.errors import Conflict, Invalid, NotFound, Refused
from orchestrator.resources import Node, parse
from orchestrator.resources.names import check_name
from orchestrator.resources.scheduling import Taint
from orchestrator.services.nodes import add_witness, check_no_witness, is_armed, remove_witness
from orchestrator.settings import settings
from orchestrator.store import Store, access
from orchestrator.store.connection import redis_errors

CORDON_EXAMPLE = """Example:

$ vmherd cordon node-1 node-2
"""
UNCORDON_EXAMPLES = """Examples:

$ vmherd uncordon node-1

$ vmherd uncordon node-1 --bring-back
"""
ENROLL_EXAMPLES = """Examples:

$ vmherd node enroll node-1 --to-file node-1.env

$ vmherd node enroll node-1 --address 192.0.2.1:6379

A machine without VMs, so that a herd of two nodes has a majority:

$ vmherd node enroll control-1 --witness --to-file witness.env
"""
LABEL_EXAMPLES = """Examples:

$ vmherd node label node-1 zone=a disk=ssd

$ vmherd node label node-1 disk-
"""
TAINT_EXAMPLES = """Examples:

$ vmherd node taint node-1 dedicated=databases:NoSchedule

$ vmherd node taint node-1 dedicated-
"""
EXPEL_EXAMPLE = """Example:

$ vmherd node expel node-1
"""

node = typer.Typer(name="node", help="Let hosts join the herd, and leave it.", no_args_is_help=True)

Nodes = Annotated[list[str], typer.Argument(metavar="NODE", help="Names of nodes.", autocompletion=complete_nodes)]


def cordon(nodes: Nodes, output: AsDocument = None) -> None:
    """Let no virtual machine start or land on nodes. What runs there stays, and can be evicted."""
    _set_unschedulable(nodes, output, unschedulable=True)


def uncordon(
    nodes: Nodes,
    bring_back: Annotated[
        bool | None,
        typer.Option(
            "--bring-back/--no-bring-back",
            help="Move home what their last drain moved; by default VMHERD_BRING_BACK says.",
            show_default=False,
        ),
    ] = None,
    output: AsDocument = None,
) -> None:
    """Let virtual machines start and land on nodes again. A drain ends: what has not begun is dropped."""
    _set_unschedulable(nodes, output, unschedulable=False, bring_back=bring_back)


def _set_unschedulable(
    nodes: list[str], output: Documents | None, *, unschedulable: bool, bring_back: bool | None = None
) -> None:
    done = "cordoned" if unschedulable else "uncordoned"
    failures, results = Failures(), Results(output, is_list=True)
    with open_client() as client:
        for name in dict.fromkeys(nodes):
            try:
                changed = client.set_unschedulable(name, unschedulable=unschedulable, bring_back=bring_back)
            except (NotFound, Conflict, Refused) as error:
                failures.add(str(error))
                continue
            line = f"node/{name} {done}" if changed else f"node/{name} already {done}"
            results.add(line, node=name, unschedulable=unschedulable, changed=changed)
    results.end()
    failures.end()


@node.command("enroll", epilog=ENROLL_EXAMPLES)
def enroll(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name under which the host joins.")],
    address: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="Where the host reaches Redis, if not as we do.", show_default=False),
    ] = "",
    to_file: ToFile = None,
    witness: Annotated[
        bool, typer.Option("--witness", help="It runs no VMs: it holds a lease and votes (vmherd run witness).")
    ] = False,
    output: AsDocument = None,
) -> None:
    """Give a host its Redis user, and print its environment file.

    The user may touch this host's keys only. Its password can't be shown again; enrolling again makes a new one.
    """
    _check_node_name(name)
    ours = settings().redis_url.get_secret_value()
    node_url(ours, address, name, "")  # refuse before anything is changed
    with open_context() as ctx:
        store = ctx.store
        known = access.user_name(name) in _users(store)
        if witness:
            add_witness(ctx, name)
        else:
            check_no_witness(ctx, name)
        with private_file(to_file) as draft:
            password = access.enroll(store.redis, name, is_witness=witness)
            environment = {"VMHERD_NODE": name, "VMHERD_REDIS_URL": node_url(ours, address, name, password)}
            text = "\n".join(f"{variable}={value}" for variable, value in environment.items())
            if draft is not None:
                draft.write_text(text + "\n")
        results, fields = Results(output), {"node": name, "witness": witness, "renewed": known}
        if to_file is None:
            results.add(text, **fields, environment=environment)
        else:
            results.add(f"node/{name} enrolled", **fields, file=str(to_file))
        results.end()
        if known:
            tell(f"node {name!r} was enrolled before: its former password no longer works")
        if not _survives_restart(store):
            tell("warning: this Redis has no aclfile: the user is gone when it restarts (see config/redis.conf)")


@node.command("expel", epilog=EXPEL_EXAMPLE)
def expel(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The host's name.")],
    force: Annotated[bool, typer.Option("--force", help="Though it is Ready, and may run virtual machines.")] = False,
    output: AsDocument = None,
) -> None:
    """Take a host's Redis user away, and close its connections."""
    _check_node_name(name)
    with open_context() as ctx:
        store = ctx.store
        found = store.find(Node, name)
        is_hypervisor = found is not None and not found.spec.witness
        if found is not None and found.is_ready and is_hypervisor and not force:
            raise Refused(f"node {name!r} is Ready: stop its agent and its heartbeat first, or use --force")
        if is_armed(ctx, name) and not force:
            why = (
                "its watchdog is armed, and would reset it: stop its heartbeat first (systemctl stop vmherd-heartbeat)"
            )
            raise Refused(f"node {name!r}: {why}, or use --force")
        if access.user_name(name) not in _users(store):
            raise NotFound(f"node {name!r} is not enrolled: Redis has no user {access.user_name(name)!r}")
        access.expel(store.redis, name)
        remove_witness(ctx, name)
    results = Results(output)
    results.add(f"node/{name} expelled", node=name, expelled=True)
    results.end()


@node.command("label", epilog=LABEL_EXAMPLES)
def label(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The node's name.")],
    labels: Annotated[list[str], typer.Argument(metavar="KEY=VALUE|KEY-", help="A minus removes a label.")],
    output: AsDocument = None,
) -> None:
    """Set or remove labels of a node, by which virtual machines and their classes choose where they run."""
    changes: dict[str, str | None] = {}
    for text in labels:
        key, separator, value = text.partition("=")
        removes = not separator and text.endswith("-")
        if not separator and not removes:
            raise typer.BadParameter(f"{text!r} is neither KEY=VALUE nor KEY-")
        changes[text[:-1] if removes else key] = None if removes else value
    with open_client() as client:
        changed = client.set_labels(name, changes)
    results = Results(output)
    results.add(f"node/{name} {'labelled' if changed else 'not changed'}", node=name, changed=bool(changed))
    results.end()


@node.command("taint", epilog=TAINT_EXAMPLES)
def taint(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The node's name.")],
    taints: Annotated[
        list[str], typer.Argument(metavar="KEY[=VALUE]:EFFECT|KEY[:EFFECT]-", help="A minus removes taints.")
    ],
    output: AsDocument = None,
) -> None:
    """Put taints on a node, or remove them: what does not tolerate them keeps off it.

    Effects are NoSchedule, PreferNoSchedule and NoExecute.
    """
    wanted, removed = [], []
    for text in taints:
        body, _, effect = text.removesuffix("-").partition(":")
        key, separator, value = body.partition("=")
        if text.endswith("-") and not separator:
            removed.append((key, effect))
        else:
            wanted.append(parse(Taint, {"key": key, "value": value, "effect": effect}))
    with open_client() as client:
        changed = client.set_taints(name, wanted, removed)
    results = Results(output)
    results.add(f"node/{name} {'tainted' if changed else 'not changed'}", node=name, changed=bool(changed))
    results.end()


def _check_node_name(name: str) -> None:
    try:
        check_name(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def node_url(ours: str, address: str, node_name: str, password: str) -> str:
    """Give the URL under which a node reaches the Redis that we reach under ours.

    Args:
        ours: The control plane's URL; its scheme (TLS or not), database and options are kept.
        address: `HOST:PORT` in place of its own; empty keeps that.
        node_name: Whose user it is.
        password: Of that user.

    Raises:
        Invalid: No other machine can reach ours, and no address was given; or the address is none.
    """
    parts = urlsplit(ours)
    user = f"{quote(access.user_name(node_name))}:{quote(password, safe='')}"
    if address:
        host_port = _check_address(address)
    elif parts.scheme == "unix":
        raise Invalid(f"a node can't reach {parts.path} of this machine: give --address HOST:PORT")
    elif _is_loopback(parts.hostname or "localhost"):
        raise Invalid(f"a node can't reach {parts.hostname or 'localhost'} of this machine: give --address HOST:PORT")
    else:
        host_port = parts.netloc.rpartition("@")[2]
    if parts.scheme == "unix":
        database = next((v for k, _, v in (o.partition("=") for o in parts.query.split("&")) if k == "db"), "0")
        return urlunsplit(("redis", f"{user}@{host_port}", f"/{database}", "", ""))
    return urlunsplit((parts.scheme, f"{user}@{host_port}", parts.path or "/0", parts.query, ""))


def _check_address(address: str) -> str:
    try:
        parts = urlsplit(f"//{address}")
        good = bool(parts.hostname) and parts.port is not None and parts.netloc == address and "@" not in address
    except ValueError:
        good = False
    if not good:
        raise Invalid(f"--address: {address!r} is not HOST:PORT")
    return address


def _is_loopback(host: str) -> bool:
    return host in {"localhost", "::1"} or host.startswith("127.")


def _users(store: Store) -> list[str]:
    with redis_errors(store.redis):
        return cast("list[str]", store.redis.acl_users())


def _survives_restart(store: Store) -> bool:
    with redis_errors(store.redis):
        return bool(cast("dict[str, str]", store.redis.config_get("aclfile")).get("aclfile"))

"""`vmherd up` and `vmherd down`: a whole herd on this machine, of real processes and simulated hosts.

It needs `redis-server` and nothing else: no root, no libvirt. VMs are created as a person creates them, through
admission, and started by the herd itself.
"""

import contextlib
import ctypes
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from orchestrator.cli import terminal
from orchestrator.cli.ages import span
from orchestrator.cli.arguments import Timeout
from orchestrator.cli.progress import working
from orchestrator.cli.simulated_herd import (
    DIRECTORY_VARIABLE,
    URL_VARIABLE,
    HerdDirectory,
    HerdSpec,
    default_directory,
)
from orchestrator.cli.terminal import tell
from orchestrator.cli.waiting import INTERRUPTED
from orchestrator.errors import Invalid, NotFound, WaitTimeout
from orchestrator.settings import settings

UP_EXAMPLES = """Examples:

$ vmherd up --simulated 3 --vms 12 --detach

$ vmherd get vm

$ vmherd sim power-off node-2

$ vmherd down

A herd of 100 nodes whose hosts' time runs ten times as fast, in the foreground (Ctrl-C ends it):

$ vmherd up --simulated 100 --vms 1000 --speed-up 10
"""
DOWN_EXAMPLE = """Example:

$ vmherd down
"""

_PR_SET_PDEATHSIG: Final = 1
_MOST_NODES: Final = 1000
_TEMPLATE: Final = (
    "<domain type='kvm'><os><type arch='x86_64' machine='q35'>hvm</type></os><devices>"
    "<interface type='network'><source network='default'/><model type='virtio'/></interface>"
    "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices></domain>"
)

Dir = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        metavar="DIRECTORY",
        help=f"Where it lives. Default: {DIRECTORY_VARIABLE}, else $XDG_STATE_HOME/vmherd/sim.",
        show_default=False,
    ),
]


def parse_memory(text: str) -> int:
    """Read `1Gi` or `512Mi` as MiB, >= 1.

    Raises:
        typer.BadParameter: It is something else.
    """
    match = re.fullmatch(r"(\d+)(Mi|Gi|Ti)", text)
    if match is None or int(match[1]) == 0:
        raise typer.BadParameter(f"{text!r} is not an amount of memory such as 512Mi or 1Gi")
    return int(match[1]) * {"Mi": 1, "Gi": 1024, "Ti": 1024**2}[match[2]]


Memory = Annotated[int, typer.Option("--memory", parser=parse_memory, metavar="SIZE", help="Of each VM.")]


@dataclass(frozen=True, slots=True)
class NodeSize:
    """CPUs and memory of a node."""

    cpus: int
    memory_mib: int


def parse_node_size(text: str) -> NodeSize:
    """Read `16x64Gi`.

    Raises:
        typer.BadParameter: It is something else.
    """
    cpus, by, memory = text.partition("x")
    if not by or not cpus.isdecimal() or int(cpus) == 0:
        raise typer.BadParameter(f"{text!r} is not a size such as 16x64Gi: CPUs and memory")
    return NodeSize(int(cpus), parse_memory(memory))


Size = Annotated[
    NodeSize,
    typer.Option("--node-size", parser=parse_node_size, metavar="CPUSxMEMORY", help="CPUs and memory of each node."),
]


@dataclass(frozen=True, slots=True)
class WantedVms:
    """The VMs that are to run.

    Attributes:
        count: How many.
        memory_mib: Of each.
    """

    count: int
    memory_mib: int

    def manifests(self) -> Iterator[dict[str, Any]]:
        """Write them as a person does."""
        spec = {
            "memory": {"size": f"{self.memory_mib}Mi"},
            "domainTemplate": _TEMPLATE,
        }
        kind = {"apiVersion": "virtualization.deckhouse.io/v1alpha2", "kind": "VirtualMachine"}
        for name in numbered("vm", self.count):
            yield {**kind, "metadata": {"name": name}, "spec": spec}


def numbered(word: str, count: int) -> tuple[str, ...]:
    """Give names whose order is that of their numbers: `vm-01` to `vm-12`."""
    width = len(str(count))
    return tuple(f"{word}-{number:0{width}}" for number in range(1, count + 1))


def up(
    simulated: Annotated[int, typer.Option(metavar="NODES", min=1, max=_MOST_NODES, help="Nodes of simulated hosts.")],
    vms: Annotated[int, typer.Option(metavar="COUNT", min=0, help="VMs to create and start.")] = 0,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when all is up; vmherd down ends it.")] = False,
    speed_up: Annotated[float, typer.Option(metavar="FACTOR", help="How much faster the hosts' time runs.")] = 1.0,
    memory: Memory = "1Gi",  # type: ignore[assignment] # typer parses defaults too
    node_size: Size = "16x64Gi",  # type: ignore[assignment]
    directory: Dir = None,
    timeout: Timeout = None,
) -> None:
    """Start a whole herd on this machine: all its processes, a Redis of its own, and simulated hosts.

    Ends with code 0 when all nodes are Ready and all VMs run.
    """
    if not 0 < speed_up < float("inf"):
        raise typer.BadParameter(f"--speed-up: {speed_up:g} is not more than 0")
    wanted = WantedVms(vms, memory)
    _check_fits(wanted, simulated, node_size)
    herd = HerdDirectory(directory or default_directory())
    spec = HerdSpec(numbered("node", simulated), speed_up, node_size.cpus, node_size.memory_mib, secrets.token_hex(16))
    began = time.monotonic()
    with _started(herd, spec, detach=detach) as supervisor:

        def check(state: str) -> None:
            if supervisor.poll() is not None:
                raise Invalid(f"the herd did not come up: {_last_words(herd)}")
            if timeout is not None and time.monotonic() - began >= timeout:
                raise WaitTimeout(f"the herd was not up after {span(timeout)} ({state}), and is down again")

        from orchestrator.cli.rising import wait_until_up  # noqa: PLC0415 - `down` needs none of it

        with _speaking_to(herd):
            wait_until_up(len(spec.nodes), list(wanted.manifests()), check)
        _tell_how_to_look(herd, spec, wanted, time.monotonic() - began, detach=detach)
        if not detach:
            code = supervisor.wait()
            raise NotFound(f"the herd's supervisor ended (code {code}): {_last_words(herd)}")


def down(directory: Dir = None) -> None:
    """End the simulated herd of this machine, and remove all that it left."""
    herd = HerdDirectory(directory or default_directory())
    with working("ends the herd's processes"):
        was_there = herd.stop()
    if not was_there:
        raise NotFound(f"no simulated herd runs in {herd.path}")
    terminal.write("the simulated herd is down")


def _check_fits(wanted: WantedVms, nodes: int, size: NodeSize) -> None:
    config = settings()
    usable = size.memory_mib - config.system_reserved_memory_mib
    most = max(0, usable // (wanted.memory_mib + config.memory_overhead_mib))
    most = min(most, int((size.cpus - config.system_reserved_cpus) * config.cpu_ratio))
    if wanted.count > most * nodes:
        raise Invalid(
            f"{wanted.count} VMs don't fit on {nodes} nodes, of which each takes {most}: see --memory and --node-size"
        )


# --- starting and ending ----------------------------------------------------------------------------------------------


@contextmanager
def _started(herd: HerdDirectory, spec: HerdSpec, *, detach: bool) -> Iterator["subprocess.Popen[bytes]"]:
    """Start the herd's supervisor; unless all goes well, and it is detached, the herd is ended."""
    lock = herd.make(spec)
    supervisor: subprocess.Popen[bytes] | None = None
    try:
        supervisor = _spawn(herd, lock, detach=detach)
        os.close(lock)
        yield supervisor
    except BaseException as error:
        # Once more by Ctrl-C would leave it half ended: `vmherd down` then does the rest.
        herd.stop()
        if supervisor is not None:
            supervisor.wait()
        if isinstance(error, KeyboardInterrupt):
            tell("the simulated herd is down")
            raise typer.Exit(INTERRUPTED) from None
        raise


def _spawn(herd: HerdDirectory, lock: int, *, detach: bool) -> "subprocess.Popen[bytes]":
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def end_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:
            os._exit(1)

    with (herd.logs / "supervisor.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli.supervisor", str(herd.path), str(lock)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(lock,),
            preexec_fn=None if detach else end_with_parent,  # noqa: PLW1509 - one thread, and one call
        )


def _last_words(herd: HerdDirectory) -> str:
    with contextlib.suppress(OSError):
        lines = (herd.logs / "supervisor.log").read_text().strip().splitlines()
        return lines[-1].removeprefix("vmherd: ") if lines else "it said nothing"
    return "its log is gone"


# --- coming up --------------------------------------------------------------------------------------------------------


@contextmanager
def _speaking_to(herd: HerdDirectory) -> Iterator[None]:
    """Let this process's settings name the herd's Redis."""
    before = os.environ.get(URL_VARIABLE)
    os.environ[URL_VARIABLE] = herd.redis_url
    settings.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del os.environ[URL_VARIABLE]
        else:
            os.environ[URL_VARIABLE] = before
        settings.cache_clear()


def _tell_how_to_look(herd: HerdDirectory, spec: HerdSpec, wanted: WantedVms, seconds: float, *, detach: bool) -> None:
    is_default = herd.path == default_directory().absolute()
    lines = [f"{len(spec.nodes)} nodes Ready, {wanted.count} VMs Running after {seconds:.1f} s."]
    if URL_VARIABLE in os.environ:
        lines.append(f"To speak to it: export {URL_VARIABLE}={shlex.quote(herd.redis_url)}")
    elif not is_default:
        lines.append(f"To speak to it: export {DIRECTORY_VARIABLE}={shlex.quote(str(herd.path))}")
    where = "" if is_default or DIRECTORY_VARIABLE in os.environ else f" --dir {shlex.quote(str(herd.path))}"
    lines.append("To look: vmherd get vm. Faults: vmherd sim --help. Logs: " + str(herd.logs))
    lines.append(f"To end it: vmherd down{where}." if detach else "Ctrl-C ends it.")
    terminal.write("\n".join(lines))

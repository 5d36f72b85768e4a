"""`vmherd sim`: what may befall the hosts and VMs of a simulated herd, and what people do behind its back."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from orchestrator.cli import terminal
from orchestrator.cli.output import AsDocument, document
from orchestrator.cli.simulated_herd import HerdDirectory, HerdSpec, default_directory
from orchestrator.cli.up import Dir
from orchestrator.errors import Invalid, NotFound
from orchestrator.resources import DEFAULT_NAMESPACE

EPILOG = """Examples:

$ vmherd sim power-off node-2

$ vmherd sim crash vm-01

$ vmherd sim hang node-1

$ vmherd sim heal
"""

sim = typer.Typer(
    help="Let something happen to the hosts and VMs of a simulated herd (vmherd up).",
    no_args_is_help=True,
    epilog=EPILOG,
)

Vm = Annotated[str, typer.Argument(metavar="VM", help="A VM's name, or NAMESPACE/NAME.")]
NodeName = Annotated[str, typer.Argument(metavar="NODE", help="A node's name.")]
Either = Annotated[str, typer.Argument(metavar="NODE|VM", help="A node's name, or else a VM's.")]
Times = Annotated[int, typer.Option(min=0, help="How often; 0: until vmherd sim heal.")]
Message = Annotated[str, typer.Option(help="The hypervisor's words.")]


def _herd(directory: Any) -> tuple[HerdDirectory, HerdSpec]:
    herd = HerdDirectory(directory or default_directory())
    spec = herd.spec
    if spec is None:
        raise NotFound(f"no simulated herd runs in {herd.path}: vmherd up --simulated 3 starts one")
    return herd, spec


def _node(spec: HerdSpec, name: str) -> str:
    if name not in spec.nodes:
        raise NotFound(f"the simulated herd has no node {name!r}: {', '.join(spec.nodes)}")
    return name


def _vm(name: str) -> str:
    return name if "/" in name else f"{DEFAULT_NAMESPACE}/{name}"


def _on_vm(directory: Any, fault: str, name: str, said: str, **more: Any) -> None:
    herd, _ = _herd(directory)
    herd.ask_world(fault=fault, arguments={"vm": _vm(name), **more})
    terminal.write(f"{name} {said}")


def _on_node(directory: Any, fault: str, name: str, said: str, **more: Any) -> None:
    herd, spec = _herd(directory)
    herd.ask_world(fault=fault, arguments={"host": _node(spec, name), **more})
    terminal.write(f"{name} {said}")


# --- nodes ------------------------------------------------------------------------------------------------------------


@sim.command("power-off", epilog="Example: vmherd sim power-off node-2")
def power_off(node: NodeName, directory: Dir = None) -> None:
    """Cut a node's power: its host, its VMs and its processes are gone at once."""
    herd, spec = _herd(directory)
    herd.ask_world(fault="power_off", arguments={"host": _node(spec, node)})
    herd.ask_supervisor(ask="power-off", node=node)
    terminal.write(f"{node} has no power")


@sim.command("shut-down", epilog="Example: vmherd sim shut-down node-2")
def shut_down(node: NodeName, directory: Dir = None) -> None:
    """Shut a node's host down as an operating system does: VMs are told to end, then the power goes."""
    herd, spec = _herd(directory)
    herd.ask_world(fault="shut_down", arguments={"host": _node(spec, node)})
    herd.ask_supervisor(ask="power-off", node=node)
    terminal.write(f"{node} is shut down")


@sim.command("power-on", epilog="Example: vmherd sim power-on node-2")
def power_on(node: NodeName, directory: Dir = None) -> None:
    """Give a node its power back: it boots, and its processes start."""
    herd, spec = _herd(directory)
    herd.ask_world(fault="power_on", arguments={"host": _node(spec, node)})
    herd.ask_supervisor(ask="power-on", node=node)
    terminal.write(f"{node} has power")


@sim.command("kill-daemon", epilog="Example: vmherd sim kill-daemon node-1")
def kill_daemon(node: NodeName, directory: Dir = None) -> None:
    """Kill a node's libvirtd; its VMs run on."""
    _on_node(directory, "kill_daemon", node, "has no daemon")


@sim.command("start-daemon", epilog="Example: vmherd sim start-daemon node-1")
def start_daemon(node: NodeName, directory: Dir = None) -> None:
    """Start it again."""
    _on_node(directory, "start_daemon", node, "has its daemon back")


@sim.command("slow", epilog="Example: vmherd sim slow node-1 3")
def slow(
    node: NodeName,
    seconds: Annotated[float, typer.Argument(min=0, max=3600, help="Added to each call, in the host's time.")],
    directory: Dir = None,
) -> None:
    """Let each call to a node's libvirtd take longer; 0 undoes it."""
    _on_node(directory, "slow", node, f"answers {seconds:g} s later", seconds=seconds)


@sim.command("hang", epilog="Example: vmherd sim hang node-1")
def hang(name: Either, directory: Dir = None) -> None:
    """Freeze a node's libvirtd, or a VM's QEMU, so that it answers nothing; heal undoes it."""
    _, spec = _herd(directory)
    if name in spec.nodes:
        _on_node(directory, "freeze_daemon", name, "hangs")
    else:
        _on_vm(directory, "freeze", name, "hangs")


@sim.command("heal", epilog="Example: vmherd sim heal node-1")
def heal(
    name: Annotated[str, typer.Argument(metavar="[NODE|VM]", help="All of it by default.", show_default=False)] = "",
    directory: Dir = None,
) -> None:
    """Undo hang, slow, fail-start and fail-migration."""
    herd, spec = _herd(directory)
    herd.ask_world(fault="heal", arguments={"key": name if not name or name in spec.nodes else _vm(name)})
    terminal.write(f"{name or 'all'} healed")


# --- VMs --------------------------------------------------------------------------------------------------------------


@sim.command("fail-start", epilog="Example: vmherd sim fail-start vm-01 --times 2")
def fail_start(
    vm: Vm,
    times: Times = 0,
    message: Message = "Cannot allocate memory",
    locked: Annotated[bool, typer.Option("--locked", help="As somebody else holds the lock on its image.")] = False,
    node: Annotated[str, typer.Option(metavar="NODE", help="On this node only.", show_default=False)] = "",
    directory: Dir = None,
) -> None:
    """Let coming starts of a VM fail."""
    _, spec = _herd(directory)
    here = _node(spec, node) if node else ""
    message = 'Failed to get "write" lock' if locked else message
    _on_vm(directory, "fail_start", vm, "will fail to start", times=times, message=message, host=here)


@sim.command("fail-migration", epilog="Example: vmherd sim fail-migration vm-01 --times 1")
def fail_migration(
    vm: Vm, times: Times = 0, message: Message = "QEMU unexpectedly closed the monitor", directory: Dir = None
) -> None:
    """Let coming migrations of a VM fail on their way."""
    herd, _ = _herd(directory)
    herd.ask_world(fault="fail_migration", arguments={"key": _vm(vm), "times": times, "message": message})
    terminal.write(f"{vm} will fail to migrate")


@sim.command("crash", epilog="Example: vmherd sim crash vm-01")
def crash(vm: Vm, directory: Dir = None) -> None:
    """Kill a VM's QEMU."""
    _on_vm(directory, "kill", vm, "crashed")


@sim.command("panic", epilog="Example: vmherd sim panic vm-01")
def panic(vm: Vm, directory: Dir = None) -> None:
    """Let the guest panic."""
    _on_vm(directory, "guest_panic", vm, "panicked")


@sim.command("poweroff", epilog="Example: vmherd sim poweroff vm-01")
def poweroff(vm: Vm, directory: Dir = None) -> None:
    """Let the guest power itself off."""
    _on_vm(directory, "guest_poweroff", vm, "powered itself off")


@sim.command("reboot", epilog="Example: vmherd sim reboot vm-01")
def reboot(vm: Vm, directory: Dir = None) -> None:
    """Let the guest reboot itself."""
    _on_vm(directory, "guest_reboot", vm, "rebooted itself")


@sim.command("destroy", epilog="Example: vmherd sim destroy vm-01")
def destroy(vm: Vm, directory: Dir = None) -> None:
    """Destroy a VM behind the herd's back, as virsh destroy does."""
    _on_vm(directory, "destroy", vm, "was destroyed")


@sim.command("pause", epilog="Example: vmherd sim pause vm-01")
def pause(vm: Vm, directory: Dir = None) -> None:
    """Pause a VM behind the herd's back, as virsh suspend does."""
    _on_vm(directory, "pause", vm, "was paused")


@sim.command("ignore-shutdown", epilog="Example: vmherd sim ignore-shutdown vm-01")
def ignore_shutdown(vm: Vm, directory: Dir = None) -> None:
    """Let the guest ignore, until its next start, that it is asked to power off."""
    _on_vm(directory, "ignore_shutdown", vm, "ignores that it is asked to power off")


# --- looking ----------------------------------------------------------------------------------------------------------


@sim.command("status", epilog="Example: vmherd sim status")
def status(directory: Dir = None, output: AsDocument = None) -> None:
    """Show what is true on the hosts, and the herd's processes."""
    herd, _ = _herd(directory)
    hosts, members = herd.ask_world(look=True)["hosts"], herd.ask_supervisor(ask="status")
    if not isinstance(hosts, dict) or not isinstance(members, list):
        raise Invalid("the simulated herd answers something else")
    if output is not None:
        terminal.write(document({"hosts": hosts, "processes": members}, output))
        return
    rows = [("HOST", "DAEMON", "RUNNING", "DOMAINS", "FAULTS")]
    for name, host in hosts.items():
        faults = [f"{frozen} hangs" for frozen in host["frozen"]]
        faults += [f"slow by {host['delay_s']:g} s"] if host["delay_s"] else []
        rows.append((name, host["daemon"], str(host["running"]), str(host["machines"]), ", ".join(faults)))
    terminal.write(_table(rows))
    rows = [("PROCESS", "PID", "RESTARTS", "", "")]
    rows += [(m["name"], str(m["pid"] or "-"), str(m["restarts"]), m["trouble"], "") for m in members]
    terminal.write("\n" + _table(rows))


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip() for r in rows
    )

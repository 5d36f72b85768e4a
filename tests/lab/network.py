"""The lab's network: one switch, and faults on the cables that lead to it.

Each member has a namespace and a cable (a veth pair) to a bridge in the switch's namespace. A host puts its end of the
cable, `eth0`, into a bridge of its own, `brvm`, which carries its address and its guests, so guests are reachable from
all members. The addresses are TEST-NET-1 and no namespace has a route out: nothing leaves, and labs don't meet.
"""

import shutil
from pathlib import Path

from tests.lab.cleanup import lab_lock
from tests.lab.namespaces import LabError, LabUnsupported, Namespace, command, namespace_name

CONTROL_ADDRESS = "192.0.2.1"
GUEST_BRIDGE = "brvm"
_CABLE = "eth0"
_SWITCH_BRIDGE = "switch"
_QUIETEN = """\
cd /proc/sys/net
for key in ipv6/conf/all/disable_ipv6=1 ipv6/conf/default/disable_ipv6=1 bridge/bridge-nf-call-iptables=0; do
    [ ! -e "${key%=*}" ] || echo "${key#*=}" >"${key%=*}"
done
"""


class Network:
    """The switch of one lab and the cables to it.

    Args:
        lab: The lab's name.
        logs: Folder of the log files.
    """

    def __init__(self, lab: str, logs: Path) -> None:
        self._lab = lab
        self._logs = logs
        self.switch = Namespace(namespace_name(lab, "switch"), logs)

    def up(self) -> None:
        """Make the switch."""
        _add_namespace(self.switch)
        _ip(self.switch, f"link add {_SWITCH_BRIDGE} type bridge forward_delay 0", f"link set {_SWITCH_BRIDGE} up")

    def member(self, who: str, address: str) -> Namespace:
        """Make a namespace with an address of its own right on the cable."""
        space = self._plugged(who, address)
        _ip(space, f"address add {address}/24 dev {_CABLE}")
        return space

    def host(self, who: str, address: str) -> Namespace:
        """Make a namespace whose address is on a bridge for guests."""
        space = self._plugged(who, address)
        # A MAC address of its own: a bridge otherwise takes the lowest of its ports', and changes it with each guest.
        last = int(address.rpartition(".")[2])
        _ip(
            space,
            f"link add {GUEST_BRIDGE} address 02:00:c0:00:02:{last:02x} type bridge forward_delay 0",
            f"link set {_CABLE} master {GUEST_BRIDGE}",
            f"link set {GUEST_BRIDGE} up",
            f"address add {address}/24 dev {GUEST_BRIDGE}",
        )
        return space

    def remove(self, who: str) -> None:
        """Remove a member's namespace and its cable; it must run no process."""
        command(["ip", "netns", "delete", namespace_name(self._lab, who)])
        # The kernel takes namespaces down in the background, and with this one the switch's end of the cable.
        _ip(self.switch, f"link delete {who}", check=False)

    def cut(self, who: str, *, silent: bool) -> None:
        """Cut a member's cable.

        Args:
            who: The member.
            silent: The cable stays plugged and loses everything, as when a switch further away fails. Otherwise
                the member sees its link go down.
        """
        _ip(self.switch, f"link set {who} nomaster" if silent else f"link set {who} down")

    def heal(self, who: str) -> None:
        """Undo `cut`, of either kind."""
        _ip(self.switch, f"link set {who} up", f"link set {who} master {_SWITCH_BRIDGE}")

    def shape(self, who: str, space: Namespace, *, rate_mbit: float | None, delay_ms: float) -> None:
        """Limit the rate of a member's cable, in each direction, and delay what it carries.

        Args:
            who: The member.
            space: Its namespace.
            rate_mbit: Megabits per second, or None for no limit.
            delay_ms: Added to each direction.

        Raises:
            LabUnsupported: A delay is asked for and the kernel has no netem.
        """
        if delay_ms > 0:
            rate = f" rate {rate_mbit}mbit" if rate_mbit else ""
            discipline = f"netem limit 20000 delay {delay_ms}ms{rate}"
        elif rate_mbit:
            # The bucket holds 10 ms, and at least one full segment as the kernel batches them (64 KiB).
            burst = max(65_536, int(rate_mbit * 1e6 / 8 / 100))
            discipline = f"tbf rate {rate_mbit}mbit burst {burst} latency 50ms"
        else:
            raise ValueError("shape: give a rate, a delay, or both")
        for place, device in ((space, _CABLE), (self.switch, who)):
            try:
                command(["tc", "-n", place.name, "qdisc", "replace", "dev", device, "root", *discipline.split()])
            except LabError as error:
                if "qdisc kind is unknown" in str(error):
                    raise LabUnsupported(f"this kernel has no {discipline.split()[0]}: {error}") from error
                raise

    def unshape(self, who: str, space: Namespace) -> None:
        """Undo `shape`; nothing happens if there is nothing to undo."""
        for place, device in ((space, _CABLE), (self.switch, who)):
            if "qdisc noqueue" not in command(["tc", "-n", place.name, "qdisc", "show", "dev", device, "root"]):
                command(["tc", "-n", place.name, "qdisc", "delete", "dev", device, "root"])

    def _plugged(self, who: str, address: str) -> Namespace:
        space = Namespace(namespace_name(self._lab, who), self._logs, address)
        _add_namespace(space)
        # The switch's end of the cable bears the member's name.
        _ip(
            self.switch,
            f"link add {who} type veth peer name {_CABLE} netns {space.name}",
            f"link set {who} master {_SWITCH_BRIDGE} up",
        )
        _ip(space, f"link set {_CABLE} up")
        return space


def drop_from(space: Namespace, address: str) -> None:
    """Make a member lose, without a word to anyone, all that `address` sends to it.

    Incoming packets only: a rule on outgoing ones would show as an error at the sender's system call, which no
    failure between two hosts does.

    Raises:
        LabUnsupported: iptables is not installed.
    """
    if shutil.which("iptables") is None:
        raise LabUnsupported("cutting two hosts off each other needs iptables")
    space.run(["iptables", "-I", "INPUT", "-s", address, "-j", "DROP"])


def accept_from(space: Namespace, address: str) -> None:
    """Undo `drop_from`; nothing happens if there is nothing to undo."""
    while space.run(["iptables", "-D", "INPUT", "-s", address, "-j", "DROP"], check=False).returncode == 0:
        pass


def _add_namespace(space: Namespace) -> None:
    with lab_lock():
        command(["ip", "netns", "add", space.name])
    _ip(space, "link set lo up")
    # No IPv6, whose own chatter would only be noise. And no netfilter for what a bridge forwards: each bridge asks for
    # it by default (where the kernel has it), and then rules of a host would catch its guests' traffic.
    space.run(["sh", "-c", _QUIETEN])


def _ip(space: Namespace, *lines: str, check: bool = True) -> None:
    try:
        command(["ip", "-n", space.name, "-batch", "-"], stdin="\n".join(lines) + "\n")
    except LabError:
        if check:
            raise

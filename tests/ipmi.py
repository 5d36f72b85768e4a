"""A BMC that speaks IPMI over LAN: OpenIPMI's ipmi_sim, whose power is a script's (reference: lab.md)."""

import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

from orchestrator.resources.fencing import Bmc
from tests.waiting import wait_until

_LAN = """\
name "bmc"
set_working_mc 0x20
  startlan 1
    addr {address} {port}
    priv_limit admin
    allowed_auths_callback none md2 md5 straight
    allowed_auths_user none md2 md5 straight
    allowed_auths_operator none md2 md5 straight
    allowed_auths_admin none md2 md5 straight
    guid a123456789abcdefa123456789abcdef
  endlan
  chassis_control "{script} 0x20"
  user 1 true "" "test" user 10 none md2 md5 straight
  user 2 true "admin" "{password}" admin 10 none md2 md5 straight
"""
_EMU = """\
mc_setbmc 0x20
mc_add 0x20 0 no-device-sdrs 0x23 9 8 0x9f 0x1291 0xf02 persist_sdr
sel_enable 0x20 1000 0x0a
mc_enable 0x20
"""
_SCRIPT = """\
#!/bin/sh
# ipmi_sim asks: 0x20 get power; 0x20 set power 0
shift
case "$1 $2" in
    "get power") echo "power:$(cat {state})" ;;
    "set power") echo "$3" > {state}; {hook} "$3" ;;
    "get "*) echo "$2:0" ;;
esac
"""


class SimulatedBmc:
    """One BMC; a context manager.

    Args:
        folder: For its files.
        program: ipmi_sim.
        address: Where it listens.
        port: UDP; by default a free one.
        hook: Command that is run with 0 or 1 when the power is switched.
        prefix: Command before it: `ip netns exec NAME`.
    """

    password = "bmc-secret"

    def __init__(
        self,
        folder: Path,
        program: Path,
        *,
        address: str = "127.0.0.1",
        port: int = 0,
        hook: str = ":",
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.address = address
        self.port = port or _free_port()
        self._state = folder / "power"
        self._folder = folder
        self._prefix = prefix
        self._process: subprocess.Popen[bytes] | None = None
        self._program = program
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "state").mkdir(exist_ok=True)
        self._state.write_text("1")
        script = folder / "chassis.sh"
        script.write_text(_SCRIPT.format(state=self._state, hook=hook))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        lan = _LAN.format(address=address, port=self.port, script=script, password=self.password)
        (folder / "lan.conf").write_text(lan)
        (folder / "bmc.emu").write_text(_EMU)

    def __enter__(self) -> "SimulatedBmc":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def power(self) -> str:
        """`1` or `0`."""
        return self._state.read_text().strip()

    @power.setter
    def power(self, value: str) -> None:
        self._state.write_text(value)

    def start(self) -> None:
        """Start it."""
        folder = self._folder
        words = ("-c", folder / "lan.conf", "-f", folder / "bmc.emu", "-s", folder / "state", "-n")
        log = (folder / "log").open("wb")
        self._process = subprocess.Popen(
            [*self._prefix, self._program, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        log.close()
        port = f"{self.port:04X} "
        process = self._process

        def listens() -> bool:
            assert process.poll() is None, f"ipmi_sim ended: {(folder / 'log').read_text()}"
            return port in Path(f"/proc/{process.pid}/net/udp").read_text()

        wait_until(listens, 20, "the BMC listens")

    def stop(self) -> None:
        """Stop it; whoever asks it gets no answer."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def config(self, **more: Any) -> Bmc:
        """Give how it is reached. A cipher is named, since ipmitool would ask ipmi_sim for its list for 10 s."""
        options = {"ip": self.address, "ipport": str(self.port), "username": "admin", "lanplus": "1", "cipher": "3"}
        return Bmc(agent="fence_ipmilan", options=options, **{"timeout_s": 20, **more})


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])

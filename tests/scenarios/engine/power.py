"""The hosts' BMCs, in simulated time: each cable leads to one host, which may not be the one that is meant."""

from typing import TYPE_CHECKING, Final

from orchestrator.fencing.agents import Answer, Power
from orchestrator.resources.fencing import Bmc
from orchestrator.services.fencing import set_fencing
from workers.hypervisor.simulated_spec import Daemon

if TYPE_CHECKING:
    from tests.scenarios.engine.run import Run

_AGENT_S: Final = 0.8
"""What a fence agent takes over a LAN."""


class PowerNetwork:
    """Reads and cuts the hosts' power.

    Args:
        run: Whose hosts they are.

    Attributes:
        problems: By host, why its BMC does not answer.
        hanging: Hosts whose BMCs take a connection, and say nothing.
        stuck: Hosts whose power stays on.
    """

    def __init__(self, run: "Run") -> None:
        self.problems: dict[str, str] = {}
        self.hanging: set[str] = set()
        self.stuck: set[str] = set()
        self._run = run

    def configure(self) -> None:
        """Say what `herd.yaml` says of fencing: `bmc: HOST` where the cable leads, `fencing: true`."""
        for name, given in self._run.herd["nodes"].items():
            said = given or {}
            if said.get("bmc") or said.get("fencing"):
                self.set_bmc(name, said.get("bmc", ""))

    def set_bmc(self, name: str, cable: str) -> None:
        """Enable a node's fencing, by the BMC whose cable leads to a host; empty: by none."""
        bmc = Bmc(agent="fence_simulated", options={"ip": cable}) if cable else None
        set_fencing(self._run.ctx, name, lambda spec: spec.with_(enabled=True, bmc=bmc))

    def is_listening(self, host: str, port: int) -> bool:
        """Whether a host's libvirt daemon takes connections."""
        found = self._run.world.hosts.get(host)
        is_up = found is not None and found.daemon in {Daemon.ANSWERS, Daemon.HANGS}
        return is_up and host not in self._run.network.cut

    def status(self, bmc: Bmc) -> Answer:
        """Read the power of the host to which the cable leads."""
        host = self._reach(bmc)
        if problem := self._problem(host, bmc):
            return Answer(Power.UNKNOWN, problem)
        return Answer(Power.OFF if self._run.world.host(host).daemon is Daemon.NO_POWER else Power.ON)

    def switch(self, bmc: Bmc, *, on: bool) -> str:
        """Switch it."""
        host = self._reach(bmc)
        if problem := self._problem(host, bmc):
            return problem
        if host in self.stuck:
            return ""
        self._run.timeline.tell(f"host/{host}", "power on" if on else "power off")
        if on:
            self._run.nodes[host].power_on()
        else:
            self._run.nodes[host].power_off()
        return ""

    def _reach(self, bmc: Bmc) -> str:
        self._run.schedule.wait(lambda: False, _AGENT_S)
        return bmc.options["ip"]

    def _problem(self, host: str, bmc: Bmc) -> str:
        if host in self.hanging:
            self._run.schedule.wait(lambda: False, bmc.timeout_s - _AGENT_S)
            return f"{bmc.agent} did not end within {bmc.timeout_s:g} s, and was killed"
        return self.problems.get(host, "")


__all__ = ["PowerNetwork"]

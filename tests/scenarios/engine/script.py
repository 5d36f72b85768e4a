"""What a scenario's script can do: one verb a line, with its words. `VERBS` is the list; later work adds to it.

end: 60
events:
  - {at: 0, do: evict a}
  - {at: 0, do: kill migrate@n1 after claim}
  - {at: 5, do: [power off n1, cordon n2]}
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from orchestrator.errors import VmherdError
from orchestrator.resources import OperationType, RunPolicy, VirtualMachine, make_key, parse
from orchestrator.resources.drain import DrainSpec
from orchestrator.resources.maintenance import MaintenanceSpec
from orchestrator.resources.scheduling import Affinity
from orchestrator.resources.vmop import MigrateTo
from orchestrator.services import drains, fencing, maintenances, operations, rebalancing, vms
from orchestrator.services.nodes import set_labels, set_unschedulable
from orchestrator.services.vms import update_vm
from tests.builders import keep_apart
from tests.scenarios.engine.mail import Fate
from tests.scenarios.engine.processes import Trap
from tests.scenarios.engine.run import Run

Verb = Callable[[Run, list[str]], None]
VERBS: dict[str, Verb] = {}
"""By the words with which a line begins; the longest that fits is meant. Each gets the words that follow."""


def verb(*names: str) -> Callable[[Verb], Verb]:
    """Add a verb, under one name or several."""

    def add(run: Verb) -> Verb:
        VERBS.update(dict.fromkeys(names, run))
        return run

    return add


class Script:
    """A scenario's script.

    Args:
        document: As `script.yaml` says.

    Attributes:
        end: Second at which the run ends.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.end = float(document["end"])
        self.events: list[tuple[float, str]] = []
        for event in document.get("events", []):
            lines = event["do"] if isinstance(event["do"], list) else [event["do"]]
            self.events += [(float(event["at"]), line) for line in lines]
        for _, line in self.events:
            find_verb(line)

    def put_on(self, run: Run) -> None:
        """Have all of it done at its time."""
        for second, line in self.events:
            run.at(second, lambda line=line: play_line(run, line))  # type: ignore[misc]


def find_verb(line: str) -> tuple[Verb, list[str]]:
    """Find what a line means.

    Raises:
        ValueError: Nothing.
    """
    words = line.split()
    for count in range(len(words), 0, -1):
        found = VERBS.get(" ".join(words[:count]))
        if found is not None:
            return found, words[count:]
    raise ValueError(f"the script says {line!r}; known are: {', '.join(sorted(VERBS))}")


def play_line(run: Run, line: str) -> None:
    """Do what a line says. What the herd refuses is told, and so can be expected."""
    run.timeline.tell("script", line)
    found, words = find_verb(line)
    try:
        found(run, words)
    except VmherdError as error:
        run.timeline.tell("script", f"refused: {error}")


# --- what people ask for ----------------------------------------------------------------------------------------------


def _ask(run: Run, kind: OperationType, words: list[str]) -> None:
    """`VM [to NODE] [force|no-force] [as NAME]`; the name is `evict-a` unless one is given."""
    vm, rest = words[0], words[1:]
    name = rest[rest.index("as") + 1] if "as" in rest else f"{kind.value.lower()}-{vm}"
    to = MigrateTo(node_name=rest[rest.index("to") + 1]) if "to" in rest else None
    force = True if "force" in rest else (False if "no-force" in rest else None)
    wanted = operations.new_operation(vm, kind, migrate=to, force=force)
    wanted = wanted.with_(metadata=wanted.metadata.with_(name=name, generate_name=""))
    run.timeline.name(name)
    operations.create_operation(run.ctx, wanted)


for _kind in OperationType:
    verb(_kind.value.lower())(lambda run, words, kind=_kind: _ask(run, kind, words))  # type: ignore[misc]


@verb("create")
def _create(run: Run, words: list[str]) -> None:
    """`VM`: of herd.yaml."""
    vms.create_vm(run.ctx, run.manifest(words[0]))


@verb("delete op")
def _delete_operation(run: Run, words: list[str]) -> None:
    """`NAME`: abort it."""
    operations.delete_operation(run.ctx, make_key(words[0], "default"))


@verb("delete vm")
def _delete_vm(run: Run, words: list[str]) -> None:
    vms.delete_vm(run.ctx, make_key(words[0], "default"))


@verb("set policy")
def _set_policy(run: Run, words: list[str]) -> None:
    """`VM POLICY`."""
    vm = run.store.get(VirtualMachine, make_key(words[0], "default"))
    update_vm(run.ctx, vm.with_(spec=vm.spec.with_(run_policy=RunPolicy(words[1]))))


@verb("cordon")
def _cordon(run: Run, words: list[str]) -> None:
    set_unschedulable(run.ctx, words[0], unschedulable=True)


@verb("uncordon")
def _uncordon(run: Run, words: list[str]) -> None:
    """`NODE [bring-back]`."""
    drains.uncordon(run.ctx, words[0], bring_back="bring-back" in words)


@verb("label")
def _label(run: Run, words: list[str]) -> None:
    """`NODE KEY=VALUE...`."""
    set_labels(run.ctx, words[0], dict(word.split("=", 1) for word in words[1:]))


@verb("drain")
def _drain(run: Run, words: list[str]) -> None:
    """`NODE [timeout SECONDS] [selector SELECTOR]`."""
    timeout_s = float(words[words.index("timeout") + 1]) if "timeout" in words else 0
    selector = words[words.index("selector") + 1] if "selector" in words else ""
    drains.begin(run.ctx, words[0], DrainSpec(requested_by="the script", selector=selector, timeout_s=timeout_s))


@verb("stop drain")
def _stop_drain(run: Run, words: list[str]) -> None:
    """`NODE`: as Ctrl-C does."""
    drains.cancel(run.ctx, words[0], "stopped by the script")


@verb("maintain")
def _maintain(run: Run, words: list[str]) -> None:
    """`NODE... [parallel N|auto] [reboots]`: as maintenance `m`; hooks are run by `hook` below."""
    nodes = [word for word in words if word in run.herd["nodes"]]
    number = words[words.index("parallel") + 1] if "parallel" in words else "1"
    spec = MaintenanceSpec(
        nodes=tuple(nodes),
        hook="true",
        parallel=0 if number == "auto" else int(number),
        reboots="reboots" in words,
        requested_by="the script",
    )
    maintenances.begin(run.ctx, "m", spec)


@verb("hook begins")
def _hook_begins(run: Run, words: list[str]) -> None:
    """`[by HOLDER]`: somebody claims the next hook."""
    holder = words[words.index("by") + 1] if "by" in words else "somebody"
    node = maintenances.claim_hook(run.ctx, "m", holder)
    run.timeline.tell("script", f"claimed {node or 'nothing'}")


@verb("hook ends")
def _hook_ends(run: Run, words: list[str]) -> None:
    """`NODE [by HOLDER] [code N]`."""
    holder = words[words.index("by") + 1] if "by" in words else "somebody"
    code = int(words[words.index("code") + 1]) if "code" in words else 0
    counts = maintenances.end_hook(run.ctx, "m", words[0], holder, code, "")
    if not counts:
        run.timeline.tell("script", f"the hook of {words[0]} does not count")


@verb("pause maintenance")
def _pause_maintenance(run: Run, words: list[str]) -> None:
    maintenances.pause(run.ctx, "m", "paused by the script")


@verb("resume maintenance")
def _resume_maintenance(run: Run, words: list[str]) -> None:
    maintenances.resume(run.ctx, "m")


@verb("stop maintenance")
def _stop_maintenance(run: Run, words: list[str]) -> None:
    maintenances.stop(run.ctx, "m", "stopped by the script")


@verb("evict pod")
def _evict_pod(run: Run, words: list[str]) -> None:
    """`VM`: as `kubectl drain` does for each."""
    drains.evict(run.ctx, run.store.get(VirtualMachine, make_key(words[0], "default")))


@verb("rebalance")
def _rebalance(run: Run, words: list[str]) -> None:
    """`on`, `off`, or `FIELD NUMBER` of the policy."""
    changes = {"enabled": words[0] == "on"} if words[0] in {"on", "off"} else {words[0]: int(words[1])}
    rebalancing.change_policy(run.ctx, changes)


@verb("keep apart")
def _keep_apart(run: Run, words: list[str]) -> None:
    """`APP VM...`: these VMs must not be on a node with one whose label `app` is so."""
    for name in words[1:]:
        vm = run.store.get(VirtualMachine, make_key(name, "default"))
        affinity = parse(Affinity, keep_apart(app=words[0])["affinity"])
        update_vm(run.ctx, vm.with_(spec=vm.spec.with_(affinity=affinity)))


# --- processes, messages, Redis ---------------------------------------------------------------------------------------


@verb("kill")
def _kill(run: Run, words: list[str]) -> None:
    """`PROCESS [for good] [before|after POINT]`."""
    process = run.processes.known(words[0])
    restart = None if "good" in words else 1.0

    def kill() -> None:
        run.processes.kill(process, restart_after_s=restart)

    moments = [word for word in words if word in {"before", "after"}]
    if not moments:
        kill()
        return
    point = words[words.index(moments[0]) + 1]
    run.processes.traps.append(Trap(process, moments[0], point, kill))


@verb("start process")
def _start_process(run: Run, words: list[str]) -> None:
    run.processes.start(run.processes.known(words[0]))


@verb("freeze process")
def _freeze_process(run: Run, words: list[str]) -> None:
    run.processes.freeze(words[0], frozen=True)


@verb("thaw process")
def _thaw_process(run: Run, words: list[str]) -> None:
    run.processes.freeze(words[0], frozen=False)


@verb("cut off")
def _cut_off(run: Run, words: list[str]) -> None:
    """`PROCESS|NODE`: from Redis."""
    run.processes.cut.add(words[0])


@verb("reconnect")
def _reconnect(run: Run, words: list[str]) -> None:
    run.processes.cut.discard(words[0])


def _fate(what: str) -> Verb:
    def choose(run: Run, words: list[str]) -> None:
        """`TASK [COUNT|SECONDS]`."""
        number = float(words[1]) if len(words) > 1 else 1
        is_delay = what == "delay"
        run.mail.fates.append(Fate(words[0], what, 1 if is_delay else int(number), number if is_delay else 0))

    return choose


for _what in ("lose", "double", "delay"):
    verb(_what)(_fate(_what))


@verb("redis down")
def _redis_down(run: Run, words: list[str]) -> None:
    run.server.kill()
    run.touched.all()


@verb("redis up")
def _redis_up(run: Run, words: list[str]) -> None:
    run.server.start()


@verb("redis restart")
def _redis_restart(run: Run, words: list[str]) -> None:
    _redis_down(run, words)
    _redis_up(run, words)


# --- fencing ----------------------------------------------------------------------------------------------------------


@verb("confirm")
def _confirm(run: Run, words: list[str]) -> None:
    """`NODE`: a person says that it is off."""
    fencing.confirm(run.ctx, words[0], "a person")


@verb("confirm wrongly")
def _confirm_wrongly(run: Run, words: list[str]) -> None:
    """`NODE VM`: a person says so of a host that lives, on which a VM runs: it runs twice until it is back."""
    run.invariants.excuse(run.uuid_of(words[1]))
    fencing.confirm(run.ctx, words[0], "a person")


@verb("disarm")
def _disarm(run: Run, words: list[str]) -> None:
    """`[NODE]`."""
    fencing.disarm(run.ctx, words[0] if words else "", "as the script says")


@verb("arm")
def _arm(run: Run, words: list[str]) -> None:
    """`[NODE]`."""
    fencing.arm(run.ctx, words[0] if words else "")


@verb("isolate")
def _isolate(run: Run, words: list[str]) -> None:
    """`NODE...`: from Redis and from its peers; its BMC has a network of its own."""
    for name in words:
        run.processes.cut.add(name)
        run.network.cut.add(name)


@verb("join")
def _join(run: Run, words: list[str]) -> None:
    """`NODE...`: the network is whole again."""
    for name in words:
        run.processes.cut.discard(name)
        run.network.cut.discard(name)


@verb("bmc fails")
def _bmc_fails(run: Run, words: list[str]) -> None:
    """`NODE WHY...`."""
    run.power.problems[words[0]] = " ".join(words[1:])


@verb("bmc hangs")
def _bmc_hangs(run: Run, words: list[str]) -> None:
    """`NODE`: its agent does not end, and is killed after its time."""
    run.power.hanging.add(words[0])


@verb("bmc answers")
def _bmc_answers(run: Run, words: list[str]) -> None:
    run.power.problems.pop(words[0], None)
    run.power.hanging.discard(words[0])


@verb("set bmc")
def _set_bmc(run: Run, words: list[str]) -> None:
    """`NODE HOST`: put the BMC on record whose cable leads to a host; it is read at once."""
    run.power.set_bmc(words[0], words[1])


@verb("bmc lies")
def _bmc_lies(run: Run, words: list[str]) -> None:
    """`NODE`: it says that the power goes, which stays on."""
    run.power.stuck.add(words[0])


# --- hosts and guests -------------------------------------------------------------------------------------------------


@verb("power off")
def _power_off(run: Run, words: list[str]) -> None:
    """`NODE [before|after POINT of PROCESS]`: of the node."""
    node = run.nodes[words[0]]
    if len(words) == 1:
        node.power_off()
        return
    moment, point, _, process = words[1:]

    def cut() -> None:
        run.schedule.at(run.schedule.now, node.power_off)  # the process that is at this point dies first, and alone
        run.processes.kill(process, restart_after_s=None)

    run.processes.traps.append(Trap(run.processes.known(process), moment, point, cut))


@verb("power on")
def _power_on(run: Run, words: list[str]) -> None:
    run.nodes[words[0]].power_on()


@verb("upgrade")
def _upgrade(run: Run, words: list[str]) -> None:
    """`NODE VERSION`: its QEMU; guests that run there go on with the old one. Its agent is started anew."""
    host = run.world.hosts[words[0]]
    host.spec = replace(host.spec, qemu=words[1])
    _kill(run, [f"agent@{words[0]}"])


@verb("shut down")
def _shut_down(run: Run, words: list[str]) -> None:
    """`NODE`: in an orderly way."""
    run.nodes[words[0]].shut_down()


@verb("start by hand")
def _start_by_hand(run: Run, words: list[str]) -> None:
    """`VM NODE INCARNATION`: a person starts a copy with virsh that bears this incarnation; it may run twice then."""
    run.invariants.excuse(run.uuid_of(words[0]))
    run.start_by_hand(words[0], words[1], int(words[2]))


def _fault(name: str) -> Verb:
    def cause(run: Run, words: list[str]) -> None:
        getattr(run.faults, name)(*(_word(run, word) for word in words))

    return cause


def _word(run: Run, word: str) -> str | float:
    """A VM's name becomes the one by which the hosts know it; an amount becomes a number."""
    if word in run.herd.get("vms", {}):
        return f"default/{word}"
    return float(word) if word.replace(".", "", 1).isdigit() else word


for _words, _name in {
    "kill daemon": "kill_daemon",
    "start daemon": "start_daemon",
    "freeze daemon": "freeze_daemon",
    "thaw daemon": "thaw_daemon",
    "slow": "slow",
    "lose reply": "lose_reply",
    "heal": "heal",
    "freeze vm": "freeze",
    "thaw vm": "thaw",
    "kill vm": "kill",
    "terminate vm": "terminate",
    "destroy vm": "destroy",
    "pause vm": "pause",
    "guest poweroff": "guest_poweroff",
    "guest reboot": "guest_reboot",
    "guest crash": "guest_panic",
    "guest ignores shutdown": "ignore_shutdown",
}.items():
    verb(_words)(_fault(_name))


def _failing(name: str) -> Verb:
    def cause(run: Run, words: list[str]) -> None:
        """`VM [times N] [on HOST]`."""
        times = int(words[words.index("times") + 1]) if "times" in words else 1
        more = {"host": words[words.index("on") + 1]} if "on" in words else {}
        getattr(run.faults, name)(str(_word(run, words[0])), times=times, **more)

    return cause


verb("fail start")(_failing("fail_start"))
verb("fail migration")(_failing("fail_migration"))


@verb("lock storage")
def _lock_storage(run: Run, words: list[str]) -> None:
    """`VM [times N]`: starts find that somebody else holds the lock on its image; without a number, until `heal VM`."""
    times = int(words[words.index("times") + 1]) if "times" in words else 0
    said = 'Failed to get "write" lock\nIs another process using the image [/srv/vm/a.qcow2]?'
    run.faults.fail_start(str(_word(run, words[0])), said, times=times)


def armed(run: Run) -> list[str]:
    """Say what was set to happen and did not: such a script shows less than it says."""
    traps = [f"kill {trap.process} {trap.moment} {trap.point}" for trap in run.processes.traps]
    return traps + [f"{fate.what} {fate.task} ({fate.count} more)" for fate in run.mail.fates]

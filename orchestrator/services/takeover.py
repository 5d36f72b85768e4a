"""Evidence is committed here, and nowhere else: the one commit after which a lost node's VMs may start elsewhere.

In one script call (`lua/commit.lua`) this Redis is the one on record, the herd is not in recovery, and the node's lease
is still the one that ran out; then the evidence is written, the boot that it is about may never renew again
(`taken-over`, rule 4), and its suspicion ends. A renewal that comes a moment earlier voids the evidence; one
that comes a moment later is refused. For the deadline of a watchdog the script counts the votes itself (rule 7).
"""

from dataclasses import dataclass

from orchestrator.lease import Lease, Suspicion
from orchestrator.planner.flow import Note
from orchestrator.planner.liveness import Glance
from orchestrator.queues import FENCING, Message, Task
from orchestrator.resources import Node, NodeFencing
from orchestrator.resources.fencing import Evidence, FenceLevel, FencePhase
from orchestrator.services.context import Context, add_notes
from orchestrator.store import Refusal, keys


@dataclass(frozen=True, slots=True)
class Vote:
    """What a deadline's evidence rests on besides the lease.

    Attributes:
        glance: At the Redis that was read.
        suspicion: That was acknowledged; None where the lease records `failsafe=off`, and no vote is needed (rule 11).
    """

    glance: Glance
    suspicion: Suspicion | None


def commit_evidence(
    ctx: Context,
    fencing: NodeFencing,
    lease: Lease | None,
    level: FenceLevel,
    text: str,
    *,
    vote: Vote | None = None,
) -> Refusal | None:
    """Commit the evidence that a node runs nothing any more.

    Args:
        ctx: To work with.
        fencing: The node's, as it was read; it has no evidence yet.
        lease: The node's, as it was read when it had run out; None: it has none.
        level: What gave the evidence.
        text: For people.
        vote: For the deadline, and only there.

    Returns:
        None when it is committed, and recovery on its way; otherwise why it is none.

    Raises:
        Conflict: The fencing was changed meanwhile.
    """
    at, name = ctx.now(), fencing.name
    node = ctx.store.find(Node, name)
    generation, sequence = lease.identity if lease is not None else ("", 0)
    boot_id = lease.boot_id if lease is not None else (node.status.boot_id if node is not None else "")
    evidence = Evidence(
        level=level,
        text=text,
        at=at,
        epoch=ctx.store.next_epochs(1)[0],
        generation=generation,
        sequence=sequence,
        boot_id=boot_id,
    )
    batch = ctx.store.batch().check("identity")
    batch.check("lease", name, generation, sequence, level is FenceLevel.DEADLINE)
    if vote is not None:
        batch.check("redis", vote.glance.run_id, vote.glance.replication_id)
        if vote.suspicion is not None:
            batch.check("field", keys.SUSPICIONS, name, vote.suspicion.text())
            batch.check("acknowledged", name, vote.suspicion.suspicion_id)
    new = fencing.with_status(
        phase=FencePhase.FENCED,
        since=at,
        reason=level.value,
        message=text,
        evidence=evidence,
        contradicted="",
        # What a person says is off is for that person to switch on.
        powered_off=fencing.status.powered_off and level is not FenceLevel.PERSON,
        generation=generation,
        sequence=sequence,
        boot_id=boot_id,
    )
    batch.put(fencing, new)
    batch.effect("SET", keys.taken_over(name), f"{boot_id or '-'} {generation or '-'}")
    batch.effect("HDEL", keys.SUSPICIONS, name)
    add_notes(batch, (node or new,), (Note("NodeFenced", f"evidence: {text}", warning=True),), at)
    batch.tell("fencing", node=name, phase=f"{fencing.status.phase} => {FencePhase.FENCED}", evidence=level.value)
    answer = ctx.store.commit(batch)
    if isinstance(answer, Refusal):
        return answer
    ctx.messenger.send(Message(Task.FAILOVER, FENCING, (name,)))  # reconcile does it as well
    return None

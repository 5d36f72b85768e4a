"""Liveness: all leases in one round trip; who is lost, whether that may be acted upon, and watchdogs' deadlines.

One object a process. What it knows of time it has read itself, by its own monotonic clock, from the Redis that still
answers: after whatever came between (`planner.liveness.interruption`) it begins anew, and so does a worker that was
restarted. Several run side by side (`services.lookout`): each counts for itself, and commits are made against what was
read. So whichever is first to see a thing does it, and the others find it done; suspicions are shared, as each counts
the acknowledgements by its own readings.

Here stand rules 6, 7, 9 and 11 of TAKEOVER.md as far as they need a clock; what needs one moment only is checked in the
commit itself (`services.takeover`). Nothing is restarted from here: evidence is, by `services.failover`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast
from uuid import uuid4

from orchestrator.errors import Conflict, StoreUnavailable
from orchestrator.lease import Lease, Membership, StoredLease, Suspicion, read_lease, read_membership, read_suspicion
from orchestrator.logs import logger
from orchestrator.planner.liveness import (
    LONGEST_GAP_S,
    Act,
    Ballot,
    Circumstances,
    Glance,
    Judgement,
    Lost,
    Watched,
    correlation,
    deadline_obstacle,
    interruption,
    judge,
    may_suspect,
    votes,
)
from orchestrator.queues import FENCING, Message, Task
from orchestrator.resources import Condition, Node, NodeFencing, find_condition
from orchestrator.resources.fencing import FenceLevel, FencePhase, is_enabled_by_label
from orchestrator.services import fencing
from orchestrator.services.context import Context, deciding, wake_grant
from orchestrator.services.herd import Herd
from orchestrator.services.inventory import put_node
from orchestrator.services.takeover import Vote, commit_evidence
from orchestrator.store import Refusal, keys
from orchestrator.store.connection import redis_errors

log = logger(__name__)

_SHORTEST_S = 0.1
"""Between two scans."""
_AFTER_S = 0.06
"""What is due is looked at so long after its moment: all limits are exceeded then (`planner.liveness`)."""
_VOTES_EVERY_S = 0.25
_VOTES_COME_S = 2.0
"""Members acknowledge a suspicion with their next heartbeats; for so long besides, and so often, that is looked for."""
_NOTICES_S = 1.0
"""A primary looks once a second whether its replicas are there."""
NO_MIN_REPLICAS = "Redis has replicas, and min-replicas-to-write is 0: one that was replaced may accept writes for ever"
_ASK_AGAIN_S = 10.0
"""A fencing that gave no evidence is tried again after this long."""


@dataclass(slots=True)
class _Read:
    """Something as this worker read it: since when (monotonic) it is as it is."""

    value: object
    since: float


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one round trip showed.

    Attributes:
        glance: At what, and when.
        leases: By node.
        agents: Their agents' signs of life.
        membership: As it is published.
        suspicions: That are open, by node.
        void: Suspicions that were opened at another Redis, or before this one restarted, by node (rule 9).
        disarmed: Why nothing is fenced, by node.
        is_replicated: This Redis has replicas, or was one before it was promoted.
        may_lose_writes: Likewise, and it does not wait for them (rule 9): it may go on alone for ever.
    """

    glance: Glance
    leases: Mapping[str, StoredLease | None]
    agents: Mapping[str, str]
    membership: Membership
    suspicions: Mapping[str, Suspicion]
    void: Mapping[str, Suspicion]
    disarmed: Mapping[str, str]
    is_replicated: bool
    may_lose_writes: bool


class Liveness:
    """Watches leases; keep one object a process."""

    def __init__(self, ctx: Context, herd: Herd) -> None:
        self.ctx = ctx
        self.herd = herd
        self._glance: Glance | None = None
        self._leases: dict[str, _Read] = {}
        self._agents: dict[str, _Read] = {}
        self._ballots: dict[str, _Read] = {}
        self._asked_at: dict[str, float] = {}
        self._quiet_since = 0.0
        self._wait_more_s = 0.0
        self._old_primary_until = float("-inf")
        self._unsafe = ""
        self._majority_since: float | None = None
        self._many_at = -math.inf
        self._due_at = math.inf

    def watch(self, period_s: float) -> None:
        """Look, and look again each time that something falls due before the next look is to be expected.

        A renewal (whose age counts from when it was read), a lease that runs out, or a vote that has stood long enough
        is noticed then, and not at the next period's begin.

        Args:
            period_s: From the begin of this call to that of the next one.
        """
        clock = self.ctx.clock
        until = clock.monotonic() + period_s
        self.scan()
        while self._due_at < until:
            clock.sleep(max(self._due_at - clock.monotonic(), _SHORTEST_S))
            self.scan()

    def scan(self) -> None:
        """Look at all leases once, and act on what they show."""
        self._due_at = math.inf
        nodes = {node.name: node for node in self.herd.follower.all(Node)}
        seen = self._look(sorted(nodes))
        self._note_interruption(seen)
        for name, suspicion in seen.void.items():  # whoever opened it: its acknowledgements count for nothing
            self._withdraw(name, suspicion)
        firsts = self._note_readings(seen)
        clock = seen.glance.clock
        watched = {name: self._watched(name, seen, clock) for name in nodes if name not in firsts}
        ttl = self.ctx.config.lease_ttl
        lost = {name for name, w in watched.items() if w.is_expired(ttl)}
        silent = lost | {name for name, w in watched.items() if w.is_late(self.ctx.config.timing)}
        members = seen.membership.members.keys() or nodes.keys()
        fresh = sum(name in watched and name not in lost for name in members)
        if 2 * fresh <= len(members):
            self._majority_since = None
        elif self._majority_since is None:
            self._majority_since = seen.glance.read_at
        for name, node in sorted(nodes.items()):
            if self._is_too_old(seen):
                return
            if name not in firsts:
                self._show(node, watched[name], is_lost=name in lost, seen=seen)
        labels = {name: node.metadata.labels for name, node in nodes.items()}
        herd = Circumstances(
            members=len(members),
            lost=len(lost),
            late=len(silent),
            quiet_s=clock - self._quiet_since,
            wait_more_s=self._wait_more_s,
            max_unhealthy=self.ctx.config.max_unhealthy,
            correlated=correlation(silent, labels, self.ctx.config.correlation_labels),
            many_ago_s=clock - self._many_at,
        )
        if herd.are_too_many(herd.late):
            self._many_at = seen.glance.read_at
        self._is_due_at(clock + min((s.lease.timing.heartbeat for s in seen.leases.values() if s), default=math.inf))
        for name in watched.keys() - lost:
            self._is_due_at(self._leases[name].since + watched[name].ttl(ttl))
        for name in sorted(lost):
            if self._is_too_old(seen):
                return
            self._act(nodes[name], watched[name], herd, seen)

    def _is_too_old(self, seen: _Seen) -> bool:
        """Whether this look took so long that what it read is acted upon no more: other workers have read later."""
        age_s = self.ctx.clock.monotonic() - seen.glance.read_at
        if age_s > LONGEST_GAP_S:
            log.warning("a look takes too long: the rest of it is left to the next one", age_s=round(age_s, 1))
        return age_s > LONGEST_GAP_S

    def _is_due_at(self, moment: float) -> None:
        self._due_at = min(self._due_at, moment + _AFTER_S)

    # --- reading ----------------------------------------------------------------------------------------------------

    def _look(self, names: list[str]) -> _Seen:
        clock = self.ctx.clock.monotonic()
        redis = self.ctx.store.redis
        with redis_errors(redis):
            pipe = redis.pipeline(transaction=False)
            pipe.time()
            pipe.info("server")
            pipe.info("replication")
            pipe.get(keys.MEMBERSHIP)
            pipe.hgetall(keys.SUSPICIONS)
            pipe.hgetall(keys.DISARMED)
            if names:
                pipe.mget([keys.lease(name) for name in names])
                pipe.mget([keys.agent(name) for name in names])
            answer = pipe.execute()
        read_at = self.ctx.clock.monotonic()
        seconds, micros = cast("tuple[int, int]", answer[0])
        server, replication = cast("dict[str, object]", answer[1]), cast("dict[str, object]", answer[2])
        glance = Glance(
            str(server["run_id"]), str(replication["master_replid"]), seconds + micros / 1e6, clock, read_at
        )
        has_replicas = int(cast("int", replication.get("connected_slaves", 0))) > 0
        # Where it was promoted, its replicas may be those that were cut off with the old primary.
        is_replicated = has_replicas or int(cast("int", replication.get("second_repl_offset", -1))) >= 0
        texts = cast("list[str | None]", answer[6]) if names else []
        signs = cast("list[str | None]", answer[7]) if names else []
        suspicions = {name: read_suspicion(text) for name, text in cast("dict[str, str]", answer[4]).items()}
        return _Seen(
            glance,
            {name: read_lease(text) for name, text in zip(names, texts, strict=True)},
            {name: sign or "" for name, sign in zip(names, signs, strict=True)},
            read_membership(cast("str | None", answer[3])),
            {name: suspicion for name, suspicion in suspicions.items() if suspicion.redis == glance.redis},
            {name: suspicion for name, suspicion in suspicions.items() if suspicion.redis != glance.redis},
            cast("dict[str, str]", answer[5]),
            is_replicated,
            is_replicated and "min_slaves_good_slaves" not in replication,
        )

    def _note_interruption(self, seen: _Seen) -> None:
        why = interruption(self._glance, seen.glance)
        before, self._glance = self._glance, seen.glance
        if not why:
            return
        # Of a worker that begins nobody knows what it missed: Redis may have failed over a moment ago.
        failed_over = seen.is_replicated if before is None else before.replication_id != seen.glance.replication_id
        log.info("liveness begins anew", why=why)
        for read in (self._leases, self._agents, self._ballots):
            read.clear()
        self._quiet_since, self._majority_since = seen.glance.read_at, None
        if failed_over:
            self._old_primary_until = seen.glance.read_at + self._failover_wait()
        # Whatever comes between, the old primary accepts writes no longer than that.
        self._wait_more_s = max(0.0, self._old_primary_until - seen.glance.read_at)

    def _failover_wait(self) -> float:
        """Give Q: as it is set, and no less than this Redis's own setting implies (rule 9)."""
        config, redis = self.ctx.config, self.ctx.store.redis
        try:
            with redis_errors(redis):
                lag = cast("dict[str, str]", redis.config_get("min-replicas-max-lag")).get("min-replicas-max-lag")
        except StoreUnavailable as error:
            log.warning("min-replicas-max-lag can't be read: VMHERD_REDIS_FAILOVER_WAIT counts", error=str(error))
            lag = None
        needed = float(lag) + _NOTICES_S if lag else 0.0
        if needed > config.redis_failover_wait:
            log.warning("VMHERD_REDIS_FAILOVER_WAIT is too short for min-replicas-max-lag", needed=needed)
        return max(config.redis_failover_wait, needed)

    def _is_unsafe(self, name: str, seen: _Seen) -> bool:
        """Whether a node is not taken over by a deadline, as a replaced Redis might go on for ever; said once."""
        why = NO_MIN_REPLICAS if seen.may_lose_writes else ""
        if why and why != self._unsafe:
            log.warning("nothing is taken over by a watchdog's deadline", why=why)
        self._unsafe = why
        found = self.herd.follower.get(NodeFencing, name)
        if found is not None and found.status.deadline != why:
            fencing.say_deadline(self.ctx, name, why)
        return bool(why)

    def _note_readings(self, seen: _Seen) -> set[str]:
        """Note since when leases and signs of life are as they are.

        Returns:
            Members that were read for the first time: nothing is known of them yet.
        """
        firsts = set()
        for name, stored in seen.leases.items():
            identity = stored.lease.identity if stored is not None else ("", 0)
            if name not in self._leases:
                firsts.add(name)
            _note(self._leases, name, identity, seen.glance.read_at)
            _note(self._agents, name, seen.agents[name], seen.glance.read_at)
        for gone in self._leases.keys() - seen.leases.keys():
            for read in (self._leases, self._agents, self._ballots):
                read.pop(gone, None)
            self._asked_at.pop(gone, None)
        return firsts

    def _watched(self, name: str, seen: _Seen, clock: float) -> Watched:
        stored, unchanged = seen.leases[name], clock - self._leases[name].since
        age = seen.glance.redis_s - stored.renewed_ms / 1000 if stored is not None else unchanged
        return Watched(name, stored.lease if stored is not None else None, unchanged, age)

    # --- acting -----------------------------------------------------------------------------------------------------

    def _show(self, node: Node, watched: Watched, *, is_lost: bool, seen: _Seen) -> None:
        """Write the condition LeaseFresh where it changed, and end a fencing whose node renewed.

        A node about which there is evidence may have booted and renew its lease; it is back only when
        `services.returning` has admitted it.
        """
        shown = find_condition(node.status.conditions, "LeaseFresh")
        found = self.herd.follower.get(NodeFencing, node.name)
        is_away = found is not None and found.status.phase.has_evidence
        if watched.unchanged_s <= 0 and watched.lease is not None:  # it was renewed since the scan before
            if not is_away and (shown is None or shown.status != "True"):
                self._write(node.name, fresh=True, message="")
            if found is not None and found.status.phase is not FencePhase.IDLE:
                fencing.end_renewed(self.ctx, node.name)
            if node.name in seen.suspicions:
                self._withdraw(node.name, seen.suspicions[node.name])
        elif is_lost and (shown is None or shown.status == "True"):
            self._write(node.name, fresh=False, message=f"its lease was not renewed for {watched.unchanged_s:.0f} s")

    def _act(self, node: Node, watched: Watched, herd: Circumstances, seen: _Seen) -> None:
        found = self.herd.follower.get(NodeFencing, node.name)
        if found is not None and found.status.phase.has_evidence:
            return
        name, lease = node.name, watched.lease
        timing = lease.timing if lease is not None else self.ctx.config.timing
        margin = max(timing.margin, self.ctx.config.takeover_margin or 0)
        lost = self._lost(node, watched, found, seen)
        is_open = found is not None and found.status.phase.is_open
        judgement = judge(lost, herd, timing, margin, is_open=is_open)
        if judgement.act is Act.FENCE and self._is_alive_otherwise(watched):
            message = "its heartbeat is dead, and its agent lives: it is not fenced"
            judgement = Judgement(Act.NOT_READY, "AgentAlive", message)
        if judgement.act is not Act.FENCE and not (is_open and judgement.reason == "FailoverDisarmed"):
            if not lost.is_witness:
                is_telling = not (judgement.act is Act.NOT_READY and lost.is_empty)
                fencing.say_suspect(self.ctx, name, judgement, lease, is_telling=is_telling)
            return
        if not is_open:
            fencing.begin(self.ctx, name, judgement.message, lease)
        if self._is_due(name, seen.glance.clock):
            self.ctx.messenger.send(Message(Task.FENCE, FENCING, (name,)))
        wait_s = timing.lease_ttl + margin + herd.wait_more_s
        self._seek_deadline(watched, seen, herd, margin=margin, wait_s=wait_s)

    def _lost(self, node: Node, watched: Watched, found: NodeFencing | None, seen: _Seen) -> Lost:
        labels = node.metadata.labels
        return Lost(
            watched,
            is_witness=node.spec.witness,
            is_cordoned=node.spec.unschedulable or node.is_shutting_down,
            is_empty=not self.herd.follower.index.get(keys.claims(node.name)),
            is_enabled=found.is_enabled(labels) if found is not None else is_enabled_by_label(labels),
            disarmed=seen.disarmed.get(keys.DISARMED_ALL, "") or seen.disarmed.get(node.name, ""),
        )

    def _is_alive_otherwise(self, watched: Watched) -> bool:
        """Whether a node without a watchdog has given a sign of life, though its heartbeat is dead.

        One whose lease can't be read may have none either; only a lease that says `armed` makes the agent's word void.
        """
        if watched.lease is not None and watched.lease.armed:
            return False
        ttl = watched.lease.timing.lease_ttl if watched.lease is not None else self.ctx.config.lease_ttl
        silent_s = self._leases[watched.name].since + watched.unchanged_s - self._agents[watched.name].since
        return bool(self._agents[watched.name].value) and silent_s < ttl / 2

    def _is_due(self, name: str, clock: float) -> bool:
        if clock - self._asked_at.get(name, float("-inf")) < _ASK_AGAIN_S:
            return False
        self._asked_at[name] = clock
        return True

    def _seek_deadline(
        self, watched: Watched, seen: _Seen, herd: Circumstances, *, margin: float, wait_s: float
    ) -> None:
        """Suspect it (rule 6), watch the vote, and take it over once its watchdog's deadline has passed (rule 7)."""
        name, lease = watched.name, watched.lease
        if lease is None or not lease.armed or self._is_unsafe(name, seen):
            return
        clock = seen.glance.clock
        majority_s = clock - self._majority_since if self._majority_since is not None else 0.0
        suspicion = seen.suspicions.get(name)
        if suspicion is not None and (suspicion.generation, suspicion.sequence) != lease.identity:
            self._withdraw(name, suspicion)
            suspicion = None
        if suspicion is None and lease.failsafe:
            if may_suspect(watched, majority_fresh_s=majority_s, quiet_s=herd.quiet_s, wait_s=wait_s):
                self._suspect(name, lease, seen.glance)
                self._is_due_at(clock + _VOTES_EVERY_S)
            return
        ballot = self._ballot(name, suspicion, seen)
        ack_wait = max(lease.timing.ack_wait, self.ctx.config.ack_wait or 0)
        reason, _ = deadline_obstacle(watched, ballot, seen.membership, margin=margin, ack_wait=ack_wait)
        if reason:
            self._look_again(watched, lease, clock, margin=margin, ack_wait=ack_wait)
            return
        found = self.ctx.store.find(NodeFencing, name)
        if found is None or not found.status.phase.is_open:
            return
        text = f"the deadline of its watchdog ({lease.watchdog or 'armed'}) has passed"
        if lease.failsafe:
            text += f", and {len(ballot.votes)} of {len(seen.membership.members)} members had agreed not to keep it up"
        vote = Vote(seen.glance, suspicion if lease.failsafe else None)
        try:
            refused = commit_evidence(self.ctx, found, lease, FenceLevel.DEADLINE, text, vote=vote)
        except Conflict:
            log.info("its fencing was changed meanwhile", node=name)  # another worker was first, or its BMC was
            return
        if refused is not None:
            log.warning("no takeover by deadline", node=name, check=refused.check, detail=refused.detail)

    def _look_again(self, watched: Watched, lease: Lease, clock: float, *, margin: float, ack_wait: float) -> None:
        """Note when the deadline may be evidence, as far as that is known by now."""
        timing, due = lease.timing, self._leases[watched.name].since + lease.timing.lease_ttl + margin
        if watched.name in self._ballots:
            due = max(due, self._ballots[watched.name].since + ack_wait)
        elif lease.failsafe:
            is_young = watched.unchanged_s < timing.lease_ttl + 2 * timing.heartbeat + _VOTES_COME_S
            due = clock + _VOTES_EVERY_S if is_young else -math.inf  # the next period is soon enough
        if due > clock:
            self._is_due_at(due)

    def _ballot(self, name: str, suspicion: Suspicion | None, seen: _Seen) -> Ballot:
        if suspicion is None:
            return Ballot(None)
        leases: dict[str, Lease | None] = {n: s.lease if s is not None else None for n, s in seen.leases.items()}
        found = votes(name, suspicion, leases, seen.membership)
        if not seen.membership.is_majority(len(found)):
            self._ballots.pop(name, None)
            return Ballot(suspicion, found)
        read = _note(self._ballots, name, suspicion.suspicion_id, seen.glance.read_at)
        return Ballot(suspicion, found, seen.glance.clock - read.since)

    def _suspect(self, name: str, lease: Lease, glance: Glance) -> None:
        """Open a suspicion of this lease, unless there is one or it was renewed; its id is random (rule 6)."""
        suspicion = Suspicion(uuid4().hex, *lease.identity, glance.redis)
        batch = self.ctx.store.batch().check("identity").check("lease", name, *lease.identity, True)
        batch.check("field", keys.SUSPICIONS, name, "")
        batch.effect("HSET", keys.SUSPICIONS, name, suspicion.text())
        batch.tell("suspect", node=name, suspicion=suspicion.suspicion_id)
        self.ctx.store.commit(batch)

    def _withdraw(self, name: str, suspicion: Suspicion) -> None:
        batch = self.ctx.store.batch().check("field", keys.SUSPICIONS, name, suspicion.text())
        batch.effect("HDEL", keys.SUSPICIONS, name).tell("suspicion ends", node=name)
        if isinstance(self.ctx.store.commit(batch), Refusal):
            log.info("suspicion had ended", node=name)

    def _write(self, name: str, *, fresh: bool, message: str) -> None:
        status: Literal["True", "False"] = "True" if fresh else "False"

        def decide() -> bool:
            old = self.ctx.store.find(Node, name)
            shown = find_condition(old.status.conditions, "LeaseFresh") if old is not None else None
            if old is None or (shown is not None and shown.status == status):
                return False  # another worker was first
            found = self.ctx.store.find(NodeFencing, name)
            if fresh and found is not None and found.status.phase.has_evidence:
                return False  # it came meanwhile
            condition = Condition(
                type="LeaseFresh",
                status=status,
                reason="Renewed" if fresh else "Expired",
                message=message,
            )
            batch = self.ctx.store.batch()
            put_node(batch, old, old, (condition,), self.ctx.now())
            self.ctx.store.must_commit(batch)
            return True

        if deciding(decide):
            wake_grant(self.ctx)


def _note(read: dict[str, _Read], name: str, value: object, clock: float) -> _Read:
    """Note that something is read as it is; give since when it is so."""
    known = read.get(name)
    if known is None or known.value != value:
        known = read[name] = _Read(value, clock)
    return known

"""The thread beside a call that blocks in the hypervisor: renews the grant, tells progress, hears an abort, and ends a
migration that has had its time.

It waits on the node's wake-ups, so an abort is heard at once; each second it tells how far the job is, which renews the
grant. When Redis is away it keeps trying: the migration itself needs no Redis, nor do its deadlines.
"""  # noqa: D205

import threading

from orchestrator import metrics
from orchestrator.errors import HypervisorError, OutcomeUnknown, StoreUnavailable
from orchestrator.logs import about, logger
from orchestrator.resources import NodeGrant
from orchestrator.store.node_store import NodeStore
from workers import clock
from workers.deadlines import Deadline, Deadlines
from workers.hypervisor.port import DomainState, Hypervisor, Job

log = logger(__name__)

_TELL_EVERY_S = 1.0
_ABORT_EVERY_S = 0.1
_RETRY_S = 0.5


class Watch:
    """Watches one grant while its call runs; a context manager.

    Before `begin` there is no job: an abort is heard, and nothing is asked of the hypervisor.

    Args:
        store: This node's.
        hypervisor: This node's.
        grant: As it was claimed.

    Attributes:
        timed_out: Which deadline the migration has reached, so that it is aborted; None if none.
        explanation: The same for people.
        post_copy: Whether it was switched to post-copy. Nothing can abort it then.
    """

    def __init__(self, store: NodeStore, hypervisor: Hypervisor, grant: NodeGrant) -> None:
        self.timed_out: Deadline | None = None
        self.explanation = ""
        self.post_copy = False
        self._store = store
        self._hypervisor = hypervisor
        self._grant = grant
        self._cancelled = grant.cancel
        self._deadlines: Deadlines | None = None
        self._figures: dict[str, int | bool] | None = None
        self._began_at = clock.monotonic()
        self._done = threading.Event()

    def __enter__(self) -> "Watch":
        """Begin to watch."""
        clock.begin(f"watch {self._grant.operation}", self._run)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop. The thread ends by itself within one wait; nothing of it can act any more."""
        self._done.set()

    def begin(self) -> bool:
        """Watch over the job that is begun now; False when an abort was asked for already.

        An abort that is heard after this was called is carried out as soon as there is a job.
        """
        grant = self._grant
        self._deadlines = Deadlines(grant.completion_timeout_s, grant.progress_timeout_s, clock.monotonic())
        return not self._cancelled

    def wait(self, seconds: float) -> None:
        """Wait, or return earlier when the watch ends."""
        clock.wait(self._done, seconds)

    @property
    def is_cancelled(self) -> bool:
        """Whether an abort was asked for."""
        return self._cancelled

    @property
    def _is_aborting(self) -> bool:
        return self._deadlines is not None and not self.post_copy and (self._cancelled or self.timed_out is not None)

    def _run(self) -> None:
        with about(vm=self._grant.vm, operation=self._grant.operation):
            self._follow()

    def _follow(self) -> None:
        last, told = "0-0", float("-inf")
        while not self._done.is_set():
            try:
                if not self._cancelled:
                    self._look()
            except StoreUnavailable as error:
                log.warning("watch lost Redis; the migration goes on", error=str(error))
            try:
                self._attend()
            except (HypervisorError, OutcomeUnknown) as error:
                log.warning("watch: the hypervisor does not answer", error=str(error))
                clock.wait(self._done, _RETRY_S)
                continue
            try:
                if clock.monotonic() - told >= _TELL_EVERY_S:
                    if self._figures is not None or clock.monotonic() - self._began_at >= _TELL_EVERY_S:
                        self._tell()  # else there is no news: that it began was told when the grant was claimed
                    told = clock.monotonic()
                last = self._store.wait_for_wake(last, _ABORT_EVERY_S if self._is_aborting else _TELL_EVERY_S)
            except StoreUnavailable as error:
                log.warning("watch lost Redis; the migration goes on", error=str(error))
                clock.wait(self._done, _RETRY_S)

    def _look(self) -> None:
        grant = self._store.grant(self._grant.operation)
        if grant is not None and grant.epoch == self._grant.epoch and grant.cancel:
            log.info("abort asked for", operation=self._grant.operation)
            self._cancelled = True

    def _attend(self) -> None:
        """Look at the job, and do what it has come to."""
        deadlines = self._deadlines
        if deadlines is None:
            return
        # First what may not wait: a hypervisor that does not answer takes some seconds to tell so.
        self._check_deadlines(deadlines)
        # True means "asked for" only, and False that there is no job yet (or any more): only the end of the call tells.
        if self._is_aborting and not self._done.is_set():
            self._hypervisor.abort(self._grant.uuid)
        job = self._hypervisor.job(self._grant.uuid)
        if job is None:
            return
        at = clock.monotonic()
        deadlines.look(job, at)
        if job.total_bytes > 0:
            self._figures = _figures(job, deadlines.stalled_s(at))
            metrics.show_migration(self._grant.vm, self._store.node, job)

    def _check_deadlines(self, deadlines: Deadlines) -> None:
        grant, at = self._grant, clock.monotonic()
        reached = deadlines.reached(at)
        if reached is None or self.timed_out or self.post_copy or self._cancelled or self._done.is_set():
            return
        if grant.post_copy and self._switch_over(reached):
            self.post_copy = True
            return
        why = {
            Deadline.COMPLETION: "it did not complete in its time",
            Deadline.PROGRESS: f"what is left to send did not shrink for {grant.progress_timeout_s} s",
        }[reached]
        self.timed_out, self.explanation = reached, f"aborted after {deadlines.elapsed_s(at):.0f} s: {why}"
        log.warning("migration is aborted", operation=grant.operation, vm=grant.vm, why=why)

    def _switch_over(self, reached: Deadline) -> bool:
        """Let the migration end by post-copy, and tell whether it does."""
        grant = self._grant
        domain = self._hypervisor.domain(grant.uuid)
        if domain is not None and domain.state is DomainState.POSTCOPY:
            return True  # an earlier worker's doing
        accepted = self._hypervisor.start_post_copy(grant.uuid)
        log.info("post-copy", operation=grant.operation, vm=grant.vm, deadline=reached.value, accepted=accepted)
        return accepted

    @property
    def figures(self) -> dict[str, int | bool] | None:
        """The job's last figures, as they are reported; None if it never had any."""
        return None if self._figures is None else {**self._figures, "post_copy": self.post_copy}

    def _tell(self) -> None:
        if not self._done.is_set():
            body = {"operation": self._grant.operation, "epoch": self._grant.epoch, "job": self.figures}
            self._store.report("Progress", body)


def _figures(job: Job, stalled_s: float) -> dict[str, int | bool]:
    return {
        "elapsed_ms": job.elapsed_ms,
        "total": job.total_bytes,
        "processed": job.processed_bytes,
        "remaining": job.remaining_bytes,
        "iteration": job.iteration,
        "throttle": job.throttle_percent,
        "stalled_ms": int(stalled_s * 1000),
    }

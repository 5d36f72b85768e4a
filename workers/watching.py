"""The thread beside a call that blocks in the hypervisor: renews the grant, tells progress, hears an abort.

It waits on the node's wake-ups, so an abort is heard at once; each second it tells how far the job is, which renews the
grant. When Redis is away it keeps trying: the migration itself needs no Redis.
"""

import threading
import time

from orchestrator.errors import HypervisorError, StoreUnavailable
from orchestrator.logs import logger
from orchestrator.resources import NodeGrant
from orchestrator.store.node_store import NodeStore
from workers.hypervisor.port import Hypervisor, Job

log = logger(__name__)

_TELL_EVERY_S = 1.0
_ABORT_EVERY_S = 0.1
_RETRY_S = 0.5


class Watch:
    """Watches one grant while its call runs; a context manager.

    Args:
        store: This node's.
        hypervisor: This node's.
        grant: As it was claimed.
        abortable: Whether an abort means anything (a start can't be aborted).
    """

    def __init__(self, store: NodeStore, hypervisor: Hypervisor, grant: NodeGrant, *, abortable: bool) -> None:
        self._store = store
        self._hypervisor = hypervisor
        self._grant = grant
        self._abortable = abortable
        self._cancelled = grant.cancel
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch {grant.operation}", daemon=True)

    def __enter__(self) -> "Watch":
        """Begin to watch."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop. The thread ends by itself within one wait; nothing of it can act any more."""
        self._done.set()

    def wait(self, seconds: float) -> None:
        """Wait, or return earlier when the watch ends."""
        self._done.wait(seconds)

    def _run(self) -> None:
        last, told = "0-0", 0.0
        while not self._done.is_set():
            try:
                if not self._cancelled:
                    self._look()
                if self._cancelled and self._abortable:
                    self._abort()
                if time.monotonic() - told >= _TELL_EVERY_S:
                    self._tell()
                    told = time.monotonic()
                wait = _ABORT_EVERY_S if self._cancelled and self._abortable else _TELL_EVERY_S
                last = self._store.wait_for_wake(last, wait)
            except StoreUnavailable as error:
                log.warning("watch lost Redis; the migration goes on", error=str(error))
                self._done.wait(_RETRY_S)
            except HypervisorError as error:
                log.warning("watch: the hypervisor does not answer", error=str(error))
                self._done.wait(_RETRY_S)

    def _look(self) -> None:
        grant = self._store.grant(self._grant.operation)
        if grant is not None and grant.epoch == self._grant.epoch and grant.cancel:
            log.info("abort asked for", operation=self._grant.operation)
            self._cancelled = True

    def _abort(self) -> None:
        # True means "asked for" only, and False that there is no job yet (or any more): only the end of the call tells.
        if not self._done.is_set():
            self._hypervisor.abort(self._grant.uuid)

    def _tell(self) -> None:
        job = self._hypervisor.job(self._grant.uuid) if self._abortable else None
        if not self._done.is_set():
            self._store.report(
                "Progress", {"operation": self._grant.operation, "epoch": self._grant.epoch, "job": _figures(job)}
            )


def _figures(job: Job | None) -> dict[str, int] | None:
    if job is None or job.total_bytes <= 0:
        return None
    return {
        "elapsed_ms": job.elapsed_ms,
        "total": job.total_bytes,
        "processed": job.processed_bytes,
        "remaining": job.remaining_bytes,
        "iteration": job.iteration,
        "throttle": job.throttle_percent,
    }

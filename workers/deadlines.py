"""When a migration has had its time: in all, and without any progress.

The time in all is the job's own, as the hypervisor counts it, so it goes on over the death of the worker that began
the job. Where the hypervisor does not answer it is counted on from its last answer.
"""

from enum import StrEnum

from workers.hypervisor.port import Job


class Deadline(StrEnum):
    """Which of the two."""

    COMPLETION = "completion"
    PROGRESS = "progress"


class Deadlines:
    """The deadlines of one migration. Times are those of one monotonic clock, in seconds.

    Args:
        completion_s: From the job's begin; 0: never.
        progress_s: Without what is left having shrunk from one look to the next; 0: never. One decrease, however
            small, begins it anew, so a busy guest usually meets the other deadline (the platform's rule).
        begun_at: When the migration was begun here, or found.
    """

    def __init__(self, completion_s: float, progress_s: float, begun_at: float) -> None:
        self._completion_s = completion_s
        self._progress_s = progress_s
        self._job_began_at = begun_at
        self._last: int | None = None
        self._shrunk_at = begun_at
        self._lowest: int | None = None
        self._lowest_at = begun_at

    def look(self, job: Job, at: float) -> None:
        """Take a look at the job into account."""
        self._job_began_at = min(self._job_began_at, at - job.elapsed_ms / 1000)
        if job.total_bytes <= 0:
            return  # it is being set up
        left = job.remaining_bytes
        if self._last is None or left < self._last:
            self._shrunk_at = at
        if self._lowest is None or left < self._lowest:
            self._lowest, self._lowest_at = left, at
        self._last = left

    def elapsed_s(self, at: float) -> float:
        """Since the job's begin."""
        return at - self._job_began_at

    def stalled_s(self, at: float) -> float:
        """Since what is left was last less than ever before."""
        return at - self._lowest_at if self._lowest is not None else 0

    def reached(self, at: float) -> Deadline | None:
        """Say which deadline the migration has reached."""
        if 0 < self._completion_s <= self.elapsed_s(at):
            return Deadline.COMPLETION
        if 0 < self._progress_s <= at - self._shrunk_at:
            return Deadline.PROGRESS
        return None

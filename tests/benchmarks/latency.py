"""From `evict()` to libvirt's job: how long the control plane takes to begin what it was asked for.

One blank machine goes from host to host on a quiet herd, one evict at a time. The begin is what the source's libvirtd
recorded (`joblog`). Between the evicts a Celery task that does nothing makes its round trips, on the same Redis and a
worker with the same options: what Celery and Redis take by themselves.
"""

import time

from tests.benchmarks.figures import Figure, Result, percentile, spread, typical
from tests.benchmarks.joblog import JobLog
from tests.benchmarks.noop import Yardstick
from tests.benchmarks.running import Bench
from tests.benchmarks.timeline import HerdLog, Moved, start_stages
from tests.lab.herd import LabHerd
from tests.lab.lab import Lab
from tests.lab.namespaces import LabError
from tests.waiting import wait_until

_WARM_UP = 6
_ROUND_TRIPS = 3
"""Of the yardstick, after each evict."""
_QUIET_S = 0.4
"""A rest after each evict, in which the reports on it are worked off."""
_TIMEOUT_S = 60.0


def run(bench: Bench) -> Result:
    """Measure it."""
    bench.say("latency: a lab of 3 hosts and one blank machine starts")
    with Lab(hosts=3) as lab, LabHerd(lab) as herd:
        guest = lab.blank("blank")
        yardstick = Yardstick(herd)
        herd.start_guests((guest, "h1"), up=False)
        log = JobLog(lab)
        called_at: list[float] = []
        returned_ms: list[float] = []
        moved: list[Moved] = []
        round_trips_ms: list[float] = []
        total = _WARM_UP + bench.samples
        for number in bench.track(range(total), total, "evicts of a blank machine"):
            began_at, began = time.time(), time.perf_counter()
            operation = herd.cluster.evict(guest.name)
            returned = (time.perf_counter() - began) * 1000
            operation.wait(_TIMEOUT_S)
            if operation.phase != "Completed":
                raise LabError(f"{operation.name} is {operation.phase}: {operation.message}")
            time.sleep(_QUIET_S)
            trips = [yardstick.round_trip_ms() for _ in range(_ROUND_TRIPS)]
            if number < _WARM_UP:
                continue
            job = wait_until(lambda since=began_at: log.job_of(guest.domain, since), 5, "libvirt's record")  # type: ignore[misc]
            called_at.append(began_at)
            returned_ms.append(returned)
            moved.append(Moved(operation.resource.key, job))
            round_trips_ms += trips
        stages = start_stages(HerdLog(lab.logs, called_at[0]), moved, called_at)
    times_ms = [(one.job.began_at - called) * 1000 for one, called in zip(moved, called_at, strict=True)]
    result = Result("latency", "from evict() to the begin of libvirt's job / a no-op Celery task's round trip")
    result.tables["time to begin"] = [
        Figure("evict() -> libvirt's job, p50", percentile(times_ms, 50), "ms", spread(times_ms, "ms")),
        Figure("evict() -> libvirt's job, p99", percentile(times_ms, 99), "ms"),
        Figure("no-op task, delay().get(), p50", percentile(round_trips_ms, 50), "ms", spread(round_trips_ms, "ms")),
        Figure("no-op task, delay().get(), p99", percentile(round_trips_ms, 99), "ms"),
        Figure("ratio p50", percentile(times_ms, 50) / percentile(round_trips_ms, 50), "x", "aim: at most 3"),
        Figure("ratio p99", percentile(times_ms, 99) / percentile(round_trips_ms, 99), "x", "aim: at most 3"),
    ]
    result.tables["stage by stage"] = [*stages, typical("(evict() itself, until it returns)", returned_ms, "ms")]
    result.raw = {"evict_to_job_ms": times_ms, "noop_ms": round_trips_ms}
    return result

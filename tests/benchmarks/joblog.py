"""libvirt's own record of its migration jobs: the source daemon's debug log, to the millisecond.

It is written by libvirtd when a job is taken and when it is given back, so it knows nothing of who asked, and costs
nothing that polling would.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.lab.host import LabHost
from tests.lab.lab import Lab
from tests.lab.namespaces import LabError

_LINE = re.compile(
    r"(?P<at>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3})\+0000: .* "
    r"(?P<what>Started|Stopping) async job: migration out \(.*name=(?P<domain>[^ )]+)"
)


@dataclass(frozen=True, slots=True)
class Job:
    """One outgoing migration job of a host; instants are of this machine's one clock, in seconds."""

    host: str
    domain: str
    began_at: float
    ended_at: float


class JobLog:
    """Has each host's libvirtd log its jobs from now on.

    Raises:
        LabError: A host's libvirtd can't be told to (virt-admin is missing).
    """

    def __init__(self, lab: Lab) -> None:
        self._files = {host.name: lab.logs / f"{host.name}-jobs.log" for host in lab.hosts}
        for host in lab.hosts:
            self._switch_on(host)

    def _switch_on(self, host: LabHost) -> None:
        # Its name differs between versions of libvirt.
        host.run(["virt-admin", "daemon-log-filters", "1:domainjob 1:domain_job"])
        host.run(["virt-admin", "daemon-log-outputs", f"3:stderr 1:file:{self._files[host.name]}"])

    def jobs(self, since: float = 0.0) -> list[Job]:
        """Give the jobs that have ended, by their begin.

        Args:
            since: Leave out those that began before.
        """
        found = [job for host, file in self._files.items() for job in _read(host, file)]
        return sorted((job for job in found if job.began_at >= since), key=lambda job: job.began_at)

    def job_of(self, domain: str, since: float) -> Job:
        """Give the first job of a domain since an instant; it must have ended.

        Raises:
            LabError: There is none.
        """
        for job in self.jobs(since):
            if job.domain == domain:
                return job
        raise LabError(f"libvirt recorded no migration of {domain}")


def _read(host: str, file: Path) -> list[Job]:
    jobs: list[Job] = []
    began: dict[str, float] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        if (match := _LINE.match(line)) is None:
            continue
        at = datetime.strptime(match["at"], "%Y-%m-%d %H:%M:%S.%f").replace(tzinfo=UTC).timestamp()
        if match["what"] == "Started":
            began[match["domain"]] = at
        elif match["domain"] in began:
            jobs.append(Job(host, match["domain"], began.pop(match["domain"]), at))
    return jobs

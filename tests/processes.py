"""The herd's real processes on a Redis of the tests: started as `vmherd run` starts them, killed and restarted."""

import os
import subprocess
import sys
from pathlib import Path

from tests.lab.supervised import Supervised
from tests.requirements import need_program

REPOSITORY = Path(__file__).parents[1]


def has_ended(pid: int) -> bool:
    """Whether a process runs no more; one that ended and was reaped by nobody yet (a zombie) has ended.

    Orphans become children of a test run that owns a lab (`tests.lab.reaper`), which reaps QEMUs only.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Processes:
    """Starts processes and stops them all at the end; a context manager.

    The kernel kills them when the test run ends in whatever way.

    Args:
        url: Of their Redis.
        folder: For their logs.
        environment: Besides this process's own.
    """

    def __init__(self, url: str, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.all: dict[str, Supervised] = {}
        self._environment = {
            **os.environ,
            "VMHERD_REDIS_URL": url,
            "VMHERD_LOG_FORMAT": "json",
            "VMHERD_STATE_DIR": str(folder / "state"),
            "PYTHONUNBUFFERED": "1",
            **environment,
        }

    def __enter__(self) -> "Processes":
        """Nothing runs yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop them all."""
        for process in self.all.values():
            process.hold()
            process.kill()
        for process in self.all.values():
            process.stop()

    def run(self, name: str, *words: str, **environment: str) -> Supervised:
        """Start `vmherd run` with these words, and again whenever it ends."""
        return self.start(name, "-m", "orchestrator.cli", "run", *words, **environment)

    def start(self, name: str, *arguments: str, **environment: str) -> Supervised:
        """Start Python with these arguments, and again whenever it ends."""
        setpriv = need_program("setpriv", "util-linux")

        def popen() -> "subprocess.Popen[bytes]":
            with self.log_file(name).open("ab") as log:
                return subprocess.Popen(
                    [setpriv, "--pdeathsig", "KILL", sys.executable, *arguments],
                    cwd=REPOSITORY,
                    env={**self._environment, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

        self.all[name] = Supervised(popen, name)
        return self.all[name]

    def log_file(self, name: str) -> Path:
        """Where a process writes."""
        return self.folder / f"{name}.log"

    def logs(self) -> str:
        """All that they wrote, for a test's message."""
        return "\n".join(f"--- {name}\n{self.log_file(name).read_text()[-3000:]}" for name in self.all)

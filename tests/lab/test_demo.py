"""`make demo` from end to end, as a person runs it into a file; and that it leaves nothing, also when cut short."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.cleanup import leftovers, processes, tear_down
from tests.lab.lab import require_lab
from tests.lab.namespaces import REPOSITORY
from tests.waiting import wait_until

NAME = "demotest"


class Demo:
    """A demo that runs in a process of its own, its output in a file."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._file = folder / "demo.txt"
        self._mark = f"demo-{os.getpid()}"
        with self._file.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.lab.demo", "--name", NAME, *arguments],
                cwd=REPOSITORY,
                env={**os.environ, "VMHERD_TEST_MARK": self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """What it has printed up to now."""
        return self._file.read_text()

    def wait_for(self, words: str, timeout: float = 240.0) -> None:
        """Wait until it prints something."""
        wait_until(
            lambda: words in self.text or self.process.poll() is not None,
            timeout,
            lambda: f"{words!r} in:\n{self.text}",
        )
        assert words in self.text, self.text

    def remains(self) -> list[str]:
        """What of it is still there, by the lab's own search and by the environment that its children inherit."""
        found = leftovers(NAME)
        for process in processes():
            try:
                environment = (process / "environ").read_bytes()
            except OSError:
                continue  # it has just gone
            if f"VMHERD_TEST_MARK={self._mark}".encode() in environment.split(b"\0"):
                found.append(f"process {process.name}: {(process / 'cmdline').read_bytes()!r}")
        return found


@pytest.fixture
def demos(tmp_path: Path) -> Iterator[Path]:
    """A folder for demos' output; whatever happens, none runs on after the test."""
    require_lab()
    yield tmp_path
    tear_down(NAME)


@pytest.mark.timeout(600)
def test_the_tour(demos: Path) -> None:
    demo = Demo(demos, "--exit")
    code = demo.process.wait(550)
    text = demo.text
    assert code == 0, text
    lines = [line.rstrip() for line in text.splitlines()]
    # The watch has the guest leave one node and run on another.
    seen = [line.removeprefix("│ ").split()[:3] for line in lines if line.startswith("│ linux-vm ")]
    assert [phase for _, phase, _ in seen] == ["Running", "Migrating", "Running"], text
    assert seen[0][2] == seen[1][2] != seen[2][2], text
    assert "  generateName: evict-linux-vm-" in lines
    assert "It stood still for" in text
    # Four evicts, of which a host sends one at a time.
    assert text.count(": Completed: runs on node") == 4, text
    assert "never more than 1 out of one host" in " ".join(text.split())
    # The abort left the guest where it was.
    assert "aborted; it runs on node" in text
    assert "It never left its node." in lines
    # Python, and Celery.
    assert any(line.startswith("web-2 is on h") for line in lines), text
    # How to play on.
    assert any(line.startswith("export VMHERD_REDIS_URL='unix://:") for line in lines), text
    assert any(line.startswith("http://127.0.0.1:") for line in lines), text
    assert "\x1b" not in text
    assert lines[-1].startswith("Everything was removed"), text
    assert demo.remains() == []


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("Redis: append-only file", signal.SIGINT),
        ("│ linux-vm   Migrating", signal.SIGINT),
        ("│ linux-vm   Migrating", signal.SIGKILL),
    ],
    ids=["SIGINT while it starts", "SIGINT in mid-migration", "SIGKILL in mid-migration"],
)
def test_cut_short_it_leaves_nothing(demos: Path, words: str, number: signal.Signals) -> None:
    demo = Demo(demos)
    demo.wait_for(words)
    demo.process.send_signal(number)
    code = demo.process.wait(60)
    if number is signal.SIGKILL:
        # Nobody is left to tidy up but the lab's watchdog and the kernel.
        wait_until(lambda: not demo.remains(), 60, lambda: f"nothing is left: {demo.remains()}")
        return
    assert code == 130, demo.text
    assert "Traceback" not in demo.text
    assert demo.text.splitlines()[-1].startswith("Everything was removed"), demo.text
    assert demo.remains() == []


@pytest.mark.timeout(60)
def test_a_lab_in_use_is_refused(demos: Path) -> None:
    first = Demo(demos)
    try:
        first.wait_for("3 hosts:")
        second = subprocess.run(
            [sys.executable, "-m", "tests.lab.demo", "--exit", "--name", NAME],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
        )
        assert second.returncode == 1
        assert f"has a lab {NAME}; take another name" in second.stderr
    finally:
        first.process.send_signal(signal.SIGINT)
        first.process.wait(30)
    assert first.remains() == []

"""The product with one behaviour broken on purpose, to show that a test would see it; and with other settings.

A mutant is a copy of the source tree in which exact lines are replaced. Where the product no longer has these lines,
`make_mutant` fails: a test of a mutant must not turn into a test of the product.
"""

import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.lab.herd import LabHerd
from tests.lab.namespaces import REPOSITORY


@dataclass(frozen=True)
class Edit:
    """Text that is in a file once, and what it is replaced by."""

    file: str
    old: str
    new: str


WITHOUT_CLUSTER_CAP = (
    Edit("orchestrator/planner/migration.py", "if 0 < work.cap <= work.migrating:", "if False:"),
    Edit(
        "orchestrator/store/lua/commit.lua",
        'if redis.call("SCARD", "slots:cluster") >= redis.call("SCARD", "schedulable") then',
        "if false then",
    ),
)
"""The herd's cap, in the plan and in the commit."""

WITHOUT_SOURCE_SLOT = (
    Edit(
        "orchestrator/planner/migration.py",
        "if nodes[source].outbound >= limits.outbound_per_node:",
        "if False:",
    ),
    Edit(
        "orchestrator/store/lua/commit.lua",
        'if redis.call("SCARD", "slots:outbound:" .. c[3]) >= c[5] then',
        "if false then",
    ),
    Edit("orchestrator/cli/run.py", 'threads = 1 if role == "migrate" else', 'threads = 4 if role == "migrate" else'),
)
"""One outbound migration a source: in the plan, in the commit, and in the node's worker, which takes one at a time."""


def make_mutant(folder: Path, edits: Sequence[Edit]) -> Path:
    """Copy the source tree into `folder` with these edits.

    Raises:
        AssertionError: The text of an edit is not in its file exactly once.
    """
    for package in ("orchestrator", "workers"):
        shutil.copytree(REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for edit in edits:
        file = folder / edit.file
        text = file.read_text()
        assert text.count(edit.old) == 1, f"{edit.file} has {text.count(edit.old)} times: {edit.old}"
        file.write_text(text.replace(edit.old, edit.new))
    return folder


@contextmanager
def replaced(
    herd: LabHerd,
    *names: str,
    source: Path | None = None,
    settings: dict[str, str] | None = None,
    fault: str = "",
) -> Iterator[None]:
    """Run some of a herd's processes from another source tree, with other settings or faults; then as they were.

    Args:
        herd: Up.
        names: Of its processes: `control`, `h1/migrate` and so on.
        source: The tree whose code they run.
        settings: Environment variables besides the herd's own, for example `VMHERD_BANDWIDTH_MIB_S`.
        fault: One of `faulty`.
    """
    kept = herd._source, herd._env
    herd._source, herd._env = source or kept[0], {**kept[1], **(settings or {})}
    try:
        _start_anew(herd, names, ["-m", "tests.lab.faulty", fault] if fault else None)
        yield
    finally:
        herd._source, herd._env = kept
        _start_anew(herd, names, None)


def _start_anew(herd: LabHerd, names: Sequence[str], entry: list[str] | None) -> None:
    old = [herd.processes.pop(name) for name in names]
    for process in old:
        process.hold()
        process.kill(signal.SIGTERM)  # all at once: each takes a moment to end
    for process in old:
        process.stop()
    for name in names:
        host, _, role = name.rpartition("/")
        if host:
            herd.start_node(host, role, entry)
        else:
            herd.start_control(name, entry)

"""Expectations are read strictly and compared strictly: what is missing, too much, or out of order is told."""

from pathlib import Path

import pytest

from tests.scenarios.engine.expected import read_expectations, unmet
from tests.scenarios.engine.timeline import Entry

STORY = [
    Entry(0.0, ("op/evict-a",), "Pending"),
    Entry(1.5, ("op/evict-a", "vm/a"), "event MigrationStarted: migrates from node n1 to n2"),
    Entry(9.2, ("vm/a",), "Running on n2, incarnation 1"),
    Entry(9.2, ("op/evict-a",), "Completed: runs on node n2"),
]
WARNING = Entry(12.0, ("op/b", "vm/b"), "warning AttemptFailed: no route to host", is_warning=True)
ENDS = [Entry(60.0, ("vm/a",), "Running on n2, incarnation 1")]


def problems(tmp_path: Path, text: str, entries: list[Entry] = STORY) -> list[str]:
    path = tmp_path / "expected.txt"
    path.write_text(text)
    return unmet(read_expectations(path), entries, ENDS)


@pytest.mark.parametrize(
    "text",
    [
        "0 op/evict-a Pending",
        "1 vm/a event MigrationStarted",
        "1.5 op/evict-a event MigrationStarted: ... to n2",
        "9-10 vm/a Running on n2",
        "- vm/a Running\n- op/evict-a Completed",
        "9 op/evict-a Completed\n9 vm/a Running",
        "1 vm/a event MigrationStarted\n1 op/evict-a event MigrationStarted",
        "0 op/evict-a Pending\nnever op/evict-a Pending\n9 vm/a Running",
        "never vm/b Running",
        "end vm/a Running on n2",
        "# a remark\n\n0 op/evict-a Pending",
    ],
)
def test_met(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0 op/evict-a InProgress", "not met"),
        ("2 vm/a event MigrationStarted", "it happened     1.500"),
        ("1.3 vm/a event MigrationStarted", "not met"),
        ("10-12 vm/a Running", "it happened     9.200"),
        ("- vm/a Running\n- op/evict-a Pending", "not met"),
        ("9 vm/a Running\n1 vm/a event MigrationStarted", "not met"),
        ("0 op/evict-a Pending\n0 op/evict-a Pending", "line 2"),
        ("9 vm/a Running on n", "not met"),
        ("9 vm/b Running on n2", "not met"),
        ("0 op/evict-a Pending\nnever vm/a Running", "happened"),
        ("end vm/a Running on n1", "not so at the end"),
    ],
)
def test_unmet(tmp_path: Path, text: str, told: str) -> None:
    assert told in "\n".join(problems(tmp_path, text))


def test_a_warning_has_to_be_expected(tmp_path: Path) -> None:
    entries = [*STORY, WARNING]
    assert "was not expected" in problems(tmp_path, "0 op/evict-a Pending", entries)[0]
    assert problems(tmp_path, "12 vm/b warning AttemptFailed", entries) == []


@pytest.mark.parametrize("text", ["", "# nothing\n", "soon vm/a Running", "0 vm/a", "1:30 vm/a Running"])
def test_what_is_no_expectation_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(AssertionError, match=r"expected\.txt"):
        problems(tmp_path, text)


def test_a_missing_file_is_refused_and_not_made(tmp_path: Path) -> None:
    path = tmp_path / "expected.txt"
    with pytest.raises(AssertionError, match="missing"):
        read_expectations(path)
    assert not path.exists()

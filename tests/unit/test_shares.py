"""`python -m tests`: nothing is left out, and what one share says of its tests is said of the whole."""

import signal
from pathlib import Path

import pytest

from tests.__main__ import INTERRUPTED, NO_TESTS, Run, everything, main, what_needs_no_root

QUIET = ("-q", "-p", "no:cacheprovider")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shares here load no plugins, and this process keeps its own signal handlers."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(signal, "signal", lambda *_: None)


def test_each_file_of_tests_is_in_one_share() -> None:
    given = [Path(word) for row in everything() for share in row for word in share]
    for file in Path("tests").rglob("test_*.py"):
        assert sum(file == path or path in file.parents for path in given) == 1, file
    assert [len(row) for row in what_needs_no_root()] == [1, 1, 1]


@pytest.mark.parametrize(
    ("bodies", "code"),
    [
        (("assert True", "assert True"), 0),
        (("assert True", "assert False"), 1),
        (("assert False", "pass"), 1),
        (("", "assert True"), 0),
        (("", ""), NO_TESTS),
    ],
)
def test_the_exit_code_is_that_of_whatever_failed(
    tmp_path: Path, bodies: tuple[str, ...], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for number, body in enumerate(bodies):
        file = tmp_path / f"test_{number}.py"
        file.write_text(f"def test_it():\n    {body}\n" if body else "")
        rows.append([(str(file),)])
    assert Run(rows, QUIET).run() == code
    last = ["", *capsys.readouterr().out.strip().splitlines()][-1]
    assert last.startswith("FAILED ") == (code == 1), "what failed is told once more, at the end"


def test_one_row_takes_what_the_other_has_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [tmp_path / f"test_{number}.py" for number in range(3)]
    for name in names:
        name.write_text("def test_it():\n    pass\n")
    run = Run([[(str(name),) for name in names], []], QUIET)
    assert run.run() == 0
    assert run.codes == [0, 0, 0]
    told = capsys.readouterr().out
    assert all(f"##### {name}" in told for name in names)


def test_after_an_interruption_nothing_begins(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("def test_it():\n    pass\n")
    run = Run([[(str(file),)]], QUIET)
    run.interrupt(2, None)
    assert run.run() == INTERRUPTED
    assert run.codes == []


def test_files_that_are_named_are_run_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("def test_it():\n    pass\n")
    assert main([str(file), *QUIET]) == 0
    assert "1 passed" in capsys.readouterr().out

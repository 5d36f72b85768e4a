"""In CI a skip of a test that leans on the machine fails the run."""

import pytest

pytest_plugins = ["pytester"]

TESTS = {
    "runs": "def test_it(): pass",
    "skipped": "import pytest\n@pytest.mark.lab\ndef test_it(): pytest.skip('no QEMU')",
    "skipped by mark": "import pytest\n@pytest.mark.lab\n@pytest.mark.skip(reason='flaky')\ndef test_it(): pass",
    "whole file": "import pytest\npytest.skip('no libvirt', allow_module_level=True)",
    "unmarked skip": "import pytest\ndef test_it(): pytest.skip('not on this Python')",
    "needs a program": """
import pytest
from tests.requirements import need_program
@pytest.mark.lab
def test_it(): need_program('no-such-program', 'no-such-package')
""",
}


@pytest.mark.parametrize(
    ("kind", "in_ci", "elsewhere"),
    [
        ("runs", 0, 0),
        ("skipped", 1, 0),
        ("skipped by mark", 1, 0),
        ("whole file", 1, 5),  # 5 is pytest's own: no test ran
        ("unmarked skip", 0, 0),
        ("needs a program", 1, 0),
    ],
)
@pytest.mark.parametrize("ci", ["true", ""])
def test_exit_code(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, kind: str, in_ci: int, elsewhere: int, ci: str
) -> None:
    monkeypatch.setenv("CI", ci)
    assert run(pytester, kind).ret == (in_ci if ci else elsewhere)


def test_ci_says_which_and_why(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    run(pytester, "skipped").stdout.fnmatch_lines(["*skipped, which CI does not allow*", "*::test_it: no QEMU"])


def run(pytester: pytest.Pytester, kind: str) -> pytest.RunResult:
    pytester.makeini("[pytest]\nmarkers =\n    lab: the lab\n")
    pytester.makepyfile(TESTS[kind])
    return pytester.runpytest_inprocess("-p", "tests.ci_rules", "-p", "no:hypothesispytest")

"""CI's rule: no test that leans on the machine may be skipped there, whatever for."""

from collections.abc import Generator

import pytest

from tests.requirements import MUST_RUN_IN_CI, is_ci


def pytest_configure(config: pytest.Config) -> None:
    """In CI, watch for skips."""
    if is_ci():
        config.pluginmanager.register(SkipsInCI())


class SkipsInCI:
    """Fails the run when a test that leans on the machine was skipped, by whatever means."""

    def __init__(self) -> None:
        self.skipped: dict[str, str] = {}
        """Reasons by test, or by file where the whole file was skipped."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Notice a skipped test with one of the marks."""
        report = yield
        if report.skipped and not hasattr(report, "wasxfail"):
            marks = [name for name in MUST_RUN_IN_CI if item.get_closest_marker(name)]
            if marks:
                self.skipped[item.nodeid] = _reason(report)
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Notice a file that skips itself; its tests' marks are unknown, so none may."""
        if report.skipped:
            self.skipped[report.nodeid] = _reason(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Turn success, and the code for a run without a test, into failure."""
        if self.skipped and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say which, and why."""
        if not self.skipped:
            return
        terminalreporter.section("skipped, which CI does not allow", red=True)
        for test, reason in sorted(self.skipped.items()):
            terminalreporter.line(f"{test}: {reason}")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    match report.longrepr:
        case (_, _, str(reason)):
            return reason.removeprefix("Skipped: ")
        case other:
            return str(other)

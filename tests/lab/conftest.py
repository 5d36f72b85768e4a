"""Fixtures of the lab tests: one lab and herd for modules with the same settings, clean before and after each test.

A test that hurts the herd gets it back as it was: killed processes come back by themselves, and what a test changed in
hosts and links it puts right in a `finally` of its own.
"""

import re
import shutil
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.lab.herd import LabHerd
from tests.lab.lab import Lab, require_lab
from tests.waiting import wait_until

HERD_ENV = {
    # Short times make the faults' tests short. The relations between them are those of the defaults.
    "VMHERD_GRANT_TTL": "5",
    "VMHERD_LEASE_TTL": "6",
    "VMHERD_WATCHDOG_TIMEOUT": "3",
    "VMHERD_HEARTBEAT": "1",
    "VMHERD_SYSTEM_RESERVED_MEMORY_MIB": "512",
    # Nothing before libvirt's call that tests of its first moments would have to wait for; test_convergence measures.
    "VMHERD_DIRTY_RATE_SAMPLE": "0",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is a lab test."""
    for item in items:
        if "/tests/lab/" in str(item.path):
            item.add_marker(pytest.mark.lab)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Keep the processes' logs of a failed test: the lab's own folder goes with the lab."""
    report = yield
    given = getattr(item, "funcargs", {})
    lab = given.get("lab") or getattr(given.get("herd"), "lab", None)
    if report.failed and isinstance(lab, Lab) and (lab.directory / "logs").exists():
        kept = Path(item.config.rootpath) / ".lab" / "failed" / re.sub(r"[^\w.-]+", "-", item.nodeid)
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(lab.directory / "logs", kept)
        for log in lab.directory.glob("*/var/log/libvirt/qemu/*.log"):
            shutil.copy(log, kept / f"{log.relative_to(lab.directory).parts[0]}-qemu-{log.name}")
        report.sections.append(("logs of the processes", str(kept)))
    return report


class Herds:
    """Brings up a lab and the product on it, and keeps them for as long as the next module wants the same settings."""

    def __init__(self) -> None:
        self._settings: dict[str, str] = {}
        self._up = ExitStack()
        self._herd: LabHerd | None = None

    def get(self, settings: dict[str, str], name: str) -> LabHerd:
        """Give the herd that has these settings; a new one's lab is called by the name."""
        if self._herd is None or settings != self._settings:
            self.close()
            lab = self._up.enter_context(Lab(hosts=3, name=name))
            self._herd = self._up.enter_context(LabHerd(lab, env=settings))
            self._settings = settings
        return self._herd

    def close(self) -> None:
        """Take down what is up."""
        self._herd = None
        self._up.close()


@pytest.fixture(scope="session")
def herds() -> Iterator[Herds]:
    """What modules share."""
    require_lab()
    herds = Herds()
    yield herds
    herds.close()


@pytest.fixture(scope="module")
def module_herd(herds: Herds, request: pytest.FixtureRequest) -> LabHerd:
    """The product on three hosts, with the module's `SETTINGS`; modules that have the same run on the same herd."""
    name = request.module.__name__.rpartition("_")[2][:10]
    return herds.get({**HERD_ENV, **getattr(request.module, "SETTINGS", {})}, name)


@pytest.fixture(scope="module")
def lab(module_herd: LabHerd) -> Lab:
    """The lab of the module's herd."""
    return module_herd.lab


@pytest.fixture
def herd(module_herd: LabHerd) -> Iterator[LabHerd]:
    """The module's herd; after the test nothing of an operation may be left, and the guests are removed."""
    module_herd.wait_ready([host.name for host in module_herd.lab.hosts])
    yield module_herd
    try:
        wait_until(lambda: not module_herd.leftovers(), 30, lambda: f"no leftovers: {module_herd.leftovers()}")
    finally:
        module_herd.clear()

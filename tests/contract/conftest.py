"""Fixtures of the contract suites: what each adapter runs on."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # what a driver needs is imported where that driver is tested: the others work without it
    from tests.contract.libvirt_hosts import LibvirtHostPair
    from tests.lab.lab import Lab


@pytest.fixture(scope="session")
def hypervisor_lab() -> "Iterator[Lab]":
    """Two libvirt hosts for all hypervisor tests of the run."""
    from tests.lab.lab import Lab, require_lab

    require_lab()
    with Lab(hosts=2) as lab:
        yield lab


@pytest.fixture
def libvirt_pair(hypervisor_lab: "Lab") -> "Iterator[LibvirtHostPair]":
    """Two libvirt hosts without machines, and new drivers to them."""
    from tests.contract.libvirt_hosts import LibvirtHostPair

    pair = LibvirtHostPair(hypervisor_lab)
    try:
        yield pair
    finally:
        pair.clear()

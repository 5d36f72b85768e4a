"""Fixtures of the contract suites: what each adapter runs on."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.contract.hypervisor_hosts import DRIVERS, HostPair
from tests.contract.machines import Machine, new_machine

if TYPE_CHECKING:  # what a driver needs is imported where that driver is tested: the others work without it
    from tests.contract.libvirt_hosts import LibvirtHostPair
    from tests.contract.simulated_hosts import SimulatedHostPair, WorldProcess
    from tests.lab.lab import Lab


@pytest.fixture
def machine() -> Machine:
    return new_machine()


@pytest.fixture(params=DRIVERS)
def pair(request: pytest.FixtureRequest) -> HostPair:
    """The hosts of each driver, from its fixture `<driver>_pair`."""
    hosts: HostPair = request.getfixturevalue(f"{request.param}_pair")
    return hosts


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


@pytest.fixture(scope="session")
def simulated_world(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[WorldProcess]":
    """Two simulated hosts, in a process of their own, for all hypervisor tests of the run."""
    from tests.contract.simulated_hosts import WorldProcess

    world = WorldProcess(tmp_path_factory.mktemp("world") / "world.sock")
    yield world
    world.end()


@pytest.fixture
def simulated_pair(simulated_world: "WorldProcess") -> "Iterator[SimulatedHostPair]":
    """Two simulated hosts without machines, and new drivers to them."""
    from tests.contract.simulated_hosts import SimulatedHostPair

    pair = SimulatedHostPair(simulated_world)
    try:
        yield pair
    finally:
        pair.clear()


@pytest.fixture
def simulated_here_pair() -> "Iterator[SimulatedHostPair]":
    """The same in this process."""
    from tests.contract.simulated_hosts import SimulatedHostPair, WorldHere

    world = WorldHere()
    pair = SimulatedHostPair(world)
    try:
        yield pair
    finally:
        pair.clear()
        world.end()

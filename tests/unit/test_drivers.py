"""Which driver a node's processes use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import HypervisorUnavailable, Invalid
from orchestrator.settings import Settings
from workers.hypervisor.drivers import boot_id, migration_uri, open_hypervisor
from workers.hypervisor.simulated import SimulatedHypervisor

WITHOUT_LIBVIRT = """
import sys
import workers.agent, workers.tasks
from orchestrator.settings import settings
from workers.hypervisor.drivers import open_hypervisor
open_hypervisor(settings())
print("libvirt" in sys.modules)
"""


def a_node(uri: str, **more: str) -> Settings:
    return Settings.model_validate({"libvirt_uri": uri, **more})


def test_a_simulated_host_is_chosen_by_the_uri() -> None:
    config = a_node("simulated+unix:///run/world.sock?host=h1")
    host = open_hypervisor(config)
    assert isinstance(host, SimulatedHypervisor)
    assert host.name == "h1"
    assert migration_uri(config) == "simulated://h1"
    with pytest.raises(HypervisorUnavailable, match=r"world\.sock"):
        boot_id(config)


def test_anything_else_is_libvirts() -> None:
    config = a_node("qemu:///system")
    assert type(open_hypervisor(config)).__name__ == "LibvirtHypervisor"
    assert migration_uri(config).startswith("qemu+tls://")
    assert migration_uri(a_node("qemu:///system", migration_uri="qemu+tcp://h7/system")) == "qemu+tcp://h7/system"
    assert boot_id(config) == ""


@pytest.mark.parametrize(
    "uri",
    [
        "simulated+unix:///run/world.sock",
        "simulated+unix:///run/world.sock?host=",
        "simulated+unix:///run/world.sock?host=a&host=b",
        "simulated+unix://?host=a",
        "simulated+unix://run/world.sock?host=a",
    ],
)
def test_a_wrong_uri_is_said(uri: str) -> None:
    with pytest.raises(Invalid, match="VMHERD_LIBVIRT_URI"):
        open_hypervisor(a_node(uri))


def test_a_simulated_node_needs_no_libvirt() -> None:
    environment = {**os.environ, "VMHERD_NODE": "h1", "VMHERD_LIBVIRT_URI": "simulated+unix:///world.sock?host=h1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBVIRT],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "False"

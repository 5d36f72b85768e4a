"""What is read from a domain's XML, and what is written there."""

import pytest

from orchestrator.errors import HypervisorError
from workers.hypervisor.domain_xml import (
    MARKER_NAMESPACE,
    identity_of,
    marker_xml,
    parse_domain,
    startable,
    with_marker,
)
from workers.hypervisor.port import Marker

MARKER = Marker(project="shop", name="web & <co>", incarnation=3, epoch=41)
UUID = "5e21a3d0-9a53-4d5c-8a39-6b8f7b8a4c11"
XML = f"""<!-- kept -->
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>shop.web</name><uuid>{UUID.upper()}</uuid>
  <metadata>
    <other:thing xmlns:other='https://example.org/other'>kept</other:thing>
    <old:vm xmlns:old='{MARKER_NAMESPACE}' project='old' name='old' incarnation='1' epoch='1'/>
  </metadata>
  <memory unit='KiB'>2097152</memory>
  <vcpu current='2'>4</vcpu>
  <qemu:commandline><qemu:arg value='-foo'/></qemu:commandline>
</domain>"""


def test_the_marker_is_written_once_and_the_rest_is_kept() -> None:
    marked, uuid = with_marker(XML, MARKER)
    assert uuid == UUID
    parsed = parse_domain(marked)
    assert parsed.marker == MARKER
    assert marked.count(MARKER_NAMESPACE) == 1
    assert "<vmherd:vm " in marked
    assert "<qemu:arg value=" in marked
    assert ">kept</other:thing>" in marked


def test_a_definition_is_read() -> None:
    parsed = parse_domain(with_marker(XML, MARKER)[0])
    assert (parsed.uuid, parsed.name) == (UUID, "shop.web")
    assert (parsed.memory_mib, parsed.vcpus) == (2048, 2)
    assert parsed.agent is None


@pytest.mark.parametrize("state", ["connected", "disconnected"])
def test_an_agent_counts_when_connected(state: str) -> None:
    channel = (
        "<devices><channel type='unix'>"
        f"<target type='virtio' name='org.qemu.guest_agent.0' state='{state}'/></channel></devices></domain>"
    )
    assert parse_domain(XML.replace("</domain>", channel)).agent is (state == "connected")


@pytest.mark.parametrize("damage", [("epoch='1'", ""), ("incarnation='1'", "incarnation='one'"), ("old:vm", "old:x")])
def test_a_damaged_marker_is_none(damage: tuple[str, str]) -> None:
    assert parse_domain(XML.replace(*damage)).marker is None


def test_a_marker_alone_is_read_back() -> None:
    alone = marker_xml(MARKER).replace("<vm ", f"<vm xmlns='{MARKER_NAMESPACE}' ", 1)
    xml = f"<domain><name>x</name><metadata>{alone}</metadata></domain>"
    assert parse_domain(xml).marker == MARKER


def test_a_channel_for_an_agent_counts_and_another_does_not() -> None:
    other = "<devices><channel type='unix'><target type='virtio' name='com.example.0'/></channel></devices></domain>"
    assert parse_domain(XML.replace("</domain>", other)).agent is None


@pytest.mark.parametrize(
    ("interface", "expected"),
    [
        (
            "<interface type='bridge'><source network='lan' portid='p' bridge='br0'/></interface>",
            '<interface type="network"><source network="lan"/></interface>',
        ),
        (
            "<interface type='direct'><source network='lan' portgroup='g' dev='eth0' mode='bridge'/></interface>",
            '<interface type="network"><source network="lan" portgroup="g"/></interface>',
        ),
        ("<interface type='network'><source network='lan' portid='p' bridge='virbr0'/></interface>", None),
        ("<interface type='bridge'><source bridge='br0'/></interface>", None),
        ("<interface type='hostdev'><source network='lan'><address type='pci'/></source></interface>", None),
    ],
)
def test_an_interface_of_a_network_stays_one(interface: str, expected: str | None) -> None:
    live = f"<domain type='qemu' id='7'><devices>{interface}</devices></domain>"
    assert (expected or interface) in startable(live)
    assert startable(startable(live)) == startable(live)
    if expected is None:
        assert startable(live) == live


def test_the_uuid_of_anyones_xml() -> None:
    assert identity_of(XML) == UUID
    with pytest.raises(HypervisorError, match="uuid"):
        identity_of("<domain><name>x</name></domain>")

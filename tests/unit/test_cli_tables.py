"""What `vmherd get` prints, without a terminal and without Redis."""

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
import yaml

from orchestrator.cli.ages import age, duration, memory, span
from orchestrator.cli.get import Wanted, Watch
from orchestrator.cli.output import Output, qualified_name, render
from orchestrator.cli.tables import TABLES, Around, Layout, cells_of, clean, columns_of, count_vms
from orchestrator.errors import NotFound
from orchestrator.resources import (
    KINDS,
    Condition,
    Event,
    Node,
    OperationPhase,
    Reason,
    Resource,
    RunPolicy,
    VirtualMachine,
    VirtualMachineOperation,
    VmPhase,
    event_about,
)
from orchestrator.store import Change, ChangeType
from orchestrator.store.store import Loaded
from tests.builders import NOW, a_node, a_vm, an_operation

LATER = NOW + timedelta(minutes=5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-2, "<invalid>"),
        (-1, "0s"),
        (0, "0s"),
        (5, "5s"),
        (119.9, "119s"),
        (120, "2m"),
        (150, "2m30s"),
        (599, "9m59s"),
        (600, "10m"),
        (3 * 3600 - 1, "179m"),
        (3 * 3600, "3h"),
        (3 * 3600 + 60, "3h1m"),
        (8 * 3600, "8h"),
        (48 * 3600 - 1, "47h"),
        (48 * 3600, "2d"),
        (50 * 3600, "2d2h"),
        (8 * 86400, "8d"),
        (729 * 86400, "729d"),
        (730 * 86400, "2y"),
        (1000 * 86400, "2y270d"),
        (8 * 365 * 86400 + 86400, "8y"),
    ],
)
def test_durations_are_kubectls(seconds: float, text: str) -> None:
    assert duration(timedelta(seconds=seconds)) == text


def test_an_age_needs_a_beginning() -> None:
    assert age(None, NOW) == "<none>"
    assert age(NOW, LATER) == "5m"


@pytest.mark.parametrize(("mib", "text"), [(0, "0Mi"), (512, "512Mi"), (1024, "1Gi"), (16_022, "15.6Gi")])
def test_memory(mib: int, text: str) -> None:
    assert memory(mib) == text


@pytest.mark.parametrize(("seconds", "text"), [(600, "10m"), (5400, "1h30m"), (4, "4s"), (0.5, "0.5s")])
def test_limits_are_told_as_they_are_given(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_vms() -> None:
    vms = [
        a_vm(node="node-1", ip_address="192.0.2.101"),
        a_vm("b", node="", phase=VmPhase.PENDING, incarnation=0, ip_address=""),
    ]
    assert printed(vms) == [
        "NAME       PHASE     NODE     IPADDRESS     AGE",
        "linux-vm   Running   node-1   192.0.2.101   5m",
        "b          Pending   <none>   <none>        5m",
    ]
    (header, row) = printed([a_vm(policy=RunPolicy.MANUAL, cores=2, fraction="20%", memory="192Mi")], wide=True)
    assert header.split("   ")[0] == "NAME"
    assert " ".join(header.split()[5:]) == (
        "CORES COREFRACTION MEMORY NEED RESTART AGENT MIGRATABLE RUNPOLICY INCARNATION"
    )
    assert row.split() == [
        *("linux-vm", "Running", "n1", "<none>", "5m", "2", "20%", "192Mi"),
        *("False", "Unknown", "Unknown", "Manual", "1"),
    ]


def test_vms_of_all_namespaces() -> None:
    header, row = printed([a_vm()], namespaces=True)
    assert header.split()[:2] == ["NAMESPACE", "NAME"]
    assert row.split()[:2] == ["default", "linux-vm"]


def test_operations() -> None:
    condition = Condition(type="Completed", status="False", reason=Reason.SYNCING, message="1 of 2 GiB")
    operation = an_operation(
        "evict-1",
        phase=OperationPhase.IN_PROGRESS,
        progress=47,
        source_node="n1",
        target_node="n2",
        conditions=(condition,),
    )
    assert printed([operation]) == [
        "NAME      PHASE        PROGRESS   TYPE    VIRTUALMACHINE   AGE",
        "evict-1   InProgress   47%        Evict   linux-vm         5m",
    ]
    assert printed([operation], wide=True)[1].endswith("5m    n1       n2       Syncing   1 of 2 GiB")


def test_nodes() -> None:
    nodes = [a_node("h1", cordoned=True), a_node("h2"), a_node("h3", ready=False)]
    assert printed(nodes) == [
        "NAME   STATUS                     CPU   MEMORY   AGE",
        "h1     Ready,SchedulingDisabled   8     16Gi     5m",
        "h2     Ready                      8     16Gi     5m",
        "h3     NotReady                   8     16Gi     5m",
    ]
    vms = [a_vm("a", node="h1"), a_vm("b", node="h1"), a_vm("gone", node="h2", phase=VmPhase.STOPPED)]
    around = Around(LATER, count_vms(vms))
    columns = columns_of(TABLES[Node], wide=True, namespaces=False)
    rows = [dict(zip([c.title for c in columns], cells_of(columns, node, around), strict=True)) for node in nodes]
    assert [row["VMS"] for row in rows] == ["2", "0", "0"]
    assert [row["MIGRATION-URI"] for row in rows] == [f"qemu+tcp://h{n}/system" for n in (1, 2, 3)]


def test_events() -> None:
    event = event_about(a_vm(), "MigrationStarted", "migrates from node n1\nto n2", NOW, warning=True)
    assert printed([event]) == [
        "LAST SEEN   TYPE      REASON             OBJECT                    MESSAGE",
        "5m          Warning   MigrationStarted   virtualmachine/linux-vm   migrates from node n1 to n2",
    ]


def test_what_a_host_wrote_cannot_command_the_terminal() -> None:
    assert clean("bad\x1b[2Jscreen\r\nhere\x9b") == "bad [2Jscreen here"


def test_colour_is_of_the_phase_only_and_does_not_move_columns() -> None:
    columns = columns_of(TABLES[VirtualMachine], wide=False, namespaces=False)
    cells = cells_of(columns, a_vm(), Around(LATER))
    plain, coloured = Layout(columns, colour=False).row(cells), Layout(columns, colour=True).row(cells)
    assert coloured.count("\x1b[") == 2
    assert coloured.replace("\x1b[32m", "").replace("\x1b[0m", "") == plain


def test_documents() -> None:
    vms = [a_vm("a"), a_vm("b")]
    assert render(vms, Output.NAME, is_list=True).splitlines() == [
        "virtualmachine.virtualization.deckhouse.io/a",
        "virtualmachine.virtualization.deckhouse.io/b",
    ]
    assert qualified_name(a_node("h1")) == "node/h1"
    for output, read in ((Output.JSON, json.loads), (Output.YAML, yaml.safe_load)):
        one, several = render(vms[:1], output, is_list=False), render(vms, output, is_list=True)
        assert read(one) == vms[0].manifest()
        assert read(several) == {"apiVersion": "v1", "kind": "List", "items": [vm.manifest() for vm in vms]}
        assert read(render([], output, is_list=True))["items"] == []


class TestWatch:
    def test_a_line_for_each_change_of_a_printed_cell_and_for_nothing_else(self) -> None:
        watch = a_watch(VirtualMachine)
        vm = a_vm(node="n1", ip_address="192.0.2.101")
        assert watch.take(listed(vm), NOW) == [
            "NAME       PHASE       NODE   IPADDRESS     AGE",
            "linux-vm   Running     n1     192.0.2.101   0s",
        ]
        moving = vm.with_status(phase=VmPhase.MIGRATING)
        moved = moving.with_status(phase=VmPhase.RUNNING, node_name="n2")
        assert watch.take(changed(moving), LATER) == ["linux-vm   Migrating   n1     192.0.2.101   5m"]
        assert watch.take(changed(moving.with_status(counter=9)), LATER + timedelta(hours=1)) == []
        assert watch.take(changed(moved), LATER) == ["linux-vm   Running     n2     192.0.2.101   5m"]
        assert watch.take(changed(moved, ChangeType.DELETED), LATER) == [
            "linux-vm   Deleted     n2     192.0.2.101   5m"
        ]
        assert watch.take(changed(moved, ChangeType.DELETED), LATER) == []

    def test_after_a_break_what_differs(self) -> None:
        watch = a_watch(VirtualMachine)
        same, other, gone, new = a_vm("same"), a_vm("other"), a_vm("gone"), a_vm("new")
        watch.take(listed(same, other, gone), NOW)
        lines = watch.take(listed(same, other.with_status(node_name="n2"), new), NOW)
        assert [line.split()[:3] for line in lines] == [
            ["gone", "Deleted", "n1"],
            ["new", "Running", "n1"],
            ["other", "Running", "n2"],
        ]

    def test_one_that_was_made_anew_under_the_same_name(self) -> None:
        watch = a_watch(VirtualMachine)
        vm = a_vm()
        watch.take(listed(vm), NOW)
        again = vm.with_(metadata=vm.metadata.with_(uid="another", creation_timestamp=LATER))
        assert watch.take(listed(again), LATER) == ["linux-vm   Running     n1     <none>      0s"]

    def test_only_what_was_asked_for(self) -> None:
        watch = a_watch(VirtualMachine, names=("b",))
        assert len(watch.take(listed(a_vm("a"), a_vm("b")), NOW)) == 2
        assert watch.take(changed(a_vm("a", phase=VmPhase.PAUSE)), NOW) == []
        elsewhere = a_vm("b", phase=VmPhase.PAUSE)
        elsewhere = elsewhere.with_(metadata=elsewhere.metadata.with_(namespace="other"))
        assert watch.take(changed(elsewhere), NOW) == []

    def test_a_name_that_is_not_there(self) -> None:
        with pytest.raises(NotFound, match="VirtualMachine 'x' not found in namespace 'default'"):
            a_watch(VirtualMachine, names=("x",)).take(listed(a_vm()), NOW)

    def test_the_header_waits_for_a_row(self) -> None:
        watch = a_watch(VirtualMachine)
        assert watch.take(listed(), NOW) == []
        assert len(watch.take(changed(a_vm(), ChangeType.ADDED), NOW)) == 2

    def test_a_nodes_vms_are_counted_on(self) -> None:
        watch = a_watch(Node, output=Output.WIDE)
        nodes, vm = (a_node("n1"), a_node("n2")), a_vm(node="n1")
        watch.take(listed(*nodes, vm), NOW)
        lines = watch.take(changed(vm.with_status(node_name="n2")), NOW)
        assert [(line.split()[0], line.split()[5]) for line in lines] == [("n1", "0"), ("n2", "1")]

    def test_an_event_that_happens_again_is_new_and_one_that_is_cleared_away_is_none(self) -> None:
        watch = a_watch(Event)
        event = event_about(a_vm(), "MigrationStarted", "", NOW)
        watch.take(listed(event), NOW)
        assert watch.take(changed(event.with_(last_timestamp=LATER, count=2)), LATER) != []
        assert watch.take(changed(event, ChangeType.DELETED), LATER) == []

    def test_documents_are_printed_whenever_they_change(self) -> None:
        watch = a_watch(VirtualMachineOperation, output=Output.YAML)
        operation = an_operation()
        first = versioned(operation, 1)
        (text,) = watch.take(listed(first), NOW)
        assert list(yaml.safe_load_all(text)) == [first.manifest(), None]
        assert watch.take(listed(first), NOW) == []
        assert len(watch.take(changed(versioned(operation, 2)), NOW)) == 1


def printed(resources: Sequence[Resource], *, wide: bool = False, namespaces: bool = False) -> list[str]:
    columns = columns_of(TABLES[type(resources[0])], wide=wide, namespaces=namespaces)
    layout = Layout(columns, colour=False)
    rows = [cells_of(columns, resource, Around(LATER)) for resource in resources]
    layout.fit(rows)
    return [layout.header(), *(layout.row(row) for row in rows)]


def a_watch(kind: type[Resource], names: tuple[str, ...] = (), output: Output | None = None) -> Watch:
    return Watch(Wanted(TABLES[kind], names, "default" if kind.namespaced else None, output, all_namespaces=False))


def listed(*resources: Resource) -> Loaded:
    by_kind: dict[str, dict[Any, Resource]] = {kind: {} for kind in KINDS}
    for resource in resources:
        by_kind[resource.kind_name][resource.key] = resource
    return Loaded(version=1, run_id="r", resources=by_kind)


def changed(resource: Resource, how: ChangeType = ChangeType.MODIFIED) -> Change:
    return Change(version=2, type=how, resource=resource)


def versioned(operation: VirtualMachineOperation, version: int) -> VirtualMachineOperation:
    return operation.with_(metadata=operation.metadata.with_(resource_version=str(version)))

"""Documents as metrics: the platform's names and labels, one series a phase, and nothing that isn't known."""

import re
from datetime import timedelta

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.metrics import Family, escaped
from orchestrator.resources import OperationPhase, Resource, VmPhase, parse
from orchestrator.resources.meta import Condition
from orchestrator.resources.vm import Change
from orchestrator.services import herd_metrics, measures
from tests.builders import NOW, a_class, a_node, a_vm, an_operation


def read(*resources: Resource) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """What Prometheus reads of documents' lines: by metric, values by their labels."""
    found = [sample for resource in resources for sample in measures.samples(resource)]
    text = "".join(family.block([line for of, line in found if of is family]) for family in measures.FAMILIES)
    return {
        family.name: {frozenset(sample.labels.items()): sample.value for sample in family.samples}
        for family in text_string_to_metric_families(text)
    }


def labels_of(metric: dict[frozenset[tuple[str, str]], float]) -> dict[str, str]:
    (labels,) = metric
    return dict(labels)


def test_a_vm_has_the_platforms_metrics() -> None:
    vm = a_vm("linux-vm", node="n1", cores=4, fraction="20%", memory="2Gi")
    shown = read(vm)
    prefix = "d8_virtualization_virtualmachine_"
    assert labels_of(shown[prefix + "status_phase"]) == {
        "name": "linux-vm",
        "namespace": "default",
        "uid": vm.metadata.uid,
        "node": "n1",
        "phase": "Running",
    }
    one = {name.removeprefix(prefix): next(iter(values.values())) for name, values in shown.items()}
    assert (one["cpu_cores"], one["cpu_core_fraction"]) == (4, 20)
    assert one["configuration_memory_size_bytes"] == 2 * 2**30
    assert labels_of(shown[prefix + "configuration_run_policy"])["run_policy"] == "AlwaysOnUnlessStoppedManually"
    assert (one["configuration_applied"], one["awaiting_restart_to_apply_configuration"]) == (1, 0)
    assert "migratable" not in one, "it is not known"
    assert one["vmherd_virtualmachine_unexpected_copies"] == 0


@pytest.mark.parametrize(("status", "value"), [("True", 1.0), ("False", 0.0), ("Unknown", None)])
def test_whether_it_can_migrate_is_shown_once_it_is_known(status: str, value: float | None) -> None:
    vm = a_vm(conditions=(Condition(type="Migratable", status=status, reason="x"),))  # type: ignore[arg-type]
    metric = read(vm).get("d8_virtualization_virtualmachine_migratable", {})
    assert list(metric.values()) == ([] if value is None else [value])


def test_changes_that_wait_for_a_restart_show() -> None:
    vm = a_vm(restart_awaiting_changes=(Change(path="spec.memory.size", operation="replace"),))
    shown = read(vm)
    assert list(shown["d8_virtualization_virtualmachine_configuration_applied"].values()) == [0]
    assert list(shown["d8_virtualization_virtualmachine_awaiting_restart_to_apply_configuration"].values()) == [1]


def test_a_vm_that_shows_on_other_nodes_is_counted_once_a_node() -> None:
    vm = a_vm(elsewhere="n2", outdated=("n2", "n3"))
    assert list(read(vm)["vmherd_virtualmachine_unexpected_copies"].values()) == [2]


def test_a_phase_is_one_series_and_changes_its_label() -> None:
    phases = {
        labels_of(read(a_vm(phase=phase))["d8_virtualization_virtualmachine_status_phase"])["phase"]
        for phase in VmPhase
    }
    assert phases == {phase.value for phase in VmPhase}


def test_an_operation_has_its_instants_and_no_others() -> None:
    pending = an_operation("evict-a")
    prefix = "d8_virtualization_virtualmachineoperation_"
    shown = read(pending)
    assert labels_of(shown[prefix + "status_phase"]) == {
        "name": "evict-a",
        "namespace": "default",
        "uid": pending.metadata.uid,
        "type": "Evict",
        "virtualmachine": pending.spec.virtual_machine_name,
        "phase": "Pending",
    }
    assert prefix + "finished_timestamp_seconds" not in shown
    ended = pending.with_status(
        phase=OperationPhase.COMPLETED,
        progress=100,
        started_at=NOW,
        finished_at=NOW + timedelta(seconds=7),
        downtime_ms=137,
    )
    shown = read(ended)
    assert list(shown[prefix + "started_timestamp_seconds"].values()) == [NOW.timestamp()]
    assert list(shown[prefix + "finished_timestamp_seconds"].values()) == [NOW.timestamp() + 7]
    assert list(shown["vmherd_virtualmachineoperation_downtime_seconds"].values()) == [0.137]


def test_a_class_counts_its_nodes_to_nought() -> None:
    none = a_class().with_status(available_nodes=())
    assert list(read(none)["vmherd_virtualmachineclass_available_nodes"].values()) == [0]
    assert "d8_virtualization_virtualmachineclass_available_node" not in read(none)
    two = a_class().with_status(available_nodes=("n1", "n2"))
    nodes = {dict(labels)["node"] for labels in read(two)["d8_virtualization_virtualmachineclass_available_node"]}
    assert nodes == {"n1", "n2"}


def test_a_node_that_is_cordoned_is_ready_and_not_schedulable() -> None:
    shown = read(a_node("n1", cordoned=True), a_node("n2", ready=False))
    by_node = {name: {dict(k)["node"]: v for k, v in values.items()} for name, values in shown.items()}
    assert by_node["vmherd_node_ready"] == {"n1": 1, "n2": 0}
    assert by_node["vmherd_node_cordoned"] == {"n1": 1, "n2": 0}
    assert by_node["vmherd_node_schedulable"] == {"n1": 0, "n2": 0}


def test_whether_a_node_could_be_lost_is_left_out_while_it_is_unknown() -> None:
    def told(name: str, **conditions: str) -> Resource:
        found = tuple(parse(Condition, {"type": kind, "status": status}) for kind, status in conditions.items())
        return a_node(name).with_status(conditions=found)

    shown = read(
        told("n1"),
        told("n2", FailoverReady="True", FailureDomainReady="False"),
        told("n3", FailoverReady="False", FailureDomainReady="Unknown"),
        told("n4", FailoverReady="Unknown"),
    )
    by_node = {name: {dict(k)["node"]: v for k, v in values.items()} for name, values in shown.items()}
    assert by_node["vmherd_node_failover_ready"] == {"n2": 1, "n3": 0}
    assert by_node["vmherd_failure_domain_ready"] == {"n2": 0}


def test_a_label_with_anything_in_it_is_read_back_as_it_was() -> None:
    odd = 'a"b\\c\nd'
    family = Family("x", "help", ("name",))
    (read_back,) = text_string_to_metric_families(family.block([family.line(1.5, odd)]))
    assert read_back.samples[0].labels == {"name": odd}
    assert read_back.samples[0].value == 1.5
    assert "\n" not in escaped(odd)


def test_names_are_prometheus_own_and_each_is_declared_once() -> None:
    names = [family.name for family in herd_metrics.FAMILIES]
    assert len(names) == len(set(names))
    for family in herd_metrics.FAMILIES:
        assert re.fullmatch(r"(d8_virtualization|vmherd)_[a-z0-9_]+", family.name)
        assert "\n" not in family.help
        assert not family.name.endswith("_total"), "these are gauges"

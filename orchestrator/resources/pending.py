"""What of a VM's spec waits for a restart, and what of a spec applies at once.

While a VM runs, `status.applied` keeps the spec that it was started with from the first change on that needs a restart;
without one, what runs is the spec. The next start clears it. A change of the class's CPU is found by what the recorded
machine says its CPU was made from.
"""

import hashlib
from datetime import datetime
from typing import Any, Literal

from orchestrator.resources.domain_xml import wanted_cpu
from orchestrator.resources.meta import Condition, Model, with_condition
from orchestrator.resources.vm import Change, VirtualMachine
from orchestrator.resources.vm_spec import RestartApprovalMode, VirtualMachineSpec
from orchestrator.resources.vmclass import VirtualMachineClass

AWAITING_RESTART = "AwaitingRestartToApplyConfiguration"
CONFIGURATION_APPLIED = "ConfigurationApplied"

NEEDS_RESTART = (
    "cpu",
    "memory",
    "disks",
    "interfaces",
    "os_type",
    "bootloader",
    "enable_paravirtualization",
    "domain_template",
    "virtual_machine_class_name",
)
"""Fields that say what the machine is. All others apply at once."""
_NOT_OF_THE_MACHINE = frozenset({"shared"})
"""Of a disk: a fact about its storage, which a migration asks for."""
_LONGEST_SHOWN = 256


def pending_changes(vm: VirtualMachine, vm_class: VirtualMachineClass | None = None) -> tuple[Change, ...]:
    """List what a restart would change of the machine that runs.

    Args:
        vm: One that runs nowhere waits for nothing.
        vm_class: The class of its spec; None where it has none, or its CPU is not known.

    Returns:
        By path; empty when what runs is what is wanted.
    """
    if not vm.status.phase.occupies_node:
        return ()
    changes = list(changed_fields(vm.running_spec, vm.spec))
    machine = vm.status.machine
    if machine is not None and machine.cpu_from and vm_class is not None and vm_class.status.cpu is not None:
        wanted = wanted_cpu(vm.spec, vm_class)
        same_class = vm.running_spec.virtual_machine_class_name == vm.spec.virtual_machine_class_name
        if same_class and wanted is not None and str(wanted) != machine.cpu_from:
            changes.append(_change(f"VirtualMachineClass/{vm_class.name}:spec.cpu", machine.cpu_from, str(wanted)))
    return tuple(sorted(changes, key=lambda change: change.path))


def changed_fields(old: VirtualMachineSpec, new: VirtualMachineSpec) -> tuple[Change, ...]:
    """List the fields that differ and need a restart."""
    found: list[Change] = []
    if old is not new:
        for field in NEEDS_RESTART:
            one, other = getattr(old, field), getattr(new, field)
            if one != other:
                alias = VirtualMachineSpec.model_fields[field].alias or field
                found += _differences(f"spec.{alias}", _plain(one), _plain(other))
    return tuple(found)


def with_pending(vm: VirtualMachine, vm_class: VirtualMachineClass | None, now: datetime) -> VirtualMachine:
    """Give a VM whose status says what waits for a restart; itself when it says so already."""
    changes = pending_changes(vm, vm_class)
    if not changes:
        applied = Condition(type=CONFIGURATION_APPLIED, status="True", reason="ConfigurationApplied")
        waits = Condition(type=AWAITING_RESTART, status="False", reason="ConfigurationApplied")
    else:
        paths = ", ".join(change.path for change in changes)
        what = "restarts by itself" if restarts_by_itself(vm) else "waits for a restart"
        message = f"{what} to apply {paths}"[:_LONGEST_SHOWN]
        applied = Condition(
            type=CONFIGURATION_APPLIED, status="False", reason="ConfigurationNotApplied", message=message
        )
        waits = Condition(type=AWAITING_RESTART, status="True", reason="RestartRequired", message=message)
    conditions = vm.status.conditions
    known = any(condition.type == AWAITING_RESTART for condition in conditions)
    if changes or known:
        conditions = with_condition(with_condition(conditions, waits, now), applied, now)
    new = vm.with_status(restart_awaiting_changes=changes, conditions=conditions)
    return vm if new.status == vm.status else new


def restarts_by_itself(vm: VirtualMachine) -> bool:
    """Whether a VM with pending changes is to be restarted without anybody asking for it."""
    return vm.spec.disruptions.restart_approval_mode is RestartApprovalMode.AUTOMATIC


def started(vm: VirtualMachine, now: datetime) -> VirtualMachine:
    """Give a VM to which a start was granted: what runs from now on is its spec."""
    return with_pending(vm.with_status(applied=None), None, now)


def _plain(value: Any) -> Any:
    """Give a field's value as JSON-able data."""
    if isinstance(value, Model):
        return value.model_dump(mode="json", by_alias=True, exclude_none=True)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _differences(path: str, old: Any, new: Any) -> list[Change]:
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if key not in _NOT_OF_THE_MACHINE]
        return [change for key in keys for change in _differences(f"{path}.{key}", old.get(key), new.get(key))]
    if isinstance(old, list) and isinstance(new, list) and _are_named(old) and _are_named(new):
        olds, news = {item["name"]: item for item in old}, {item["name"]: item for item in new}
        found = [
            change
            for name in {**olds, **news}
            for change in _differences(f"{path}[{name}]", olds.get(name), news.get(name))
        ]
        return found or _order(path, list(olds), list(news))
    return [_change(path, old, new)]


def _order(path: str, old: list[str], new: list[str]) -> list[Change]:
    """Disks in another order boot in another order."""
    return [_change(path, old, new)] if old != new else []


def _are_named(items: list[Any]) -> bool:
    return all(isinstance(item, dict) and "name" in item for item in items)


def _change(path: str, old: Any, new: Any) -> Change:
    operation: Literal["add", "remove", "replace"] = "replace"
    if old is None or new is None:
        operation = "add" if old is None else "remove"
    return Change(path=path, operation=operation, current_value=_shown(old), desired_value=_shown(new))


def _shown(value: Any) -> Any:
    """Give a value as the status shows it: long texts by their digest."""
    if isinstance(value, str) and len(value) > _LONGEST_SHOWN:
        return f"sha256:{hashlib.sha256(value.encode()).hexdigest()[:16]} ({len(value)} characters)"
    return value

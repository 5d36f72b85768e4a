"""What VMs ask of each other's whereabouts, made ready for the planner: affinity, anti-affinity, spread.

A term of a manifest speaks of labels relative to the VM that states it (its namespace, `matchLabelKeys`). Here that is
resolved once, so that equal terms of different VMs are one value: a hundred replicas that stay apart are one rule with
a hundred owners, and not ten thousand pairs.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from orchestrator.resources import Key, VirtualMachine, VirtualMachineClass
from orchestrator.resources.scheduling import (
    LabelSelector,
    NodeLabels,
    NodeSelector,
    Operator,
    PreferredNodes,
    Taint,
    TaintEffect,
    Toleration,
    TopologySpreadConstraint,
    VirtualMachineAffinity,
    VirtualMachineAffinityTerm,
    meets,
    untolerated,
)

NAMESPACE_LABEL: Final = "kubernetes.io/metadata.name"
"""The label that every namespace has in Kubernetes; namespaces have no others here."""

EVERY_NODE = NodeLabels()


@dataclass(frozen=True, slots=True)
class Need:
    """One condition on labels."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether labels meet it."""
        return meets(labels, self.key, self.operator, self.values)

    def __str__(self) -> str:
        """As people write selectors: `app=web`, `app in (a, b)`, `!app`."""
        match self.operator:
            case "In" if len(self.values) == 1:
                return f"{self.key}={self.values[0]}"
            case "In" | "NotIn":
                return f"{self.key} {'in' if self.operator == 'In' else 'notin'} ({', '.join(self.values)})"
            case "Exists":
                return self.key
            case _:
                return f"!{self.key}"


@dataclass(frozen=True, slots=True)
class Term:
    """Which other VMs are meant, and the node label within whose value they count as together.

    Attributes:
        namespaces: Whose VMs are meant.
        namespace_needs: Conditions on other namespaces whose VMs are meant too; None: no others.
        needs: Conditions on labels, in order; None: no VM is meant.
    """

    topology_key: str
    namespaces: frozenset[str]
    namespace_needs: tuple[Need, ...] | None
    needs: tuple[Need, ...] | None

    def means(self, namespace: str, labels: Mapping[str, str]) -> bool:
        """Whether a VM with these labels is meant."""
        if self.needs is None or not all(need.holds(labels) for need in self.needs):
            return False
        if namespace in self.namespaces:
            return True
        wanted = self.namespace_needs
        return wanted is not None and all(need.holds({NAMESPACE_LABEL: namespace}) for need in wanted)

    @property
    def words(self) -> str:
        """Whom it means: `app=web`."""
        return ",".join(str(need) for need in self.needs or ()) or "any VM"


@dataclass(frozen=True, slots=True)
class Spread:
    """How evenly the VMs of a term are to be spread over the values of its label.

    Attributes:
        is_required: Otherwise it only counts for a node.
        min_domains: With fewer values than this, the least populated one counts as empty.
        honours_selectors: Nodes that the VM itself may not run on, by labels, don't count.
        honours_taints: Nor those with taints that it doesn't tolerate.
    """

    term: Term
    max_skew: int
    is_required: bool
    min_domains: int
    honours_selectors: bool
    honours_taints: bool


@dataclass(frozen=True, slots=True)
class Rules:
    """What one VM asks of others' whereabouts.

    Attributes:
        near: Each of these must have a VM that all of them mean, in the same place.
        apart: None of these may have one.
        rather_near: Likewise, with the weight that it counts for a node.
        rather_apart: Likewise, against it.
    """

    near: tuple[Term, ...] = ()
    apart: tuple[Term, ...] = ()
    rather_near: tuple[tuple[int, Term], ...] = ()
    rather_apart: tuple[tuple[int, Term], ...] = ()
    spreads: tuple[Spread, ...] = ()

    def __bool__(self) -> bool:
        """Whether it asks for anything."""
        return bool(self.near or self.apart or self.rather_near or self.rather_apart or self.spreads)


NO_RULES: Final = Rules()


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Which nodes a VM may be on for what these are by themselves, whatever runs there.

    Attributes:
        labels: That the node must have: the VM's own nodeSelector, less what its class says.
        class_labels: What its class asks for.
        affinity: Of which one term must hold.
        preferred: Terms that count for a node.
    """

    labels: Mapping[str, str]
    class_labels: NodeLabels = EVERY_NODE
    affinity: NodeSelector | None = None
    preferred: tuple[PreferredNodes, ...] = ()
    tolerations: tuple[Toleration, ...] = ()

    @property
    def asks_nothing(self) -> bool:
        """Whether any node has the labels that are asked for: most VMs' case, in which nodes need not be looked at."""
        asked = self.class_labels
        return not (self.labels or self.affinity or asked.match_labels or asked.match_expressions)

    def unmet(self, name: str, labels: Mapping[str, str]) -> str:
        """Say which labels a node lacks: `without label zone=a`; empty when it has all."""
        if self.asks_nothing:
            return ""
        missing = [f"{k}={v}" for k, v in sorted(self.labels.items()) if labels.get(k) != v]
        if missing:
            return f"without label {', '.join(missing)}"
        wanted = self.class_labels
        missing = [f"{k}={v}" for k, v in sorted(wanted.match_labels.items()) if labels.get(k) != v]
        missing += [str(part) for part in wanted.match_expressions if not part.holds(labels)]
        if missing:
            return f"without label {', '.join(missing)}"
        if self.affinity is not None and not self.affinity.holds(name, labels):
            return f"outside its node affinity ({self.affinity})"
        return ""

    def repelled(self, taints: Collection[Taint]) -> str:
        """Say which of a node's taints keep the VM off: `with taint k=v:NoSchedule`; empty when none does."""
        if not taints:
            return ""
        hard = (taint for taint in taints if taint.effect is not TaintEffect.PREFER_NO_SCHEDULE)
        found = untolerated(hard, self.tolerations)
        return f"with taint {', '.join(str(taint) for taint in found)}" if found else ""

    def liking(self, name: str, labels: Mapping[str, str]) -> int:
        """Sum the weights of the preferred terms that a node meets."""
        if not self.preferred:
            return 0
        return sum(part.weight for part in self.preferred if part.preference.holds(name, labels))


@dataclass(frozen=True, slots=True)
class Resident:
    """A VM as others' rules see it, and with its own.

    Attributes:
        nodes: Where it takes room: one; both while it migrates; none while it is to be placed.
        spread_over: Decides which nodes count for its spread.
    """

    key: Key
    namespace: str
    name: str
    labels: Mapping[str, str]
    nodes: tuple[str, ...] = ()
    rules: Rules = NO_RULES
    spread_over: Whereabouts | None = None


def whereabouts(vm: VirtualMachine, vm_class: VirtualMachineClass | None) -> Whereabouts:
    """Give what a VM and its class ask of a node by itself; the class's nodeSelector wins over the VM's."""
    said = vm_class.spec.node_selector.match_labels if vm_class else {}
    affinity = vm.spec.affinity.node_affinity if vm.spec.affinity else None
    return Whereabouts(
        labels={key: value for key, value in vm.spec.node_selector.items() if key not in said},
        class_labels=vm_class.spec.node_selector if vm_class else EVERY_NODE,
        affinity=affinity.required_during_scheduling_ignored_during_execution if affinity else None,
        preferred=affinity.preferred_during_scheduling_ignored_during_execution if affinity else (),
        tolerations=(*vm.spec.tolerations, *(vm_class.spec.tolerations if vm_class else ())),
    )


def resident(vm: VirtualMachine, vm_class: VirtualMachineClass | None, nodes: tuple[str, ...] = ()) -> Resident:
    """Give a VM as the rules see it.

    Args:
        vm: Its rules are those of its spec as it is now: a change of affinity needs no restart.
        vm_class: The class that it names.
        nodes: Where it takes room.
    """
    rules = _rules(vm)
    return Resident(
        key=vm.key,
        namespace=vm.metadata.namespace,
        name=vm.name,
        labels=vm.metadata.labels,
        nodes=nodes,
        rules=rules,
        spread_over=whereabouts(vm, vm_class) if rules.spreads else None,
    )


def _rules(vm: VirtualMachine) -> Rules:
    spec = vm.spec
    if spec.affinity is None and not spec.topology_spread_constraints:
        return NO_RULES
    near = spec.affinity.virtual_machine_and_pod_affinity if spec.affinity else None
    apart = spec.affinity.virtual_machine_and_pod_anti_affinity if spec.affinity else None
    return Rules(
        near=_required(near, vm),
        apart=_required(apart, vm),
        rather_near=_preferred(near, vm),
        rather_apart=_preferred(apart, vm),
        spreads=tuple(_spread(constraint, vm) for constraint in spec.topology_spread_constraints),
    )


def _required(affinity: VirtualMachineAffinity | None, vm: VirtualMachine) -> tuple[Term, ...]:
    if affinity is None:
        return ()
    return tuple(_term(term, vm) for term in affinity.required_during_scheduling_ignored_during_execution)


def _preferred(affinity: VirtualMachineAffinity | None, vm: VirtualMachine) -> tuple[tuple[int, Term], ...]:
    if affinity is None:
        return ()
    return tuple(
        (part.weight, _term(part.virtual_machine_and_pod_affinity_term, vm))
        for part in affinity.preferred_during_scheduling_ignored_during_execution
    )


def _term(term: VirtualMachineAffinityTerm, vm: VirtualMachine) -> Term:
    own = frozenset({vm.metadata.namespace}) if not term.namespaces and term.namespace_selector is None else frozenset()
    needs = _needs(term.label_selector)
    if needs is not None:
        labels = vm.metadata.labels
        needs += tuple(Need(key, "In", (labels[key],)) for key in term.match_label_keys if key in labels)
        needs += tuple(Need(key, "NotIn", (labels[key],)) for key in term.mismatch_label_keys if key in labels)
    return Term(
        topology_key=term.topology_key,
        namespaces=frozenset(term.namespaces) | own,
        namespace_needs=_needs(term.namespace_selector),
        needs=needs,
    )


def _spread(constraint: TopologySpreadConstraint, vm: VirtualMachine) -> Spread:
    needs = _needs(constraint.label_selector)
    if needs is not None:
        labels = vm.metadata.labels
        needs += tuple(Need(key, "In", (labels[key],)) for key in constraint.match_label_keys if key in labels)
    return Spread(
        term=Term(constraint.topology_key, frozenset({vm.metadata.namespace}), None, needs),
        max_skew=constraint.max_skew,
        is_required=constraint.when_unsatisfiable == "DoNotSchedule",
        min_domains=constraint.min_domains or 1,
        honours_selectors=constraint.node_affinity_policy != "Ignore",
        honours_taints=constraint.node_taints_policy == "Honor",
    )


def _needs(selector: LabelSelector | None) -> tuple[Need, ...] | None:
    """Give a selector's conditions; an absent one means nothing, an empty one everything, as in Kubernetes."""
    if selector is None:
        return None
    equal = (Need(key, "In", (value,)) for key, value in sorted(selector.match_labels.items()))
    return (*equal, *(Need(part.key, part.operator, part.values) for part in selector.match_expressions))

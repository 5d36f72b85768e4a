"""Where a VM may run, in Kubernetes' shapes: taints and tolerations, affinity, spread.

All of it is checked as strictly as Kubernetes checks it, so that a manifest that is taken here means what it says.
`planner.rules` turns what is said about other VMs into what the planner works with.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Literal, Self, assert_never

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from orchestrator.resources.meta import Model, is_stored, misplaced
from orchestrator.resources.names import DNS_LABEL, LabelKey, Labels, LabelValue, check_label_key

_INTEGER = re.compile(r"-?[0-9]{1,18}")

Namespace = Annotated[str, Field(pattern=f"^{DNS_LABEL.pattern}$")]
Weight = Annotated[int, Field(ge=1, le=100)]
Operator = Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
"""Of conditions on nodes' labels; those on other labels take all but the last two."""


class TaintEffect(StrEnum):
    """What a taint does to VMs that don't tolerate it."""

    NO_SCHEDULE = "NoSchedule"
    PREFER_NO_SCHEDULE = "PreferNoSchedule"
    NO_EXECUTE = "NoExecute"


class Taint(Model):
    """A mark on a node that keeps VMs off it.

    Attributes:
        key: What tolerations name.
        value: What tolerations may compare.
    """

    key: LabelKey
    value: LabelValue = ""
    effect: TaintEffect

    def __str__(self) -> str:
        """As people write it: `key=value:effect`."""
        return f"{self.key}={self.value}:{self.effect}" if self.value else f"{self.key}:{self.effect}"


class Toleration(Model):
    """Taints that a VM puts up with.

    Attributes:
        key: Empty means every key; operator is Exists then.
        operator: Equal compares the value, Exists takes any.
        effect: Empty means every effect.
        toleration_seconds: How long a NoExecute taint is put up with; None: for ever.
    """

    key: Annotated[str, AfterValidator(lambda value: check_label_key(value) if value else value)] = ""
    operator: Literal["Equal", "Exists"] = "Equal"
    value: LabelValue = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    toleration_seconds: int | None = Field(None, ge=-(2**40), le=2**40)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        if is_stored(info):
            return self
        if self.operator == "Exists" and self.value:
            raise misplaced(("value", "must be empty when operator is Exists"))
        if self.operator == "Equal" and not self.key:
            raise misplaced(("key", "is required unless operator is Exists"))
        if self.toleration_seconds is not None and self.effect != "NoExecute":
            raise misplaced(("tolerationSeconds", "is only for effect NoExecute"))
        return self

    def tolerates(self, taint: Taint) -> bool:
        """Whether it is for this taint."""
        if self.effect and self.effect != taint.effect:
            return False
        if self.key and self.key != taint.key:
            return False
        return self.operator == "Exists" or self.value == taint.value


def untolerated(taints: Iterable[Taint], tolerations: Iterable[Toleration]) -> tuple[Taint, ...]:
    """Give the taints that no toleration is for, in their order."""
    accepted = tuple(tolerations)
    return tuple(taint for taint in taints if not any(toleration.tolerates(taint) for toleration in accepted))


def meets(labels: Mapping[str, str], key: str, operator: Operator, values: Sequence[str] = ()) -> bool:
    """Whether labels meet one condition, as Kubernetes' selectors do: what is not there is not in any list."""
    value = labels.get(key)
    match operator:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt" | "Lt":
            if value is None or not _INTEGER.fullmatch(value):
                return False
            return int(value) > int(values[0]) if operator == "Gt" else int(value) < int(values[0])
        case _:
            assert_never(operator)


class NodeSelectorRequirement(Model):
    """One condition on a node's labels, or on its name (`matchFields`)."""

    key: LabelKey
    operator: Operator
    values: tuple[LabelValue, ...] = Field((), max_length=256)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        if is_stored(info):
            return self
        match self.operator:
            case "In" | "NotIn" if not self.values:
                raise misplaced(("values", f"is required when operator is {self.operator}"))
            case "Exists" | "DoesNotExist" if self.values:
                raise misplaced(("values", f"must be empty when operator is {self.operator}"))
            case "Gt" | "Lt" if len(self.values) != 1 or not _INTEGER.fullmatch(self.values[0]):
                raise misplaced(("values", f"must be one integer when operator is {self.operator}"))
            case _:
                return self

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether a node with these labels meets it."""
        return meets(labels, self.key, self.operator, self.values)

    def __str__(self) -> str:
        """As people write it: `zone In (a, b)`."""
        return f"{self.key} {self.operator}" + (f" ({', '.join(self.values)})" if self.values else "")


class NodeLabels(Model):
    """Conditions on a node's labels that hold together; none at all means every node."""

    match_labels: Labels = Field(default_factory=dict)
    match_expressions: tuple[NodeSelectorRequirement, ...] = Field((), max_length=64)

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether a node with these labels meets them."""
        return all(labels.get(key) == value for key, value in self.match_labels.items()) and all(
            expression.holds(labels) for expression in self.match_expressions
        )


class NodeSelectorTerm(Model):
    """Conditions that hold together."""

    match_expressions: tuple[NodeSelectorRequirement, ...] = Field((), max_length=64)
    match_fields: tuple[NodeSelectorRequirement, ...] = Field((), max_length=8)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        for number, field in enumerate(() if is_stored(info) else self.match_fields):
            if field.key != "metadata.name":
                raise misplaced((f"matchFields[{number}].key", "must be metadata.name"))
            if field.operator not in {"In", "NotIn"} or len(field.values) != 1:
                raise misplaced((f"matchFields[{number}]", "must be In or NotIn with one value"))
        return self

    def holds(self, name: str, labels: Mapping[str, str]) -> bool:
        """Whether a node meets it; a term without conditions is met by none, as in Kubernetes."""
        if not self.match_expressions and not self.match_fields:
            return False
        return all(part.holds(labels) for part in self.match_expressions) and all(
            part.holds({part.key: name}) for part in self.match_fields
        )

    def __str__(self) -> str:
        """As people read it: `zone In (a, b) and disk Exists`."""
        return " and ".join(str(part) for part in (*self.match_expressions, *self.match_fields))


class NodeSelector(Model):
    """Terms of which one must hold."""

    node_selector_terms: tuple[NodeSelectorTerm, ...] = Field(min_length=1, max_length=64)

    def holds(self, name: str, labels: Mapping[str, str]) -> bool:
        """Whether a node meets one of its terms."""
        return any(term.holds(name, labels) for term in self.node_selector_terms)

    def __str__(self) -> str:
        """Its terms, joined by `or`."""
        return " or ".join(str(term) for term in self.node_selector_terms)


class PreferredNodes(Model):
    """A term that counts for a node."""

    weight: Weight
    preference: NodeSelectorTerm


class NodeAffinity(Model):
    """Nodes that a VM must, or would rather, run on."""

    required_during_scheduling_ignored_during_execution: NodeSelector | None = None
    preferred_during_scheduling_ignored_during_execution: tuple[PreferredNodes, ...] = Field((), max_length=64)


class LabelRequirement(Model):
    """One condition on labels of VMs or namespaces."""

    key: LabelKey
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[LabelValue, ...] = Field((), max_length=256)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        needs_values = self.operator in {"In", "NotIn"}
        if needs_values != bool(self.values) and not is_stored(info):
            what = "is required" if needs_values else "must be empty"
            raise misplaced(("values", f"{what} when operator is {self.operator}"))
        return self


class LabelSelector(Model):
    """Conditions on labels that hold together; none at all means everything."""

    match_labels: Labels = Field(default_factory=dict)
    match_expressions: tuple[LabelRequirement, ...] = Field((), max_length=64)


class VirtualMachineAffinityTerm(Model):
    """Other VMs, and the node label within whose value they count as together.

    Attributes:
        namespaces: Whose VMs are meant; with no namespaceSelector either: the VM's own.
    """

    label_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    namespaces: tuple[Namespace, ...] = Field((), max_length=64)
    topology_key: LabelKey
    match_label_keys: tuple[LabelKey, ...] = Field((), max_length=16)
    mismatch_label_keys: tuple[LabelKey, ...] = Field((), max_length=16)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        if is_stored(info):
            return self
        for path, values in (
            ("matchLabelKeys", self.match_label_keys),
            ("mismatchLabelKeys", self.mismatch_label_keys),
        ):
            if values and self.label_selector is None:
                raise misplaced((path, "needs a labelSelector"))
        if both := set(self.match_label_keys) & set(self.mismatch_label_keys):
            raise misplaced(("mismatchLabelKeys", f"{min(both)} is in matchLabelKeys too"))
        return self


class WeightedVirtualMachineAffinityTerm(Model):
    """A term that counts for a node."""

    weight: Weight
    virtual_machine_and_pod_affinity_term: VirtualMachineAffinityTerm


class VirtualMachineAffinity(Model):
    """VMs near which, or away from which, a VM must or would rather run."""

    required_during_scheduling_ignored_during_execution: tuple[VirtualMachineAffinityTerm, ...] = Field(
        (), max_length=64
    )
    preferred_during_scheduling_ignored_during_execution: tuple[WeightedVirtualMachineAffinityTerm, ...] = Field(
        (), max_length=64
    )


class Affinity(Model):
    """All of a VM's affinity, by the platform's names."""

    node_affinity: NodeAffinity | None = None
    virtual_machine_and_pod_affinity: VirtualMachineAffinity | None = None
    virtual_machine_and_pod_anti_affinity: VirtualMachineAffinity | None = None


class TopologySpreadConstraint(Model):
    """How evenly VMs are spread over the values of a node label.

    Attributes:
        max_skew: So many more may be at one value than at another.
        topology_key: The node label.
        when_unsatisfiable: Whether it then starts nowhere, or all the same.
    """

    max_skew: int = Field(ge=1, le=2**31 - 1)
    topology_key: LabelKey
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"]
    label_selector: LabelSelector | None = None
    min_domains: int | None = Field(None, ge=1, le=2**31 - 1)
    node_affinity_policy: Literal["Honor", "Ignore"] | None = None
    node_taints_policy: Literal["Honor", "Ignore"] | None = None
    match_label_keys: tuple[LabelKey, ...] = Field((), max_length=16)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        if is_stored(info):
            return self
        if self.min_domains is not None and self.when_unsatisfiable != "DoNotSchedule":
            raise misplaced(("minDomains", "is only for whenUnsatisfiable DoNotSchedule"))
        if self.match_label_keys and self.label_selector is None:
            raise misplaced(("matchLabelKeys", "needs a labelSelector"))
        return self

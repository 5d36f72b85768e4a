"""Who may do what: the roles' rights, as a table and a pure decision.

A request is a verb on a resource, in a namespace or in none; the words are Kubernetes' own. Three facts decide: the
role, whether the token counts for that namespace, and, of a change, what it touches (`beyond`).

Three things are kept from operators, since each would make more of one than the word says:

- A VM's `domainTemplate` is any libvirt XML, which can name any program and any file of the host: who may write it is
  root on all hosts. So it takes an admin of all namespaces.
- Labels and taints of nodes decide where everybody's VMs run, and so does the policy of rebalancing; an operator may
  cordon, empty nodes and fill them again, and have the policy obeyed now.
- Whoever says how a node is fenced, or that a lost one is off, can make VMs run twice: that takes an admin.

Nothing that is in no namespace is shown to a token for some namespaces, but its own namespaces by name: what is there
(nodes, classes) tells of other people's machines.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from orchestrator.resources import Node, Resource, Role, VirtualMachine

READ: Final = frozenset({"get", "list", "watch"})
NAMESPACES: Final = "namespaces"
"""With a name, a request on one is in the namespace of that name, as Kubernetes counts it."""

_VMS = "virtualmachines"
_OPERATIONS = "virtualmachineoperations"
_CLASSES = "virtualmachineclasses"
_NODES = "nodes"
_DRAINS = "nodedrains"
_MAINTENANCES = "maintenances"
_POLICIES = "rebalancepolicies"
_FENCINGS = "nodefencings"
IN_NAMESPACES: Final = frozenset({_VMS, _OPERATIONS, "pods", "pods/eviction", "events"})
"""What is in a namespace; all else is in none."""

_RANK: Final = {Role.VIEWER: 0, Role.OPERATOR: 1, Role.ADMIN: 2}


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table: from this role on, these verbs on these resources.

    Attributes:
        role: The least that may.
        verbs: Empty: all.
        resources: Empty: all that are in namespaces, or, of a token for all, all.
    """

    role: Role
    verbs: frozenset[str]
    resources: frozenset[str]

    def is_for(self, role: Role) -> bool:
        """Whether it gives a role something."""
        return _RANK[role] >= _RANK[self.role]

    def covers(self, role: Role, verb: str, resource: str) -> bool:
        """Whether it gives this."""
        return (
            self.is_for(role)
            and (not self.verbs or verb in self.verbs)
            and (not self.resources or resource in self.resources)
        )


def _rule(role: Role, verbs: Collection[str] = (), resources: Collection[str] = ()) -> Rule:
    return Rule(role, frozenset(verbs), frozenset(resources))


RULES: Final = (
    _rule(Role.VIEWER, READ, {_VMS, _OPERATIONS, "pods", "events", _NODES, _CLASSES, NAMESPACES}),
    _rule(Role.VIEWER, READ, {_DRAINS, _MAINTENANCES, _POLICIES, _FENCINGS, "leases"}),
    _rule(  # they say what would be, and do nothing
        Role.VIEWER,
        {"create"},
        {
            f"{_DRAINS}/plan",
            f"{_POLICIES}/plan",
            f"{_NODES}/failures",
            f"{_NODES}/overview",
            f"{_FENCINGS}/disarmed",
        },
    ),
    _rule(Role.OPERATOR, {"create", "update", "patch", "delete"}, {_VMS}),
    _rule(Role.OPERATOR, {"create", "delete"}, {_OPERATIONS}),
    _rule(Role.OPERATOR, {"create"}, {"pods/eviction"}),
    _rule(Role.OPERATOR, {"update", "patch"}, {_NODES}),  # `unschedulable` alone: see `beyond`
    _rule(Role.OPERATOR, {"create", "update", "patch", "delete"}, {_DRAINS, _MAINTENANCES}),
    _rule(Role.OPERATOR, {"create"}, {f"{_NODES}/uncordon", f"{_DRAINS}/cancel", f"{_POLICIES}/run"}),
    _rule(
        Role.OPERATOR,
        {"create"},
        {f"{_MAINTENANCES}/{action}" for action in ("pause", "resume", "stop", "claimhook", "renewhook", "endhook")},
    ),
    _rule(Role.ADMIN),
)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks.

    Attributes:
        name: Of the token.
        namespaces: Where the role counts; None: everywhere.
        uid: Of the token's document: one that was revoked and made anew under its name is another.
        expires_at: When the token is worth nothing any more; None: never.
    """

    name: str
    role: Role
    namespaces: frozenset[str] | None
    uid: str = ""
    expires_at: datetime | None = None

    def __str__(self) -> str:
        """Give it as messages name it."""
        if self.namespaces is None:
            return f'"{self.name}" ({self.role})'
        return f'"{self.name}" ({self.role} in {", ".join(sorted(self.namespaces))})'


def is_allowed(identity: Identity, verb: str, resource: str, namespace: str | None) -> bool:
    """Decide one request.

    Args:
        identity: Who asks.
        verb: `get`, `list`, `watch`, `create`, `update`, `patch` or `delete`.
        resource: In the plural, with its subresource: `pods/eviction`.
        namespace: None for what is in none, and for all namespaces at once.
    """
    if not any(rule.covers(identity.role, verb, resource) for rule in RULES):
        return False
    if identity.namespaces is None:
        return True
    if namespace not in identity.namespaces:
        return False
    return resource in IN_NAMESPACES or (resource == NAMESPACES and verb == "get")


def beyond(identity: Identity, old: Resource | None, new: Resource) -> str | None:
    """Say what a change touches that is not its maker's to touch; None when nothing.

    Args:
        identity: Who makes it; the request as such is allowed.
        old: As it is stored; None: it is created.
        new: As it would be.
    """
    if identity.role is Role.ADMIN and identity.namespaces is None:
        return None
    match new:
        case VirtualMachine():
            before = old.spec.domain_template if isinstance(old, VirtualMachine) else None
            if new.spec.domain_template and new.spec.domain_template != before:
                return "spec.domainTemplate is any libvirt XML and takes an admin of all namespaces"
        case Node() if isinstance(old, Node):
            spec = new.spec.with_(unschedulable=old.spec.unschedulable)
            if (spec, new.metadata.labels, new.metadata.annotations) != (
                old.spec,
                old.metadata.labels,
                old.metadata.annotations,
            ):
                return "all but spec.unschedulable takes an admin"
    return None

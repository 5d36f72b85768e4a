"""What `lua/lease.lua` does, in memory, for runs of many thousand renewals. tests/contract holds the two together."""

from dataclasses import dataclass, field

from orchestrator.lease import Lease, Membership, Reply


@dataclass
class LeaseTable:
    """The leases of a herd.

    Attributes:
        membership: As it is published.
        suspicions: Node to id.
        taken_over: Node to boot id.
    """

    membership: Membership = field(default_factory=Membership)
    leases: dict[str, Lease] = field(default_factory=dict)
    suspicions: dict[str, str] = field(default_factory=dict)
    taken_over: dict[str, str] = field(default_factory=dict)

    def renew(self, node: str, lease: Lease, held: int) -> Reply:
        """Renew a lease."""
        refused = ""
        old = self.leases.get(node)
        if self.taken_over.get(node) == lease.boot_id:
            refused = "taken over"
        elif old is not None and old.boot_id == lease.boot_id and old.created >= lease.created:
            refused = "" if old.identity == lease.identity else "outdated"
        if not refused:
            self.leases[node] = lease
        others = {name: found for name, found in self.suspicions.items() if name != node}
        return Reply(refused, others, None if held == self.membership.version else self.membership)

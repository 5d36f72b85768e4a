"""Every key in Redis: its type, its owner and its expiry.

Owner "control" is the control plane; a node may at most read such a key. Owner "node" is one node, and its ACL lets it
write nothing else (`store.access`). Nothing that a node can write decides about slots, placement or ownership.

Keys with an expiry state it beside their name. Those without are kept for as long as what they describe exists, and
are removed by the commit that ends it:

| key | type | owner | expiry |
|---|---|---|---|
| `version` | string | control | none: the counter of all changes |
| `epoch` | string | control | none: the counter of all grants |
| `identity` | hash | control | none: which Redis this is, and whether the herd is in recovery |
| `resources:<Kind>` | hash key -> document | control | none; an Event is deleted after an hour by housekeeping |
| `changes` | stream | control | bounded, about 100,000 entries |
| `request:<id>` | string | control | 10 min: the answer to a commit, given again to a client that retries |
| `schedulable` | set of nodes | control | none; index of Node |
| `vm-uids` | hash uid -> VM | control | none; index of VMs: a uid is one domain in the whole herd |
| `active-operations` | hash VM -> operation | control | none; index, ends with the operation |
| `open-grants` | hash VM -> operation | control | none; index: one open grant a VM; ends with the grant |
| `adopted` | hash uid -> definition | control | none; how a domain was defined when it was adopted, **with its
  secrets**: in no document, event or log; ends with its VM |
| `answers:<id>` | list | control | 10 min: what an agent told of its domains, or saw of another host |
| `claims:<node>` | hash -> "MiB millicores" | control | none; index of VMs; reservations end with their grant |
| `slots:cluster`, `slots:outbound:<node>`, `slots:inbound:<node>` | set of operations | control | none: a
  grant that ran out is suspect and keeps its slots until it is settled |
| `deadlines` | zset operation -> ms | control | none; ends with the grant |
| `awaiting` | zset operation, order or `drain/<node>` -> ms | control | none; ends with the report, or the drain |
| `grants:<node>`, `orders:<node>` | hash | control, readable by the node | none; ends with the grant, the answer |
| `wake:<node>` | stream | control, readable by the node | bounded, 64 entries: wake-ups carry no truth |
| `cursors` | hash node -> report id | control | none: how far each node's reports are read |
| `rebalance:scan` | string | control | the interval of the policy: a scan was begun |
| `placements` | hash | control | none: `count` of the grants that placed a VM; tells whether rules were checked
  against all of them |
| `wanted:<task>` | string | control | 5 s: a wake-up that is on its way |
| `tick:<name>:<n>` | string | control | 10 periods: this tick was sent |
| `membership` | string | control, readable by nodes | none: who votes, with a version that grows (TAKEOVER.md,
  rule 10) |
| `membership-next` | string | control | none: the one that is published next, or was last; written first, so that no
  failover loses one that somebody may have read |
| `peer-key` | string | control, readable by nodes | none: by which members speak to each other; new when one is
  expelled |
| `suspicions` | hash node -> "id generation sequence Redis" | control, readable by nodes | none; ends with the node's
  renewal, or with its takeover |
| `taken-over:<node>` | string "boot-id generation" | control, readable by the node | none: this boot renews no more;
  ends when the node came back |
| `disarmed` | hash node or `*` -> why | control | none: where failover is disarmed, until a person arms it |
| `fencing:<node>` | string | control | 10 min: a fence agent runs for this node; gone when it has ended |
| `bmc-on:<node>` | string | control | 10 min: its BMC was read as on, while its lease was fresh |
| `disarm:<node>` | string | control, readable by the node | none: why its watchdog is to be disarmed |
| `node:{<n>}:lease` | string | node | 7 days, far beyond any decision made on it |
| `node:{<n>}:agent` | string | node | 7 days: its agent's last sign of life |
| `node:{<n>}:use` | string | node | 1 min: what is in use of its host, for people to look at |
| `node:{<n>}:counter`, `node:{<n>}:reports` | string, stream | node | none; the stream is trimmed by intake,
  and bounded at 10,000 |
| `node:{<n>}:claim:<epoch>` | string | node | 1 day: this grant was taken by a worker |
| `node:{<n>}:request:<id>` | string | node | 10 min: this report was written |
| `console-session:<digest>` | string | control | 12 h: who is signed in to the console; ends when they sign out |
| `celery-task-meta-<id>` | string | Celery | 1 day (`result_expires`) |
| `control`, `liveness`, `fencing`, `node.<n>.migrate`, `node.<n>.lifecycle` | list | Celery | none: queues of messages,
  emptied by their workers; ticks expire unread |
| `_kombu.binding.<queue>`, `_kombu.binding_permanent.<queue>` | set | Celery | none: one of each a queue |
| `unacked`, `node.<n>.<role>.unacked` | hash | Celery | none: what a worker has taken and not yet acknowledged |
| `unacked_index`, `node.<n>.<role>.unacked_index` | zset | Celery | none: likewise |
| `unacked_mutex`, `node.<n>.<role>.unacked_mutex` | string | Celery | 5 min, its own |

The tests read this table: what they find in Redis must stand here.
"""

VERSION = "version"
EPOCH = "epoch"
IDENTITY = "identity"
CHANGES = "changes"
CHANGES_MAX = 100_000
SCHEDULABLE = "schedulable"
PLACEMENTS = "placements"
REBALANCE_SCAN = "rebalance:scan"
ACTIVE_OPERATIONS = "active-operations"
OPEN_GRANTS = "open-grants"
VM_UIDS = "vm-uids"
ADOPTED = "adopted"
SLOTS_CLUSTER = "slots:cluster"
DEADLINES = "deadlines"
AWAITING = "awaiting"
CURSORS = "cursors"
MEMBERSHIP = "membership"
MEMBERSHIP_NEXT = "membership-next"
PEER_KEY = "peer-key"
DISARMED = "disarmed"
DISARMED_ALL = "*"
"""Field of `DISARMED`: the whole herd. No node is called so."""
SUSPICIONS = "suspicions"

REQUEST_TTL_MS = 600_000
WANTED_TTL_MS = 5_000
ANSWERS_TTL_MS = 600_000
BMC_ON_TTL_MS = 600_000
"""For so long a reading of a BMC shows that it is the node's own (TAKEOVER.md, evidence 1)."""
FENCING_TTL_MS = 150_000
USE_KEPT_MS = 60_000
LEASE_KEPT_MS = 7 * 86_400_000
CLAIM_TTL_MS = 86_400_000
REPORTS_MAX = 10_000
WAKE_MAX = 64


def resources(kind: str) -> str:
    """All documents of a kind."""
    return f"resources:{kind}"


def claims(node: str) -> str:
    """Memory and CPU of a node that are taken or reserved."""
    return f"claims:{node}"


def slots_outbound(node: str) -> str:
    """Migrations that leave a node."""
    return f"slots:outbound:{node}"


def slots_inbound(node: str) -> str:
    """Migrations that reach a node."""
    return f"slots:inbound:{node}"


def claim(node: str, epoch: int) -> str:
    """Which process of a node has taken a grant."""
    return f"{node_prefix(node)}claim:{epoch}"


def grants(node: str) -> str:
    """What the node may do now."""
    return f"grants:{node}"


def orders(node: str) -> str:
    """What the node is to answer."""
    return f"orders:{node}"


def wake(node: str) -> str:
    """Wakes the node's processes."""
    return f"wake:{node}"


def answers(order_id: str) -> str:
    """What a node answered to one question, for whoever asked."""
    return f"answers:{order_id}"


def wanted(task: str) -> str:
    """Marks that a wake-up of a task is on its way."""
    return f"wanted:{task}"


def console_session(digest: str) -> str:
    """A session of the console, by the digest of what its browser holds."""
    return f"console-session:{digest}"


def tick(name: str, number: int) -> str:
    """Marks a beat tick as sent."""
    return f"tick:{name}:{number}"


def taken_over(node: str) -> str:
    """The boot of a node that was taken over: its renewals are refused."""
    return f"taken-over:{node}"


def fencing(node: str) -> str:
    """Held while a fence agent runs for a node."""
    return f"fencing:{node}"


def bmc_on(node: str) -> str:
    """That its BMC was read as on, while its lease was fresh."""
    return f"bmc-on:{node}"


def disarm(node: str) -> str:
    """Why a node's watchdog is to be disarmed, while it is there."""
    return f"disarm:{node}"


def node_prefix(node: str) -> str:
    """All that a node may write. The closing brace keeps `n1` out of `n10`."""
    return f"node:{{{node}}}:"


def lease(node: str) -> str:
    """The node's lease."""
    return node_prefix(node) + "lease"


def agent(node: str) -> str:
    """The last sign of life of the node's agent."""
    return node_prefix(node) + "agent"


def use(node: str) -> str:
    """What is in use of a node's host."""
    return f"{node_prefix(node)}use"


def counter(node: str) -> str:
    """Number of the node's last report."""
    return node_prefix(node) + "counter"


def reports(node: str) -> str:
    """The node's reports; an entry's id is `<counter>-0`."""
    return node_prefix(node) + "reports"

"""Who is where, and whether one more may come: the rules between VMs, checked against a working picture of the herd.

The picture is changed as a plan grows (`put`), so that each next decision sees those before it. VMs are counted by term
and place, which makes a question cost what the rules of one VM cost, whatever the size of the herd.

A VM in migration is on both of its nodes: it keeps others away from both, and is company on neither unless both count
as one place. A VM's own presence never speaks for or against it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from orchestrator.planner.rules import Resident, Spread, Term
from orchestrator.planner.snapshot import NodeState
from orchestrator.resources import Key

HOSTNAME = "kubernetes.io/hostname"


@dataclass(slots=True)
class _Group:
    """All that concerns one term; places are values of its label.

    Attributes:
        meant: VMs that it means, by place.
        kept_apart: VMs that must have none of them in their place, by place.
        liked: Sum of the weights of VMs that would rather have them near, less those that would not, by place.
        dependants: VMs that need one of them near, or are spread over it.
    """

    term: Term
    meant: dict[str, set[Key]] = field(default_factory=lambda: defaultdict(set))
    kept_apart: dict[str, set[Key]] = field(default_factory=lambda: defaultdict(set))
    liked: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    dependants: set[Key] = field(default_factory=set)


class Neighbours:
    """The working picture.

    Args:
        nodes: By name; their labels and taints.
        residents: VMs, with where they are.
    """

    def __init__(self, nodes: Mapping[str, NodeState], residents: Iterable[Resident]) -> None:
        self._nodes = nodes
        self._known: dict[Key, Resident] = {}
        self._at: dict[Key, tuple[str, ...]] = {}
        self._groups: dict[Term, _Group] = {}
        self._meant_by: dict[Key, list[_Group]] = defaultdict(list)
        self._by_label: dict[tuple[str, str], set[Key]] | None = None
        self._places_by_key: dict[str, dict[str, str]] = {}
        self._terms_by_label: dict[tuple[str, str] | None, list[_Group]] = defaultdict(list)
        self._spread_over: dict[tuple[Key, Spread], dict[str, frozenset[str]]] = {}
        with_rules = []
        for one in sorted(residents, key=lambda one: one.key):  # which of several obstacles is named hangs on the order
            self._known[one.key] = one
            self._at[one.key] = one.nodes
            if one.rules:
                with_rules.append(one)
        for one in with_rules:
            self._own(one)

    def __contains__(self, key: Key) -> bool:
        """Whether a VM is in the picture."""
        return key in self._known

    def add(self, one: Resident) -> None:
        """Take a VM into the picture, or put it anew where it was known."""
        old = self._known.get(one.key)
        if old is not None and old.rules == one.rules and old.labels == one.labels:
            self.put(one.key, one.nodes)
            return
        if old is not None:
            self.remove(one.key)
        self._known[one.key] = one
        self._at[one.key] = ()
        if self._by_label is not None:
            for pair in one.labels.items():
                self._by_label[pair].add(one.key)
        for group in self._candidates(one):
            if group.term.means(one.namespace, one.labels):
                self._meant_by[one.key].append(group)
        if one.rules:
            self._own(one)
        self.put(one.key, one.nodes)

    def remove(self, key: Key) -> None:
        """Take a VM out of the picture."""
        self.put(key, ())
        one = self._known.pop(key)
        del self._at[key]
        self._meant_by.pop(key, None)
        for group in self._groups.values() if one.rules else ():
            group.dependants.discard(key)
        if self._by_label is not None:
            for pair in one.labels.items():
                self._by_label[pair].discard(key)

    def where(self, key: Key) -> tuple[str, ...]:
        """Give the nodes on which a VM is."""
        return self._at[key]

    def put(self, key: Key, nodes: tuple[str, ...]) -> None:
        """Say where a VM is now."""
        old = self._at[key]
        if old == nodes:
            return
        self._at[key] = nodes
        one = self._known[key]
        for group in self._meant_by.get(key, ()):
            _replace(group.meant, key, self._places(group.term, old), self._places(group.term, nodes))
        for term in one.rules.apart:
            _replace(self._groups[term].kept_apart, key, self._places(term, old), self._places(term, nodes))
        for sign, terms in ((1, one.rules.rather_near), (-1, one.rules.rather_apart)):
            for weight, term in terms:
                liked = self._groups[term].liked
                for place in self._places(term, old):
                    liked[place] -= sign * weight
                for place in self._places(term, nodes):
                    liked[place] += sign * weight

    def is_bound(self, key: Key) -> bool:
        """Whether any rule, its own or another's, concerns a VM."""
        return bool(self._known[key].rules) or bool(self._meant_by.get(key))

    def bound(self) -> Iterator[Key]:
        """Give the VMs that rules concern, in order."""
        yield from sorted(key for key in self._known if self.is_bound(key))

    def related(self, key: Key) -> set[Key]:
        """Give the VMs whose moves may make or break a rule for this one, or the other way round; itself not."""
        one = self._known[key]
        groups = list(self._meant_by.get(key, ()))
        groups += [self._groups[term] for term in _required_terms(one)]
        found: set[Key] = set()
        for group in groups:
            found |= group.dependants
            found = found.union(*group.meant.values(), *group.kept_apart.values())
        return found - {key}

    def obstacle(self, key: Key, node: str) -> str:
        """Say which rule keeps a VM off a node; empty when none does.

        Args:
            key: Of the picture; where it is itself does not count.
            node: One of the nodes.
        """
        one = self._known[key]
        for group in self._meant_by.get(key, ()):
            if group.kept_apart and (other := self._other(group.kept_apart, group.term, node, key)) is not None:
                return f"anti-affinity with {self._name(one, other)}"
        if not one.rules:
            return ""
        for term in one.rules.apart:
            if (other := self._other(self._groups[term].meant, term, node, key)) is not None:
                return f"anti-affinity with {self._name(one, other)}"
        if one.rules.near and (why := self._lonely(one, node)):
            return why
        return next((why for spread in one.rules.spreads if (why := self._uneven(one, spread, node))), "")

    def liking(self, key: Key, node: str) -> int:
        """Sum the weights that speak for a node: of its own preferences, and of others' for or against it."""
        one, total = self._known[key], 0
        for group in self._meant_by.get(key, ()):
            if group.liked and (place := self._place(group.term, node)) is not None:
                own = self._own_liking(one, group.term) if place in self._places(group.term, self._at[key]) else 0
                total += group.liked.get(place, 0) - own
        for sign, terms in ((1, one.rules.rather_near), (-1, one.rules.rather_apart)):
            for weight, term in terms:
                if (place := self._place(term, node)) is not None:
                    total += sign * weight * len(self._groups[term].meant.get(place, set()) - {key})
        for spread in one.rules.spreads:
            if not spread.is_required:
                total -= self._skew(one, spread, node)
        return total

    def has_wishes(self, key: Key) -> bool:
        """Whether any preference, its own or another's, concerns a VM: otherwise `liking` is 0 for each node."""
        rules = self._known[key].rules
        own = rules.rather_near or rules.rather_apart or any(not spread.is_required for spread in rules.spreads)
        return bool(own) or any(group.liked for group in self._meant_by.get(key, ()))

    def breaks(self, key: Key, node: str, is_excused: Callable[[Key], bool] = lambda _: False) -> str:
        """Say whose rule would be broken if a VM were on this node alone; empty when nobody's that holds now.

        Args:
            key: Of the picture.
            node: One of the nodes.
            is_excused: Tells VMs whose rules don't count, since they can't stay where they are anyway.
        """
        old = self._at[key]
        others = set[Key]().union(*(group.dependants for group in self._meant_by.get(key, ()))) - {key}
        whole = [other for other in sorted(others) if not is_excused(other) and not self._violation(other)]
        if not whole:
            return ""
        self.put(key, (node,))
        broken = next((other for other in whole if self._violation(other)), None)
        self.put(key, old)
        return f"{self._name(self._known[key], broken)} needs it where it is" if broken is not None else ""

    def violations(self) -> dict[Key, str]:
        """Give the VMs whose rules are broken where they are, in order, with the reason."""
        return {key: why for key in self.bound() if (why := self._violation(key))}

    def _violation(self, key: Key) -> str:
        nodes = self._at[key]
        return self.obstacle(key, nodes[0]) if len(nodes) == 1 else ""

    def _name(self, one: Resident, other: Key) -> str:
        known = self._known[other]
        return known.name if known.namespace == one.namespace else str(other)

    def _place(self, term: Term, node: str) -> str | None:
        """Give a node's value of a term's label; a host's name is its own without a label too."""
        key = term.topology_key
        places = self._places_by_key.get(key)
        if places is None:
            own = {name: name for name in self._nodes} if key == HOSTNAME else {}
            told = {name: value for name, state in self._nodes.items() if (value := state.labels.get(key)) is not None}
            places = self._places_by_key[key] = own | told
        return places.get(node)

    def _other(self, places: Mapping[str, set[Key]], term: Term, node: str, but: Key) -> Key | None:
        """Give the first VM in a node's place that is not this one."""
        place = self._place(term, node)
        keys = places.get(place) if place is not None else None
        if not keys or (len(keys) == 1 and but in keys):
            return None
        return min(key for key in keys if key != but)

    def _places(self, term: Term, nodes: tuple[str, ...]) -> set[str]:
        return {place for node in nodes if (place := self._place(term, node)) is not None}

    def _lonely(self, one: Resident, node: str) -> str:
        """Say which company a VM would lack; the first of a group that means itself needs none."""
        near = one.rules.near
        company = [group.meant for group in (self._groups[term] for term in near)]
        common = set[Key]().union(*company[0].values()) - {one.key}
        for meant in company[1:]:
            common &= set[Key]().union(*meant.values())
        places = [self._place(term, node) for term in near]
        lacking = next((term for term, place in zip(near, places, strict=True) if place is None), None)
        if lacking is not None:
            return f"without label {lacking.topology_key}"
        if not common and all(term.means(one.namespace, one.labels) for term in near):
            return ""
        for term, place in zip(near, places, strict=True):
            if not any(self._places(term, self._at[other]) == {place} for other in common if self._at[other]):
                return f"not near {term.words} ({term.topology_key})"
        return ""

    def _uneven(self, one: Resident, spread: Spread, node: str) -> str:
        if not spread.is_required:
            return ""
        key = spread.term.topology_key
        if self._place(spread.term, node) is None:
            return f"without label {key}"
        if self._skew(one, spread, node) > spread.max_skew:
            return f"uneven over {key} (maxSkew {spread.max_skew})"
        return ""

    def _skew(self, one: Resident, spread: Spread, node: str) -> int:
        """Count by how many VMs a node's place would be ahead of the least populated one."""
        place = self._place(spread.term, node)
        if place is None:
            return 0
        over = self._domains(one, spread)
        meant = self._groups[spread.term].meant
        here = len(self._counted(meant.get(place), one.key, over.get(place, frozenset())))
        least = 0
        if over and len(over) >= spread.min_domains:
            least = min(self._settled(meant.get(other), one.key, nodes) for other, nodes in over.items())
        return here + spread.term.means(one.namespace, one.labels) - least

    def _counted(self, keys: set[Key] | None, but: Key, nodes: frozenset[str]) -> list[Key]:
        return [key for key in keys or () if key != but and not nodes.isdisjoint(self._at[key])]

    def _settled(self, keys: set[Key] | None, but: Key, nodes: frozenset[str]) -> int:
        return sum(key != but and nodes.issuperset(self._at[key]) for key in keys or ())

    def _domains(self, one: Resident, spread: Spread) -> dict[str, frozenset[str]]:
        """Give the nodes that count for a VM's spread, by place."""
        found = self._spread_over.get((one.key, spread))
        if found is None:
            nodes: dict[str, set[str]] = defaultdict(set)
            keys = [part.term.topology_key for part in one.rules.spreads if part.is_required == spread.is_required]
            wanted = one.spread_over
            for name, state in self._nodes.items():
                place = self._place(spread.term, name)
                if place is None or any(key not in state.labels and key != HOSTNAME for key in keys):
                    continue
                if wanted is not None and spread.honours_selectors and wanted.unmet(name, state.labels):
                    continue
                if wanted is not None and spread.honours_taints and wanted.repelled(state.taints):
                    continue
                nodes[place].add(name)
            found = {place: frozenset(names) for place, names in nodes.items()}
            self._spread_over[one.key, spread] = found
        return found

    def _own_liking(self, one: Resident, term: Term) -> int:
        near = sum(weight for weight, part in one.rules.rather_near if part == term)
        return near - sum(weight for weight, part in one.rules.rather_apart if part == term)

    def _own(self, one: Resident) -> None:
        """Take in the rules of a VM that is known."""
        rules, nodes = one.rules, self._at[one.key]
        for term in rules.near:
            self._group(term).dependants.add(one.key)
        for spread in rules.spreads:
            group = self._group(spread.term)
            if spread.is_required:
                group.dependants.add(one.key)
        for term in rules.apart:
            _replace(self._group(term).kept_apart, one.key, set(), self._places(term, nodes))
        for sign, terms in ((1, rules.rather_near), (-1, rules.rather_apart)):
            for weight, term in terms:
                group = self._group(term)
                for place in self._places(term, nodes):
                    group.liked[place] += sign * weight

    def _group(self, term: Term) -> _Group:
        group = self._groups.get(term)
        if group is not None:
            return group
        group = self._groups[term] = _Group(term)
        pair = _equality(term)
        self._terms_by_label[pair].append(group)
        for key in sorted(self._labelled(pair)):
            one = self._known[key]
            if term.means(one.namespace, one.labels):
                self._meant_by[key].append(group)
                _replace(group.meant, key, set(), self._places(term, self._at[key]))
        return group

    def _labelled(self, pair: tuple[str, str] | None) -> Iterable[Key]:
        if pair is None:
            return self._known
        if self._by_label is None:
            self._by_label = defaultdict(set)
            for one in self._known.values():
                for item in one.labels.items():
                    self._by_label[item].add(one.key)
        return self._by_label.get(pair, ())

    def _candidates(self, one: Resident) -> Iterator[_Group]:
        yield from self._terms_by_label[None]
        for pair in one.labels.items():
            yield from self._terms_by_label.get(pair, ())


def _equality(term: Term) -> tuple[str, str] | None:
    """Give a label that all VMs have that a term means, to look them up by; None where it says none."""
    for need in term.needs or ():
        if need.operator == "In" and len(need.values) == 1:
            return need.key, need.values[0]
    return None


def _required_terms(one: Resident) -> list[Term]:
    return [*one.rules.near, *one.rules.apart, *(spread.term for spread in one.rules.spreads if spread.is_required)]


def _replace(places: dict[str, set[Key]], key: Key, old: set[str], new: set[str]) -> None:
    for place in old - new:
        places[place].discard(key)
    for place in new - old:
        places[place].add(key)

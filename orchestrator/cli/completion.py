"""Names for the shell's completion: asked of the herd, with little patience.

Whoever presses Tab waits: a herd that doesn't answer within a second completes nothing, and says nothing, as it
would stand in the middle of the line that is being written.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from orchestrator.errors import VmherdError
from orchestrator.resources import DEFAULT_NAMESPACE, Node, Resource, VirtualMachine

PATIENCE_S: Final = 1.0
_MOST: Final = 500
_KINDS: Final = ("vm", "vmclass", "vmop", "node", "event")


def complete_vms(ctx: Any, incomplete: str) -> list[str]:
    """VMs of the namespace that was given, without those that stand there already."""
    namespace = ctx.params.get("namespace") or DEFAULT_NAMESPACE
    given = ctx.params.get("vms") or ()
    return _names(VirtualMachine, namespace, incomplete, given)


def complete_nodes(ctx: Any, incomplete: str) -> list[str]:
    """Nodes, without those that stand there already."""
    return _names(Node, None, incomplete, ctx.params.get("nodes") or ())


def complete_kinds(incomplete: str) -> list[str]:
    """The short names of kinds."""
    return [kind for kind in _KINDS if kind.startswith(incomplete)]


def complete_names(ctx: Any, incomplete: str) -> list[str]:
    """Names of the kind that was given."""
    from orchestrator.cli.arguments import parse_kind  # noqa: PLC0415 - which takes its completion from here

    try:
        kind = parse_kind(str(ctx.params.get("kind", "")))
    except Exception:  # noqa: BLE001 - a half-written line is no error
        return []
    namespace = (ctx.params.get("namespace") or DEFAULT_NAMESPACE) if kind.namespaced else None
    return _names(kind, namespace, incomplete, ctx.params.get("names") or ())


def _names(kind: type[Resource], namespace: str | None, incomplete: str, given: Sequence[str]) -> list[str]:
    found = in_time(lambda: [r.name for r in _all(kind) if namespace is None or r.metadata.namespace == namespace])
    return sorted(name for name in found if name.startswith(incomplete) and name not in given)[:_MOST]


def _all(kind: type[Resource]) -> list[Any]:
    from orchestrator.cli.acting import open_client  # noqa: PLC0415 - only when a name is completed

    with open_client() as client:
        return list(client.all(kind))


def in_time(ask: Callable[[], list[str]]) -> list[str]:
    """Give an answer, or nothing when it fails or takes too long."""
    answers: list[list[str]] = []

    def run() -> None:
        try:
            answers.append(ask())
        except (VmherdError, OSError):
            return  # see the module's docstring

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return answers[0] if answers else []

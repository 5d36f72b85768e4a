"""A herd that comes up: its nodes become Ready, its VMs are created and run; shown meanwhile."""

from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.cli.acting import open_context
from orchestrator.cli.progress import counting
from orchestrator.client import Scope
from orchestrator.client.following import follow
from orchestrator.client.local import LocalClient
from orchestrator.resources import Node, Resource, VirtualMachine, VmPhase
from orchestrator.services.manifests import create_resource, read_manifest
from orchestrator.store import Change, ChangeType
from orchestrator.store.store import Loaded


class Tally:
    """Which nodes are Ready and which VMs run, as far as it was told."""

    def __init__(self) -> None:
        self._ready: set[str] = set()
        self._running: set[str] = set()

    @property
    def ready(self) -> int:
        """How many nodes are Ready."""
        return len(self._ready)

    @property
    def running(self) -> int:
        """How many VMs run."""
        return len(self._running)

    def take(self, news: Loaded | Change | None) -> None:
        """Take what `follow` gives."""
        match news:
            case Loaded():
                for found in news.resources.values():
                    for resource in found.values():
                        self._take(resource, is_gone=False)
            case Change():
                self._take(news.resource, is_gone=news.type is ChangeType.DELETED)
            case None:
                pass

    def _take(self, resource: Resource, *, is_gone: bool) -> None:
        if isinstance(resource, Node):
            counted, counts = self._ready, resource.is_ready
        elif isinstance(resource, VirtualMachine):
            counted, counts = self._running, resource.status.phase is VmPhase.RUNNING
        else:
            return
        if counts and not is_gone:
            counted.add(resource.key)
        else:
            counted.discard(resource.key)


def wait_until_up(nodes: int, manifests: Sequence[dict[str, Any]], check: Callable[[str], None]) -> None:
    """Wait until the nodes are Ready, create the VMs, and wait until those run; shown meanwhile.

    Args:
        nodes: How many.
        manifests: Of the VMs.
        check: Called at least once a second with how far it is; raises if it is not to be waited for any more.
    """
    tally, are_created = Tally(), False
    with counting(tells_done=True) as show, open_context() as ctx:
        for news in follow(LocalClient(ctx), Scope((Node, VirtualMachine)), lambda _: None, is_patient=True):
            tally.take(news)
            check(f"{tally.ready} of {nodes} nodes are Ready, {tally.running} of {len(manifests)} VMs run")
            show.update("nodes Ready", tally.ready, nodes)
            if not are_created and tally.ready >= nodes:
                are_created = True
                for number, manifest in enumerate(manifests, start=1):
                    create_resource(ctx, read_manifest(manifest))
                    show.update("VMs created", number, len(manifests))
            if are_created and manifests:
                show.update("VMs Running", tally.running, len(manifests))
            if are_created and tally.running >= len(manifests):
                return

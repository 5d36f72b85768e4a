"""The official Kubernetes client for Python, unmodified, with a kubeconfig as `vmherd kubeconfig` writes it."""

import threading
from collections.abc import Iterator
from typing import Any

import kubernetes
import pytest
import urllib3
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import ConflictError, ForbiddenError, NotFoundError, UnprocessibleEntityError

from orchestrator.resources import VirtualMachine, VmPhase
from orchestrator.store import keys
from tests.integration.command import Vmherd
from tests.kubectl import ApiProcess
from tests.processes import Processes
from tests.redis_server import RedisServer
from tests.waiting import wait_until

GROUP_VERSION = "virtualization.deckhouse.io/v1alpha2"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    folder = tmp_path_factory.mktemp("api")
    redis = RedisServer(folder / "redis")
    redis.start()
    with Processes(redis.url, folder) as processes:
        yield ApiProcess(processes, folder, redis.url, VMHERD_API_HISTORY="200").wait_ready()
    redis.kill()


@pytest.fixture
def herd(server: ApiProcess) -> Iterator[Vmherd]:
    herd = Vmherd(server.environment["VMHERD_REDIS_URL"])
    for vm in herd.store.all(VirtualMachine):
        herd.store.must_commit(herd.store.batch().delete(vm))
    for operation in herd.operations():
        herd.store.must_commit(herd.store.batch().delete(operation))
    yield herd
    herd.store.close()


@pytest.fixture
def client(server: ApiProcess, herd: Vmherd) -> DynamicClient:
    return a_client(server)


def a_client(server: ApiProcess) -> DynamicClient:
    kubeconfig = str(server.kubeconfig())
    return DynamicClient(kubernetes.config.new_client_from_config(config_file=kubeconfig))  # type: ignore[no-untyped-call]


def evict(vm: str) -> dict[str, Any]:
    return {
        "apiVersion": GROUP_VERSION,
        "kind": "VirtualMachineOperation",
        "metadata": {"generateName": f"evict-{vm}-"},
        "spec": {"virtualMachineName": vm, "type": "Evict"},
    }


class Follower:
    """Follows VMs as a program does: it lists, watches, begins again where it was, and lists again after a 410.

    Attributes:
        seen: (type, counter) of each event, in order.
        lists: How often it has listed.
    """

    def __init__(self, client: DynamicClient, version: str = "") -> None:
        self._vms = client.resources.get(api_version=GROUP_VERSION, kind="VirtualMachine")
        self.seen: list[tuple[str, int]] = []
        self.lists = 0
        self.interruptions = 0
        self._over = threading.Event()
        self._version = version
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                if not self._version:
                    self._version = self._vms.get(namespace="default").metadata.resourceVersion
                    self.lists += 1
                for event in self._vms.watch(namespace="default", resource_version=self._version, timeout=5):
                    raw = event["raw_object"]
                    self._version = raw["metadata"]["resourceVersion"]
                    self.seen.append((event["type"], raw["status"]["counter"]))
                    if self._over.is_set():
                        return
            except kubernetes.client.exceptions.ApiException as error:
                if error.status == 410:
                    self._version = ""
            except (urllib3.exceptions.HTTPError, OSError):
                self.interruptions += 1
                self._over.wait(0.05)


def test_resources_are_found_created_read_and_deleted(herd: Vmherd, client: DynamicClient) -> None:
    herd.running_vm()
    operations = client.resources.get(api_version=GROUP_VERSION, kind="VirtualMachineOperation")
    assert operations.short_names == ["vmop"]
    created = operations.create(body=evict("linux-vm"), namespace="default")
    assert created.metadata.name.startswith("evict-linux-vm-")
    assert created.status.phase == "Pending"
    found = operations.get(name=created.metadata.name, namespace="default")
    assert found.to_dict() == created.to_dict()
    assert [o.metadata.name for o in operations.get(namespace="default").items] == [created.metadata.name]
    assert operations.status.get(name=created.metadata.name, namespace="default").status.phase == "Pending"
    with pytest.raises(ForbiddenError, match="should finish first"):
        operations.create(body=evict("linux-vm"), namespace="default")
    wrong = evict("linux-vm")
    wrong["spec"]["bogus"] = True
    with pytest.raises(UnprocessibleEntityError, match=r"spec\.bogus: unknown field"):
        operations.create(body=wrong, namespace="default")
    operations.delete(name=created.metadata.name, namespace="default")
    with pytest.raises(NotFoundError):
        operations.get(name=created.metadata.name, namespace="default")


def test_patches_and_conflicts(herd: Vmherd, client: DynamicClient) -> None:
    herd.running_vm()
    vms = client.resources.get(api_version=GROUP_VERSION, kind="VirtualMachine")
    old = vms.get(name="linux-vm", namespace="default")
    patch = {"metadata": {"name": "linux-vm", "labels": {"tier": "db"}}}
    new = vms.patch(body=patch, namespace="default", content_type="application/merge-patch+json")
    assert new.metadata.labels.tier == "db"
    document = old.to_dict()
    document["spec"]["memory"]["size"] = "2Gi"
    with pytest.raises(ConflictError, match="changed since it was read"):
        vms.replace(body=document, namespace="default")
    assert vms.get(namespace="default", label_selector="tier=db").items[0].spec.memory.size == "1Gi"


def test_a_watch_goes_on_after_the_server_was_killed(server: ApiProcess, herd: Vmherd, client: DynamicClient) -> None:
    herd.running_vm()
    follower = Follower(client)
    wait_until(lambda: follower.lists == 1, 10, "it has listed")
    for counter in range(1, 11):
        herd.set_vm("linux-vm", counter=counter)
    restarts = server.process.restarts
    server.process.kill()
    for counter in range(11, 31):  # nobody serves while these happen
        herd.set_vm("linux-vm", counter=counter)
    server.process.wait_restarts(restarts + 1, 30)
    server.wait_ready()
    for counter in range(31, 41):
        herd.set_vm("linux-vm", counter=counter)
    wait_until(lambda: ("MODIFIED", 40) in follower.seen, 30, lambda: f"all of it: {follower.seen}")
    follower.stop()
    assert follower.seen == [("MODIFIED", counter) for counter in range(1, 41)], "none lost, none doubled, in order"
    assert follower.lists == 1
    assert follower.interruptions


def test_who_was_away_too_long_lists_again(server: ApiProcess, herd: Vmherd, client: DynamicClient) -> None:
    herd.running_vm()
    vms = client.resources.get(api_version=GROUP_VERSION, kind="VirtualMachine")
    version = vms.get(namespace="default").metadata.resourceVersion
    for counter in range(1, 6):
        herd.set_vm("linux-vm", counter=counter)
    herd.store.redis.xtrim(keys.CHANGES, minid=f"{herd.store.version()}-0", approximate=False)
    restarts = server.process.restarts
    server.process.kill()
    server.process.wait_restarts(restarts + 1, 30)
    server.wait_ready()
    with pytest.raises(kubernetes.client.exceptions.ApiException) as refused:
        list(vms.watch(namespace="default", resource_version=version, timeout=5))
    assert refused.value.status == 410
    follower = Follower(client, version)
    wait_until(lambda: follower.lists >= 1, 20, "it lists again")
    herd.set_vm("linux-vm", counter=99, phase=VmPhase.MIGRATING)
    wait_until(lambda: ("MODIFIED", 99) in follower.seen, 20, lambda: f"{follower.seen}")
    follower.stop()

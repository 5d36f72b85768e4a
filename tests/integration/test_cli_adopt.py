"""`vmherd adopt` and `vmherd release` as a person runs them, and the same from Python, over nodes that answer."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event as Signal

import pytest
import redis

from orchestrator import Cluster
from orchestrator.errors import NotFound, Refused, WaitTimeout
from orchestrator.resources import VirtualMachine
from orchestrator.store import access, keys
from orchestrator.store.connection import connect
from tests.builders import uuid_of
from tests.fakes import Stage
from tests.integration.adopting import SECRET, UUID, add_domain, adopted
from tests.integration.command import Running, Vmherd, on_a_terminal
from tests.waiting import wait_until


@contextmanager
def at_work(stage: Stage) -> Iterator[None]:
    """Agents, workers and an intake do their work, until the end of the block."""
    over = Signal()

    def work() -> None:
        while not over.wait(0.02):
            for node in stage.nodes.values():
                node.answer()
            stage.read()
            waiting = stage.store.redis.lrange("node.n1.lifecycle", 0, -1)
            if waiting:  # the command's own process sent it
                stage.store.redis.delete("node.n1.lifecycle")
                stage.reconcile()
            for key in stage.store.redis.zrange(keys.AWAITING, 0, -1):
                stage.store.redis.zadd(keys.AWAITING, {str(key): 0})
            stage.reconcile()
            stage.grant_and_deliver()

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            yield
        finally:
            over.set()
            working.result(30)


@pytest.fixture
def vmherd(stage: Stage) -> Vmherd:
    return Vmherd(stage.url)


class TestAdopt:
    def test_a_dry_run_shows_what_would_be_done(self, stage: Stage, vmherd: Vmherd) -> None:
        add_domain(stage)
        add_domain(stage, name="other", uuid=uuid_of("other"), snapshots=2)
        with at_work(stage):
            done = vmherd.run("adopt", "--dry-run", "n1")
            as_data = vmherd.run("adopt", "--dry-run", "n1", "-o", "json")
        assert as_data.returncode == 1
        assert [(one["name"], one["isRefused"]) for one in json.loads(as_data.stdout)] == [
            ("web-1", False),
            ("other", True),
        ]
        assert vmherd.run("adopt", "n1", "-o", "json").returncode == 2
        header, first, second = done.stdout.splitlines()
        assert header.split() == ["DOMAIN", "VM", "CORES", "COREFRACTION", "MEMORY", "DISKS", "ACTION", "FINDINGS"]
        assert first.split()[:8] == ["Web", "1", "web-1", "1", "100%", "1Gi", "<none>", "adopt"]
        assert "the console listens nowhere" in first
        assert second.split()[:7] == ["other", "other", "1", "100%", "1Gi", "<none>", "refuse"]
        reason = "it has 2 snapshots or checkpoints, which go with its definition"
        assert reason in second
        assert (done.returncode, done.stderr) == (1, f"vmherd: other: not adopted: {reason}\n")
        assert not stage.store.all(VirtualMachine)
        assert SECRET not in done.stdout + done.stderr

    def test_all_that_can_be_and_the_others_are_named(self, stage: Stage, vmherd: Vmherd) -> None:
        copy = add_domain(stage)
        add_domain(stage, name="other", uuid=uuid_of("other"), snapshots=2)
        with at_work(stage):
            done = vmherd.run("adopt", "n1", "-n", "shop", "--run-policy", "Manual")
        assert done.returncode == 1
        assert done.stderr.startswith("vmherd: other: not adopted: it has 2 snapshots")
        assert done.stderr.count("\n") == 1
        lines = done.stdout.splitlines()
        assert lines[0].startswith("Web 1: is being adopted as shop/web-1 (1 cores, 1Gi)")
        assert lines[-1] == "Web 1: adopted as shop/web-1, Running on node n1"
        assert (copy.vm, copy.definition) == ("shop/web-1", "")
        assert stage.store.get(VirtualMachine, "shop/web-1").spec.run_policy == "Manual"

    def test_they_are_counted_on_a_terminal(self, stage: Stage, vmherd: Vmherd) -> None:
        add_domain(stage)
        with at_work(stage):
            shown = on_a_terminal(vmherd, "adopt", "n1", COLUMNS="120")
        assert "asks the agent of node n1" in shown
        assert "Web 1: adopted as default/web-1, Running on node n1" in shown
        assert "1/1" in shown

    def test_what_is_given_up_says_why(self, stage: Stage, vmherd: Vmherd) -> None:
        copy = add_domain(stage)

        def snapshot(call: str) -> None:
            if call == "mark":
                copy.snapshots = 1

        stage.nodes["n1"].definitions.hook = snapshot
        with at_work(stage):
            done = vmherd.run("adopt", "n1", "Web 1")
        assert done.returncode == 1
        assert "Web 1: not adopted: domain" in done.stderr
        assert "node n1 has it as it was" in done.stderr
        assert (copy.vm, bool(copy.definition)) == ("", True)

    def test_that_is_a_document_too(self, stage: Stage, vmherd: Vmherd) -> None:
        add_domain(stage)
        adopted(stage)
        with at_work(stage):
            done = vmherd.run("release", "web-1", "gone", "-o", "json")
        assert done.returncode == 1
        said = "defined on node n1 as domain Web 1, and runs on"
        assert json.loads(done.stdout) == [{"vm": "default/web-1", "released": True, "message": said}]
        assert "'gone' not found" in done.stderr

    def test_refusals(self, stage: Stage, vmherd: Vmherd) -> None:
        with at_work(stage):
            assert vmherd.refused("adopt", "n1", "none") == "none: node 'n1' has no such domain"
            assert vmherd.refused("adopt", "nowhere") == "Node 'nowhere' not found"
            told = vmherd.refused("adopt", "n1", "-n", "Shop")
            assert told.startswith("namespace: 'Shop' is not a DNS label")
            told = vmherd.refused("adopt", "n1", "--run-policy", "AlwaysOff")
            assert told == "run policy AlwaysOff: it would stop what is adopted"
            done = vmherd.run("adopt", "n1")
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr == "vmherd: node 'n1' has no domain that is not a virtual machine of the herd already\n"

    def test_leaving_early_leaves_it_to_the_herd(self, stage: Stage, vmherd: Vmherd) -> None:
        """No agent answers after the plan: the command is left, and what was begun goes on."""
        copy = add_domain(stage)
        with Running(vmherd, "adopt", "n1", "Web 1") as command:

            def is_begun() -> bool:
                if not command.lines:
                    stage.nodes["n1"].answer()
                    stage.read()
                return any("is being adopted" in line for line in command.lines)

            wait_until(is_begun, 30, lambda: str(command.errors))
            assert command.interrupt() == 130
            assert command.errors == ["vmherd: no longer waiting; what was begun goes on"]
        with at_work(stage):
            wait_until(lambda: not copy.definition, 20, "taken over")


class TestRelease:
    def test_it_is_given_back(self, stage: Stage, vmherd: Vmherd) -> None:
        copy = add_domain(stage)
        adopted(stage)
        with at_work(stage):
            out = vmherd.ok("release", "web-1")
        assert out.splitlines()[-1] == "web-1: released: defined on node n1 as domain Web 1, and runs on"
        assert (copy.vm, bool(copy.definition)) == ("", True)

    def test_refusals(self, stage: Stage, vmherd: Vmherd) -> None:
        stage.add_vm("a", "n1")
        told = vmherd.refused("release", "a")
        assert told == "VirtualMachine 'a' was not adopted: there is no definition to give back"
        assert vmherd.refused("release", "b") == "VirtualMachine 'b' not found in namespace 'default'"


class TestFromPython:
    @pytest.fixture
    def cluster(self, stage: Stage) -> Iterator[Cluster]:
        with Cluster(stage.url) as cluster:
            yield cluster

    def test_there_and_back(self, stage: Stage, cluster: Cluster) -> None:
        copy = add_domain(stage)
        with at_work(stage):
            (planned,) = cluster.adopt("n1", dry_run=True)
            assert not planned.is_refused
            assert copy.definition
            (planned,) = cluster.adopt("n1", "Web 1", timeout=30)
            assert (planned.name, copy.definition) == ("web-1", "")
            assert cluster.release("web-1", timeout=30) == "defined on node n1 as domain Web 1, and runs on"
        assert copy.definition
        assert not cluster.vms()

    def test_refusals(self, stage: Stage, cluster: Cluster) -> None:
        copy = add_domain(stage)
        with at_work(stage):
            with pytest.raises(NotFound, match="node 'n1' has no domain 'x', 'y'"):
                cluster.adopt("n1", "x", "Web 1", "y")
            assert copy.definition
            copy.snapshots = 1
            (planned,) = cluster.adopt("n1", timeout=30)
            assert planned.is_refused
            assert UUID in stage.world.hosts["n1"]
            assert not cluster.vms()
            copy.snapshots = 0
            stage.nodes["n1"].definitions.hook = lambda call: setattr(
                copy, "snapshots", int("mark" in call or copy.snapshots)
            )
            with pytest.raises(Refused, match=r"default/web-1: not adopted: .*snapshot"):
                cluster.adopt("n1", timeout=30)

    def test_a_silent_agent(self, stage: Stage) -> None:
        from orchestrator.services.definitions import ask_definitions

        with pytest.raises(WaitTimeout, match="the agent of node 'n1' did not say"):
            ask_definitions(stage.ctx, "n1", timeout_s=0.2)
        assert not stage.store.redis.exists(keys.orders("n1"))


def test_a_node_reads_neither_records_nor_what_others_were_asked(stage: Stage) -> None:
    add_domain(stage)
    adopted(stage)
    password = access.enroll(stage.store.redis, "n1")
    stage.store.redis.hset(keys.orders("n2"), "x", "{}")
    client = connect(stage.url.replace("://", f"://{access.user_name('n1')}:{password}@"))
    assert client.hgetall(keys.orders("n1")) == {}
    for read in (
        lambda: client.hgetall(keys.ADOPTED),
        lambda: client.exists(keys.answers("definitions:1")),
        lambda: client.hgetall(keys.orders("n2")),
        lambda: client.hset(keys.orders("n1"), "x", "{}"),
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            read()
    client.close()

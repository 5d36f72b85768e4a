"""What `vmherd` says while things change: watches, and commands that wait for what they began."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.resources import OperationPhase, Reason, VirtualMachine, VmPhase
from tests.builders import a_grant
from tests.integration.command import EVICT, OnScreen, Running, Vmherd, on_a_terminal
from tests.redis_server import RedisServer
from tests.waiting import wait_until


@pytest.fixture
def vmherd(redis_url: str) -> Iterator[Vmherd]:
    herd = Vmherd(redis_url)
    yield herd
    herd.store.close()


class TestWatch:
    def test_a_migration_as_it_goes(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        with Running(vmherd, "get", "vm", "-w") as watch:
            watch.wait(lambda lines: len(lines) == 2)
            vmherd.set_vm("linux-vm", phase=VmPhase.MIGRATING)
            watch.wait(lambda lines: len(lines) == 3)  # one by one: each line leaves at once
            vmherd.set_vm("linux-vm", counter=7)  # which no column shows
            vmherd.set_vm("linux-vm", phase=VmPhase.RUNNING, node_name="h2")
            watch.wait(lambda lines: len(lines) == 4)
            assert watch.interrupt() == 130
        assert [line.split()[:4] for line in watch.lines] == [
            ["NAME", "PHASE", "NODE", "IPADDRESS"],
            ["linux-vm", "Running", "h1", "192.0.2.101"],
            ["linux-vm", "Migrating", "h1", "192.0.2.101"],
            ["linux-vm", "Running", "h2", "192.0.2.101"],
        ]
        assert len({line.index(word) for line, word in zip(watch.lines, ["NODE", "h1", "h1", "h2"], strict=True)}) == 1
        assert watch.errors == []

    def test_what_changes_while_redis_is_away_is_shown_when_it_is_back(self, durable_redis: RedisServer) -> None:
        vmherd = Vmherd(durable_redis.url)
        vmherd.running_vm("a")
        vmherd.running_vm("b")
        with Running(vmherd, "get", "vm", "-w") as watch:
            watch.wait(lambda lines: len(lines) == 3)
            durable_redis.kill()
            wait_until(lambda: watch.errors, 30, "the watch says that Redis is away")
            durable_redis.start()
            vmherd.set_vm("b", phase=VmPhase.MIGRATING)
            watch.wait(lambda lines: len(lines) == 4)
            durable_redis.kill()
            wait_until(lambda: len(watch.errors) == 2, 30, "the watch says it again")
            durable_redis.start()
            vmherd.set_vm("a", phase=VmPhase.PAUSE)
            watch.wait(lambda lines: len(lines) == 5)
            assert watch.interrupt() == 130
        assert [line.split()[:2] for line in watch.lines[3:]] == [["b", "Migrating"], ["a", "Pause"]]
        for error in watch.errors:
            assert error.startswith(f"vmherd: no Redis at {durable_redis.url}: ")
            assert error.endswith("; goes on when it is back")
        vmherd.store.close()

    def test_a_redis_that_has_lost_everything(self, tmp_path: Path) -> None:
        server = RedisServer(tmp_path)
        server.start()
        vmherd = Vmherd(server.url)
        vmherd.running_vm("kept")
        vmherd.running_vm("lost")
        with Running(vmherd, "get", "vm", "-w") as watch:
            watch.wait(lambda lines: len(lines) == 3)
            server.kill()
            wait_until(lambda: watch.errors, 30, "the watch says that Redis is away")
            server.start()
            vmherd.running_vm("kept")
            watch.wait(lambda lines: any(line.split()[:2] == ["lost", "Deleted"] for line in lines))
            vmherd.set_vm("kept", phase=VmPhase.MIGRATING)  # at a lower version than the watch had seen
            watch.wait(lambda lines: lines[-1].split()[:2] == ["kept", "Migrating"])
        server.kill()
        vmherd.store.close()

    def test_nobody_reads_on(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        with Running(vmherd, "get", "vm", "-w") as other:  # tells when the first has printed its table too
            reader, writer = os.pipe()
            with subprocess.Popen(
                [sys.executable, "-m", "orchestrator.cli", "get", "vm", "-w"],
                env=vmherd.environment(),
                stdout=writer,
                stderr=subprocess.PIPE,
                text=True,
            ) as watch:
                os.close(writer)
                assert os.read(reader, 4) == b"NAME"
                os.close(reader)
                other.wait(lambda lines: len(lines) == 2)
                vmherd.set_vm("linux-vm", phase=VmPhase.MIGRATING)
                _, told = watch.communicate(timeout=30)
        assert told == ""

    def test_a_name_that_is_not_there(self, vmherd: Vmherd) -> None:
        assert vmherd.refused("get", "vm", "x", "-w") == "VirtualMachine 'x' not found in namespace 'default'"


class TestWaiting:
    def test_evict_tells_each_phase_and_ends_with_success(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        with Running(vmherd, "evict", "linux-vm") as command:
            command.wait(lambda lines: lines)
            (operation,) = vmherd.operations()
            vmherd.step(operation.name, Reason.SYNCING, "a tenth", phase=OperationPhase.IN_PROGRESS, progress=10)
            vmherd.step(operation.name, Reason.SYNCING, "a half", progress=50)
            ended = {"phase": OperationPhase.COMPLETED, "progress": 100, "downtime_ms": 23}
            vmherd.step(operation.name, Reason.OPERATION_COMPLETED, "runs on node h2", **ended)
            assert command.ended() == 0
        assert command.lines == [
            f"linux-vm: Pending ({operation.name}): waits to be granted",
            "linux-vm: InProgress: a tenth",
            "linux-vm: Completed: runs on node h2 (guest stopped for 23 ms)",
        ]
        assert command.errors == []

    def test_one_of_two_fails(self, vmherd: Vmherd) -> None:
        vmherd.running_vm("a")
        vmherd.running_vm("b")
        with Running(vmherd, "evict", "a", "b") as command:
            command.wait(lambda lines: len(lines) == 2)
            first, second = sorted(vmherd.operations(), key=lambda o: o.spec.virtual_machine_name)
            vmherd.step(second.name, Reason.OPERATION_FAILED, "no more attempts", phase=OperationPhase.FAILED)
            vmherd.step(first.name, Reason.OPERATION_COMPLETED, "runs on node h2", phase=OperationPhase.COMPLETED)
            assert command.ended() == 1
        assert command.errors == [f"vmherd: b: {second.name} Failed (OperationFailed): no more attempts"]

    def test_ctrl_c_leaves_it_running_and_says_how_to_abort_it(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        with Running(vmherd, "evict", "linux-vm") as command:
            command.wait(lambda lines: lines)
            assert command.interrupt() == 130
        (operation,) = vmherd.operations()
        assert command.errors == [
            f"vmherd: no longer waiting; what was begun goes on. To abort it: vmherd delete vmop {operation.name}"
        ]

    def test_time_is_up(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        done = vmherd.run("create", "--wait", "--timeout", "0.1s", "-f", "-", stdin=EVICT)
        (operation,) = vmherd.operations()
        assert done.returncode == 1
        assert done.stderr == (
            f"vmherd: VirtualMachineOperation '{operation.name}' is Pending after 0.1s: waits to be granted; "
            "goes on all the same\n"
        )

    def test_an_outage_of_redis_is_waited_out(self, durable_redis: RedisServer) -> None:
        vmherd = Vmherd(durable_redis.url)
        vmherd.running_vm()
        with Running(vmherd, "evict", "linux-vm") as command:
            command.wait(lambda lines: lines)
            durable_redis.kill()
            wait_until(lambda: command.errors, 30, "it says that Redis is away")
            durable_redis.start()
            (operation,) = vmherd.operations()
            vmherd.step(operation.name, Reason.OPERATION_COMPLETED, "runs on h2", phase=OperationPhase.COMPLETED)
            assert command.ended() == 0
        vmherd.store.close()

    def test_bars_on_a_terminal(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        threading.Thread(target=self._complete, args=(vmherd,)).start()
        shown = on_a_terminal(vmherd, "evict", "linux-vm")
        assert "100%" in shown
        assert "Completed" in shown
        assert "runs on node h2" in shown

    @staticmethod
    def _complete(vmherd: Vmherd) -> None:
        wait_until(vmherd.operations, 30, "the operation")
        (operation,) = vmherd.operations()
        vmherd.step(
            operation.name, Reason.OPERATION_COMPLETED, "runs on node h2", phase=OperationPhase.COMPLETED, progress=100
        )


class TestDelete:
    def test_a_pending_operation_is_gone_at_once(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        name = vmherd.ok("evict", "linux-vm", "--no-wait").strip()
        assert vmherd.ok("delete", "vmop", name) == f'virtualmachineoperation "{name}" deleted\n'
        assert vmherd.operations() == []
        told = vmherd.refused("delete", f"vmop/{name}")
        assert told == f"VirtualMachineOperation '{name}' not found in namespace 'default'"

    @pytest.mark.parametrize(
        ("reason", "message", "phase", "said"),
        [
            (Reason.ABORTED, "aborted; it runs on node h1", OperationPhase.FAILED, "Aborted"),
            (
                Reason.OPERATION_COMPLETED,
                "runs on node h2; it was too late to abort",
                OperationPhase.COMPLETED,
                "Completed",
            ),
        ],
        ids=["in time", "too late"],
    )
    def test_one_under_way_is_waited_for(
        self, vmherd: Vmherd, reason: Reason, message: str, phase: OperationPhase, said: str
    ) -> None:
        vmherd.running_vm()
        name = vmherd.ok("evict", "linux-vm", "--no-wait").strip()
        vmherd.step(name, Reason.SYNCING, "", phase=OperationPhase.IN_PROGRESS, grant=a_grant(node="h1", target="h2"))
        with Running(vmherd, "delete", "vmop", name) as command:
            command.wait(lambda lines: lines == [f'virtualmachineoperation "{name}" deleted'])
            assert vmherd.operations()[0].status.phase is OperationPhase.TERMINATING
            ended = vmherd.step(name, reason, message, phase=phase, grant=None)
            assert command.process.poll() is None  # until it is gone
            vmherd.store.must_commit(vmherd.store.batch().delete(ended))
            assert command.ended() == 0
        assert command.lines[1:] == [f'virtualmachineoperation "{name}": {said}: {message}']

    def test_an_abort_has_its_bar_on_a_terminal(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        name = vmherd.ok("evict", "linux-vm", "--no-wait").strip()
        vmherd.step(name, Reason.SYNCING, "", phase=OperationPhase.IN_PROGRESS, grant=a_grant(node="h1", target="h2"))
        with OnScreen(vmherd, "delete", "vmop", name, COLUMNS="120") as screen:
            assert "deleted" in screen.read_until("━")
            ended = vmherd.step(name, Reason.ABORTED, "it runs on h1", phase=OperationPhase.FAILED, grant=None)
            vmherd.store.must_commit(vmherd.store.batch().delete(ended))
            screen.read_until("Aborted: it runs on h1")
            assert screen.ended() == 0

    def test_a_vm_that_is_stopped_is_waited_for(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        vmherd.running_vm("other")
        with Running(vmherd, "delete", "vm", "linux-vm", "other") as command:
            command.wait(lambda lines: len(lines) == 2)
            other = vmherd.store.get(VirtualMachine, "default/other")
            vmherd.store.must_commit(vmherd.store.batch().delete(other))
            command.wait(lambda lines: len(lines) == 3)
            assert command.process.poll() is None
            gone = vmherd.store.get(VirtualMachine, "default/linux-vm")
            vmherd.store.must_commit(vmherd.store.batch().delete(gone))
            vmherd.running_vm()  # another one of its name
            assert command.ended() == 0
        assert command.lines == [
            'virtualmachine "linux-vm" deleted',
            'virtualmachine "other" deleted',
            'virtualmachine "other" is gone',
            'virtualmachine "linux-vm" is gone',
        ]
        assert command.errors == []

    def test_a_vm_that_does_not_stop_in_time(self, vmherd: Vmherd) -> None:
        vmherd.running_vm()
        done = vmherd.run("delete", "vm", "linux-vm", "--timeout", "0.1s")
        assert (done.returncode, done.stdout) == (1, 'virtualmachine "linux-vm" deleted\n')
        told = "vmherd: VirtualMachine 'linux-vm' is Terminating after 0.1s; goes on all the same\n"
        assert done.stderr == told
        with Running(vmherd, "delete", "vm", "linux-vm") as command:
            command.wait(lambda lines: lines)
            assert command.interrupt() == 130
        assert command.errors == ["vmherd: no longer waiting; the deletion goes on"]

"""`vmherd drain` and `vmherd maintain` when they are interrupted, and when what they watch is gone."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import typer

from orchestrator.cli import drain as drains
from orchestrator.cli import maintain as maintains
from orchestrator.cli.progress import Counts
from orchestrator.cli.waiting import Silent
from orchestrator.errors import StoreUnavailable
from orchestrator.resources import Key, Maintenance, NodeDrain, ObjectMeta, Resource, VirtualMachineOperation
from orchestrator.resources.drain import DrainPhase, DrainSpec, DrainStatus
from orchestrator.resources.maintenance import (
    MaintenancePhase,
    MaintenanceSpec,
    MaintenanceStatus,
    NodeMaintenance,
    NodeStage,
)
from orchestrator.store import Change, ChangeType
from orchestrator.store.store import Loaded
from tests.builders import NOW


def a_drain(uid: str = "first", by: str = "", phase: DrainPhase = DrainPhase.DRAINING) -> NodeDrain:
    status = DrainStatus(phase=phase, started_at=NOW, message="1 of 1 VMs to go")
    spec = DrainSpec(requested_by=by or drains.who())
    return NodeDrain(metadata=ObjectMeta(name="n1", uid=uid), spec=spec, status=status)


class InterruptedClient:
    """A herd whose client is interrupted while it asks for a drain, which may have arrived."""

    def __init__(self, before: NodeDrain | None, after: NodeDrain | Exception | None) -> None:
        self._found = [before, after]
        self.cancelled: list[str] = []

    def find(self, kind: type[Resource], key: str) -> NodeDrain | None:
        assert (kind, key) == (NodeDrain, "n1")
        found = self._found.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def begin_drains(self, nodes: list[str], spec: DrainSpec) -> list[NodeDrain]:
        raise KeyboardInterrupt

    def cancel_drain(self, node: str, why: str) -> NodeDrain:
        self.cancelled.append(node)
        return a_drain(phase=DrainPhase.CANCELLED)


class TestDrain:
    @pytest.mark.parametrize(
        ("before", "after", "cancels", "said"),
        [
            (None, None, False, "no drain of it has begun"),
            (None, a_drain(), True, "the drain is stopped; nothing is under way. It stays cordoned"),
            (None, a_drain(by="bob@else"), False, "it is being drained, as bob@else asked, and that goes on"),
            (a_drain(), a_drain(), False, "and that goes on. vmherd describe drain n1"),
            (a_drain(phase=DrainPhase.CANCELLED), a_drain("second"), True, "the drain is stopped"),
            (None, StoreUnavailable("Redis is away"), False, "whether its drain has begun is not known: Redis is away"),
        ],
    )
    def test_ctrl_c_before_it_is_known_to_have_begun_ends_its_own_drain_alone(
        self,
        before: NodeDrain | None,
        after: NodeDrain | Exception | None,
        cancels: bool,
        said: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        client = InterruptedClient(before, after)

        @contextmanager
        def opened() -> Iterator[InterruptedClient]:
            yield client

        monkeypatch.setattr(drains, "open_client", opened)
        with pytest.raises(typer.Exit) as ended:
            drains.drain(["n1"], timeout=0.0)
        assert ended.value.exit_code == 130
        assert client.cancelled == (["n1"] if cancels else [])
        assert said in capsys.readouterr().err

    def test_a_drain_that_was_deleted_is_over(self) -> None:
        ours = a_drain()
        view = drains._View([ours], Silent())
        view.take(Change(1, ChangeType.MODIFIED, ours))
        assert not view.is_over()
        view.take(Change(2, ChangeType.DELETED, ours))
        assert view.is_over()
        assert view.drains["n1"].status.message == "it was deleted"

    def test_another_one_that_took_its_name_is_not_ours(self) -> None:
        view = drains._View([a_drain()], Silent())
        another: dict[Key, Resource] = {Key("n1"): a_drain("second")}
        view.take(Loaded(1, "run", {NodeDrain.kind_name: another, VirtualMachineOperation.kind_name: {}}))
        assert view.is_over()
        assert view.drains["n1"].status.message == "it was deleted, and the node has another drain by now"


class AwayClient:
    """A herd that is away for some requests, and then takes what is told."""

    def __init__(self, found: Maintenance, away_for: int) -> None:
        self._found = found
        self._away_for = away_for
        self.told: list[str] = []

    def _answer(self) -> None:
        self._away_for -= 1
        if self._away_for >= 0:
            raise StoreUnavailable("Redis is away")

    def pause_maintenance(self, name: str, why: str) -> Maintenance:
        self._answer()
        self.told.append("paused")
        return self._found.with_status(phase=MaintenancePhase.PAUSED)

    def renew_hook(self, name: str, node: str, holder: str) -> bool:
        self._answer()
        return True

    def end_hook(self, name: str, node: str, holder: str, exit_code: int, output: str) -> bool:
        self._answer()
        self.told.append(f"{node} ended with {exit_code}: {output}")
        return True


class Quiet(Counts):
    """Shows nothing."""

    def __init__(self) -> None:
        pass

    def write(self, line: str) -> None:
        """Leave it out."""

    def update(self, *_: object) -> None:
        """Leave it out."""


def executor(away_for: int, monkeypatch: pytest.MonkeyPatch) -> tuple[maintains._Executor, AwayClient]:
    found = Maintenance(
        metadata=ObjectMeta(name="m", uid="m"),
        spec=MaintenanceSpec(nodes=("n1",), hook="echo done"),
        status=MaintenanceStatus(
            phase=MaintenancePhase.RUNNING, nodes={"n1": NodeMaintenance(stage=NodeStage.HOOK, holder="another")}
        ),
    )

    def nothing_comes(*_: Any, **__: Any) -> Iterator[None]:
        for _round in range(200):
            yield None
            time.sleep(0.01)  # as the real one waits for news
        raise AssertionError("it goes on waiting")

    monkeypatch.setattr(maintains, "follow", nothing_comes)
    client: Any = AwayClient(found, away_for)
    return maintains._Executor(client, found, Quiet()), client


class TestMaintain:
    def test_ctrl_c_while_the_herd_is_away_leaves_no_hook_unattended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runs, client = executor(3, monkeypatch)
        runs._begin("n1", 1)
        runs._interrupted()
        runs.run()
        assert sorted(client.told) == ["n1 ended with 0: done", "paused"]
        assert runs.runs == {}

    def test_without_a_hook_it_ends_and_says_that_it_goes_on(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        runs, client = executor(1000, monkeypatch)
        runs._interrupted()
        runs.run()
        assert client.told == []
        assert "it could not be paused: vmherd maintenance pause m" in capsys.readouterr().err

"""Domains that nobody manages, adopted on a stage step by step; what the tests of adoption share."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import pytest

from orchestrator.planner.adoption import Planned
from orchestrator.queues import Message, Task
from orchestrator.resources import (
    Condition,
    Event,
    VirtualMachine,
    find_condition,
)
from orchestrator.services import adoption
from orchestrator.store import keys
from tests.builders import uuid_of
from tests.declared_keys import check_keys
from tests.fakes import Copy, Stage
from tests.waiting import wait_until

SECRET = "s3cr3t-of-the-console"
UUID = uuid_of("web")


def definition(name: str = "Web 1", uuid: str = UUID, memory_mib: int = 1024) -> str:
    return (
        f"<domain type='kvm'><name>{name}</name><uuid>{uuid}</uuid><memory unit='KiB'>{memory_mib * 1024}</memory>"
        "<vcpu>1</vcpu><os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os><devices>"
        f"<graphics type='vnc' port='-1' passwd='{SECRET}'/></devices></domain>"
    )


def add_domain(stage: Stage, node: str = "n1", name: str = "Web 1", uuid: str = UUID, **more: Any) -> Copy:
    """A persistent domain that runs on a node and that nobody manages."""
    xml = definition(name, uuid)
    fields = {"name": name, "definition": xml, "live_xml": xml, "autostart": True, "incarnation": 0, "epoch": 0}
    stage.world.hosts[node][uuid] = copy = Copy("", **{**fields, **more})
    stage.nodes[node].tell(uuid)
    stage.read()
    return copy


def plan(stage: Stage, node: str = "n1", *names: str, **more: Any) -> tuple[Planned, ...]:
    """Ask for a plan, while the node's agent and an intake are at work."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: adoption.plan(stage.ctx, node, names, namespace="default", **more))

        def answered() -> bool:
            for each in stage.nodes.values():
                each.answer()
            stage.read()
            return answer.done()

        wait_until(answered, 20, "the plan")
        return answer.result()[0]


def begin(stage: Stage, node: str = "n1", **more: Any) -> VirtualMachine:
    (planned,) = plan(stage, node, **more)
    return adoption.adopt(stage.ctx, node, planned, "default")


def record(stage: Stage) -> None:
    """The agent reads the definition, and it is put on record."""
    for node in stage.nodes.values():
        node.answer()
    stage.read()


def deliver(stage: Stage) -> list[Message]:
    """Bring the messages about definitions to their nodes, and read what comes of it."""
    messages = stage.outbox.take(Task.NODE_ADOPT)
    for message in messages:
        stage.deliver(message)
    stage.read()
    return messages


def adopted(stage: Stage, node: str = "n1", **more: Any) -> VirtualMachine:
    vm = begin(stage, node, **more)
    record(stage)
    deliver(stage)
    return stage.store.get(VirtualMachine, vm.key)


def web(stage: Stage) -> VirtualMachine | None:
    return stage.store.find(VirtualMachine, "default/web-1")


def told(stage: Stage, reason: str) -> list[str]:
    return [e.message for e in stage.store.all(Event) if e.reason == reason and e.involved_object.kind != "Node"]


def claims(stage: Stage, node: str = "n1") -> dict[str, str]:
    return cast("dict[str, str]", stage.store.redis.hgetall(keys.claims(node)))


def condition(vm: VirtualMachine, kind: str) -> Condition | None:
    return find_condition(vm.status.conditions, kind)


def check_at_rest(stage: Stage) -> None:
    """Nothing of an adoption is left but its record."""
    found = check_keys(stage.store.redis)
    assert not found & {"orders:<node>", "awaiting", "deadlines", "grants:<node>"}, found


@contextmanager
def nothing_secret(stage: Stage, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """The secret gets into no document, no change that watchers see, no message and no line of a log."""
    yield
    redis = stage.store.redis
    open_keys = {"adopted", *(keys.reports(name) for name in stage.nodes)}
    for key in {str(name) for name in redis.scan_iter()} - open_keys:
        assert SECRET not in json.dumps(redis_value(stage, key)), key
    assert SECRET not in repr(stage.outbox.sent)
    captured = capfd.readouterr()
    assert SECRET not in captured.out + captured.err


def redis_value(stage: Stage, key: str) -> Any:
    redis = stage.store.redis
    match redis.type(key):
        case "hash":
            return redis.hgetall(key)
        case "string":
            return redis.get(key)
        case "stream":
            return redis.xrange(key)
        case "list":
            return redis.lrange(key, 0, -1)
        case "set":
            return sorted(redis.smembers(key))
        case _:
            return redis.zrange(key, 0, -1)

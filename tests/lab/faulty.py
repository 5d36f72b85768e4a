"""A process of the product with a fault inside: `python -m tests.lab.faulty FAULT [run worker migrate ...]`.

What comes after the fault is what `vmherd` would get. The process runs the product's own code; one function of it is
wrapped so that it kills its process, doubles or loses what it sends, at a point that can't be hit from outside.

Faults (those that kill do so once: a file in VMHERD_FAULT_DIR remembers, so that the restarted process goes on):

- `die:claim:before`, `die:claim:after`: around taking a grant
- `die:ended:before`, `die:ended:after`: around reporting that the call ended
- `die:commit:N:before`, `die:commit:N:after`: around this process's N-th commit that writes a document
- `hold:migrate`, `hold:start`: before each such call to libvirt it waits until there is a file VMHERD_FAULT_DIR/go
- `double`: each message is sent twice
- `lose`: each message is lost once
"""

import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from orchestrator import cli
from orchestrator.celery_app import CeleryMessenger
from orchestrator.cli import run as cli_run
from orchestrator.queues import Message
from orchestrator.settings import settings
from orchestrator.store import Batch, Store
from orchestrator.store.node_store import NodeStore
from workers.hypervisor.libvirt_driver import LibvirtHypervisor


def _die(name: str) -> None:
    """Kill this process as `kill -9` would, the first time only."""
    mark = Path(os.environ["VMHERD_FAULT_DIR"]) / name.replace(":", "-")
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def _around(owner: type, method: str, name: str, when: str, applies: Callable[..., bool]) -> None:
    original = getattr(owner, method)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        does = applies(*args)
        if does and when == "before":
            _die(name)
        result = original(self, *args, **kwargs)
        if does and when == "after":
            _die(name)
        return result

    setattr(owner, method, wrapped)


def _install(fault: str) -> None:
    match fault.split(":"):
        case ["die", "claim", when]:
            _around(NodeStore, "claim", fault, when, lambda *_: True)
        case ["die", "ended", when]:
            _around(NodeStore, "report", fault, when, lambda kind, *_: kind == "Ended")
        case ["die", "commit", number, when]:
            seen = iter(range(1, 1 << 30))
            wanted = int(number)

            def is_it(batch: Batch) -> bool:
                return bool(batch.writes) and next(seen) == wanted

            _around(Store, "commit", fault, when, is_it)
        case ["hold", "migrate" | "start" as method]:
            _hold(method)
        case ["double"]:

            def send_twice(send: Callable[[Message], None], message: Message) -> None:
                send(message)
                send(message)

            _wrap_send(send_twice)
        case ["lose"]:
            lost: set[Message] = set()

            def lose_once(send: Callable[[Message], None], message: Message) -> None:
                if message in lost:
                    send(message)
                lost.add(message)

            _wrap_send(lose_once)
        case _:
            raise SystemExit(f"unknown fault {fault}")


def _hold(method: str) -> None:
    original = getattr(LibvirtHypervisor, method)
    go = Path(os.environ["VMHERD_FAULT_DIR"]) / "go"

    def held(self: LibvirtHypervisor, *args: Any) -> Any:
        while not go.exists():
            time.sleep(0.01)
        return original(self, *args)

    setattr(LibvirtHypervisor, method, held)


def _wrap_send(how: Callable[[Callable[[Message], None], Message], Any]) -> None:
    original = CeleryMessenger.send

    def send(self: CeleryMessenger, message: Message) -> None:
        how(lambda m: original(self, m), message)

    setattr(CeleryMessenger, "send", send)  # noqa: B010 - a method is replaced on purpose


def _run_here(*arguments: str) -> NoReturn:
    """Run a module in this process, where the product would execute a new one."""
    settings.cache_clear()  # a new process would read its environment anew
    sys.argv = list(arguments)
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=False)
    raise SystemExit(0)


def main() -> None:
    """Install the fault and run the product."""
    _install(sys.argv[1])
    cli_run.execute = _run_here
    sys.argv = ["vmherd", *sys.argv[2:]]
    cli.main()


if __name__ == "__main__":
    main()

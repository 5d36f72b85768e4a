"""The zygote of simulated nodes' processes: it loads what they need once and forks each of them, so that they share it.

A hundred nodes are three hundred processes; each on its own would take 60 MB. Whoever starts the zygote writes lines of
JSON to its standard input and reads lines from its standard output:

- `{"start": NAME, "run": "agent", "environment": {...}, "log": PATH}`, or with `"run": "celery"` and `"arguments"`:
  answered by `{"started": NAME, "pid": PID}`;
- `{"ended": NAME, "pid": PID, "status": EXIT_CODE}` comes when one has ended.

The end of standard input ends the zygote, and the kernel ends its children with it. It has one thread and no connection
when it forks; settings are read in the children only, from the environment that each is given.
"""

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final, NoReturn

_PRELOADED: Final[dict[str, tuple[str, ...]]] = {
    "agent": ("workers.agent",),
    "heartbeat": ("workers.heartbeat",),
    "celery": (
        # Not workers.tasks or orchestrator.celery_app, which read the settings when they are imported.
        *(
            "celery.__main__",
            "celery.bin.celery",
            "celery.bin.worker",
            "celery.apps.worker",
            "celery.worker.components",
        ),
        *("celery.worker.consumer", "celery.worker.state", "celery.concurrency.thread", "celery.events.dispatcher"),
        *("celery.app.amqp", "celery.app.control", "celery.app.events", "celery.app.log", "celery.loaders.app"),
        *("celery.backends.base", "celery.worker.autoscale", "kombu.transport.redis", "kombu.asynchronous.http"),
        *("workers.lifecycle", "workers.migration", "workers.hypervisor.drivers", "orchestrator.logs"),
    ),
}
"""By what they run: what children would import."""
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15


class Zygote:
    """Forks processes on demand and tells their ends."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._input = b""

    def run(self) -> None:
        """Serve until standard input ends."""
        ended, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        while True:
            readable, _, _ = select.select([sys.stdin.fileno(), ended], [], [])
            if ended in readable:
                os.read(ended, 4096)
                self._reap()
            if sys.stdin.fileno() in readable and not self._take():
                return

    def _take(self) -> bool:
        """Do what was asked for; whether more may come."""
        read = os.read(sys.stdin.fileno(), 65536)
        self._input += read
        *lines, self._input = self._input.split(b"\n")
        for line in lines:
            self._start(json.loads(line))
        return bool(read)

    def _start(self, request: dict[str, Any]) -> None:
        zygote, name = os.getpid(), str(request["start"])
        pid = os.fork()
        if pid == 0:
            self._live(request, zygote)
        self._names[pid] = name
        _tell({"started": name, "pid": pid})

    def _reap(self) -> None:
        while self._names:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            _tell({"ended": self._names.pop(pid), "pid": pid, "status": os.waitstatus_to_exitcode(status)})

    def _live(self, request: dict[str, Any], zygote: int) -> NoReturn:
        """Become the process that was asked for; never returns to the zygote's loop."""
        code = 1
        try:
            self._detach(request, zygote)
            _program(request)()
            code = 0
        except SystemExit as end:
            code = _exit_code(end)
        except BaseException:  # noqa: BLE001  nothing of a child may go on as the zygote
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _detach(self, request: dict[str, Any], zygote: int) -> None:
        self._libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        self._libc.prctl(_PR_SET_NAME, str(request["start"]).encode()[:15])
        if os.getppid() != zygote:
            os._exit(1)  # it died before the first of these calls
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(request["environment"])
        nothing = os.open(os.devnull, os.O_RDONLY)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for descriptor, standard in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(descriptor, standard)
        os.close(nothing)
        os.close(log)


def _program(request: dict[str, Any]) -> Callable[[], object]:
    if request["run"] in {"agent", "heartbeat"}:
        sys.argv = [request["run"]]
        main: Callable[[], object] = import_module(f"workers.{request['run']}").main
    else:
        sys.argv = ["celery", *request["arguments"]]
        main = import_module("celery.__main__").main
    return main


def _exit_code(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    sys.stderr.write(f"{end.code}\n")
    return 1


def _tell(message: dict[str, Any]) -> None:
    os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


def main(words: Sequence[str] | None = None) -> None:
    """Be the zygote of processes that run `agent`, `heartbeat` or `celery`."""
    (run,) = sys.argv[1:] if words is None else words
    for module in _PRELOADED[run]:
        import_module(module)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: whoever started us decides
    gc.collect()
    gc.freeze()  # else the first collection in each child would write to, and so copy, every page
    Zygote().run()


if __name__ == "__main__":
    main()

"""A hundred Celery workers that do nothing: the yardstick beside a hundred nodes.

They are forked from one zygote, as the simulated nodes' workers are, with the same options, one queue each.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from orchestrator.celery_app import make_app
from orchestrator.store import Store
from tests.benchmarks.noop import QUEUE, register
from tests.lab.namespaces import REPOSITORY
from tests.waiting import wait_until

_OPTIONS = ("-P", "threads", "-c", "1", "--without-gossip", "--without-mingle", "-E", "--loglevel", "WARNING")
"""Of a node's migration worker (`orchestrator.cli.run`)."""
_STARTED_S = 120.0
_GET_S = 60.0


class ManyWorkers:
    """The workers; a context manager.

    Args:
        url: Of Redis.
        count: How many.
        folder: For their logs.
    """

    def __init__(self, url: str, count: int, folder: Path) -> None:
        self._url, self._count, self._folder = url, count, folder
        self._zygote: subprocess.Popen[bytes] | None = None
        self._app = make_app("bench-client", url=url)
        self._task = register(self._app)

    def __enter__(self) -> Self:
        """Start them; returns once each listens."""
        environment: Mapping[str, str] = {**os.environ, "VMHERD_REDIS_URL": self._url, "PYTHONPATH": str(REPOSITORY)}
        argv = [sys.executable, "-m", "workers.simulation_zygote", "celery"]
        self._zygote = subprocess.Popen(
            argv, env=environment, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        assert self._zygote.stdin is not None
        for name in self._queues():
            request: dict[str, Any] = {
                "start": name,
                "run": "celery",
                "arguments": ("-A", "tests.benchmarks.noop", "worker", "-Q", name, "-n", f"{name}@bench", *_OPTIONS),
                "environment": dict(environment),
                "log": str(self._folder / f"{name}.log"),
            }
            self._zygote.stdin.write(json.dumps(request).encode() + b"\n")
        self._zygote.stdin.flush()
        store = Store.open(self._url)
        try:
            wait_until(
                lambda: all(store.redis.exists(f"_kombu.binding.{name}") for name in self._queues()),
                _STARTED_S,
                f"{self._count} workers listen",
            )
        finally:
            store.close()
        return self

    def __exit__(self, *_: object) -> None:
        """End them: the kernel kills them with their zygote."""
        if self._zygote is not None:
            self._zygote.kill()
            self._zygote.wait()
        self._app.close()

    def rate(self, tasks: int, threads: int) -> float:
        """Send tasks from some threads, to all queues in turn, and wait for all results; gives tasks a second."""
        queues = self._queues()

        def lane(first: int) -> None:
            results = [
                self._task.apply_async(queue=queues[number % len(queues)]) for number in range(first, tasks, threads)
            ]
            for result in results:
                result.get(timeout=_GET_S)

        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lane, range(threads)))
        return tasks / (time.perf_counter() - began)

    def _queues(self) -> list[str]:
        return [f"{QUEUE}.{number}" for number in range(self._count)]

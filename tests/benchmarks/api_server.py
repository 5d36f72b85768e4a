"""The API server: a list of 10,000 VMs, how soon 100 watchers are told of a commit, and requests on one core.

Without a lab: a plain Redis that writes through to its disk, one `vmherd api` process without TLS, pinned to one CPU,
and clients that do nothing but send and read. The yardstick of requests is a FastAPI application with one handler that
returns the same body, served by the same uvicorn on the same CPU.
"""

import asyncio
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from orchestrator.resources import Role, VirtualMachine, VirtualMachineOperation
from orchestrator.services.context import Context
from orchestrator.services.tokens import create_token
from orchestrator.store import Store
from tests.benchmarks.figures import Figure, Result, percentile, spread, typical
from tests.benchmarks.running import Bench
from tests.benchmarks.store_rate import Nobody
from tests.builders import a_node, a_vm, an_operation
from tests.redis_server import RedisServer, free_port
from tests.requirements import need_program
from tests.waiting import wait_until

VMS = 10_000
WATCHERS = 100
_COMMITS = 200
_AT_A_TIME = 500
_LISTS = 5
_CONNECTIONS = 16
_SECONDS = 5.0
_GROUP = "/apis/virtualization.deckhouse.io/v1alpha2"
_VMS = f"{_GROUP}/virtualmachines"
_OPERATION = f"{_GROUP}/namespaces/default/virtualmachineoperations/op"
_TABLE = {"accept": "application/json;as=Table;v=v1;g=meta.k8s.io"}
_PLAIN = """
import sys, uvicorn
from fastapi import FastAPI, Response
body, app = open(sys.argv[2], "rb").read(), FastAPI()

@app.get("/op")
async def op() -> Response:
    return Response(body, media_type="application/json")

uvicorn.run(app, port=int(sys.argv[1]), log_config=None, access_log=False, http="httptools", loop="asyncio")
"""


def run(bench: Bench) -> Result:
    """Measure it."""
    result = Result("api", f"one API server on one CPU, {VMS:,} VMs, plain HTTP")
    with tempfile.TemporaryDirectory(prefix="vmherd-bench-") as folder:
        server = RedisServer(Path(folder) / "redis", is_durable=True)
        server.start()
        store = Store.open(server.url)
        try:
            bench.say(f"api: {VMS:,} VMs are stored")
            _populate(store)
            _, token = create_token(Context(store, Nobody()), "bench", Role.VIEWER)
            port = free_port()
            environment = {"VMHERD_REDIS_URL": server.url, "VMHERD_LOG_LEVEL": "ERROR"}
            command = ["-m", "orchestrator.cli", "api", "--plain-http", "--port", str(port)]
            with _pinned(command, port, "/readyz", **environment) as api:
                client = httpx.Client(
                    base_url=f"http://127.0.0.1:{port}", headers={"authorization": f"Bearer {token}"}, timeout=120
                )
                with client:
                    result.tables["lists"] = _lists(bench, client, api.pid)
                    result.tables["watches"], result.raw["watch_ms"] = _watches(bench, store, port, token)
                    result.tables["requests"] = _requests(bench, client, port, token, Path(folder))
        finally:
            store.close()
            server.kill()
    return result


def _populate(store: Store) -> None:
    store.must_commit(store.batch().create(a_node("n1")).create(an_operation("op")))
    for first in range(0, VMS, _AT_A_TIME):
        batch = store.batch()
        for number in range(first, first + _AT_A_TIME):
            batch.create(a_vm(f"vm-{number:05}", ip_address=f"10.0.{number // 250}.{number % 250}"))
        store.must_commit(batch)


@contextmanager
def _pinned(arguments: list[str], port: int, path: str, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run Python on the first CPU that we may use, until the block ends."""
    cpu = str(min(os.sched_getaffinity(0)))
    process = subprocess.Popen(
        [need_program("taskset", "util-linux"), "-c", cpu, sys.executable, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: _answers(port, path), 300, f"port {port} answers")
        yield process
    finally:
        process.terminate()
        process.wait(30)


def _answers(port: int, path: str) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _memory_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) / 1024


def _lists(bench: Bench, client: httpx.Client, pid: int) -> list[Figure]:
    idle = _memory_mib(pid)
    tables: list[float] = []
    size = 0
    for _ in bench.track(range(_LISTS + 1), _LISTS + 1, f"list of {VMS:,} VMs as a table"):
        began = time.perf_counter()
        answer = client.get(_VMS, headers=_TABLE)
        tables.append(time.perf_counter() - began)
        size = len(answer.content)
        assert answer.text.count('"cells":') == VMS
    after_tables = _memory_mib(pid)
    whole: list[float] = []
    whole_size = 0
    for _ in range(_LISTS + 1):
        began = time.perf_counter()
        whole_size = len(client.get(_VMS).content)
        whole.append(time.perf_counter() - began)
    began = time.perf_counter()
    page = len(client.get(_VMS, headers=_TABLE, params={"limit": 500}).content)
    page_s = time.perf_counter() - began
    with client.stream("GET", _VMS, headers=_TABLE) as answer:
        sent = int(answer.headers["content-length"])
    return [
        Figure("table, the first time", tables[0], "s", "each row is made once, and kept"),
        typical("table, later", tables[1:], "s"),
        Figure("table's size", size / 2**20, "MiB", f"{size / VMS:.0f} bytes a VM"),
        Figure("as it is sent, compressed", sent / 1024, "KiB"),
        Figure("one page of 500, as kubectl asks", page_s * 1000, "ms", f"{page / 1024:.0f} KiB"),
        Figure("whole documents, the first time", whole[0], "s", f"{whole_size / 2**20:.1f} MiB"),
        typical("whole documents, later", whole[1:], "s"),
        Figure("server's memory before the first list", idle, "MiB"),
        Figure("after the tables", after_tables, "MiB"),
        Figure("after the whole documents", _memory_mib(pid), "MiB"),
    ]


def _watches(bench: Bench, store: Store, port: int, token: str) -> tuple[list[Figure], list[float]]:
    """Commit, and see when each watcher has its line."""
    version = store.version()
    sockets = [_open_watch(port, token, version) for _ in range(WATCHERS)]
    selector = selectors.DefaultSelector()
    for one in sockets:
        selector.register(one, selectors.EVENT_READ)
    vm = store.get(VirtualMachine, "default/vm-00000")
    times_ms: list[float] = []
    last_ms: list[float] = []
    commits_ms: list[float] = []
    for number in bench.track(range(_COMMITS), _COMMITS, f"commits seen by {WATCHERS} watchers"):
        began = time.perf_counter()
        vm = store.must_commit(store.batch().put(vm, vm.with_status(counter=number + 1)))[0]  # type: ignore[assignment]
        commits_ms.append((time.perf_counter() - began) * 1000)
        waiting = set(sockets)
        while waiting:
            ready = selector.select(10)
            assert ready, "a watcher was not told"
            now = (time.perf_counter() - began) * 1000
            for key, _ in ready:
                told: Any = key.fileobj
                if b'"MODIFIED"' in told.recv(1 << 20) and told in waiting:
                    waiting.remove(told)
                    times_ms.append(now)
        last_ms.append(max(times_ms[-WATCHERS:]))
    for watcher in sockets:
        watcher.close()
    selector.close()
    return [
        Figure("commit begun -> a watcher's line, p50", percentile(times_ms, 50), "ms", spread(times_ms, "ms")),
        Figure("commit begun -> a watcher's line, p99", percentile(times_ms, 99), "ms"),
        Figure("commit begun -> the last of 100 has it, p50", percentile(last_ms, 50), "ms"),
        Figure("of it, the commit itself, p50", percentile(commits_ms, 50), "ms", "with its fsync"),
    ], times_ms


def _open_watch(port: int, token: str, version: int) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", port))
    one.sendall(
        f"GET {_VMS}?watch=true&resourceVersion={version} HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {token}\r\n\r\n".encode()
    )
    assert b" 200 " in one.recv(65536)
    return one


def _requests(bench: Bench, client: httpx.Client, port: int, token: str, folder: Path) -> list[Figure]:
    body = client.get(_OPERATION).content
    assert VirtualMachineOperation.kind_name.encode() in body
    head = f"Host: x\r\nAuthorization: Bearer {token}\r\n\r\n"
    bench.say(f"{_CONNECTIONS} connections ask for one operation, {_SECONDS:g} s each way")
    newest = asyncio.run(_rate(port, f"GET {_OPERATION} HTTP/1.1\r\n{head}".encode()))
    copied = asyncio.run(_rate(port, f"GET {_OPERATION}?resourceVersion=0 HTTP/1.1\r\n{head}".encode()))
    plain_port, file = free_port(), folder / "body"
    file.write_bytes(body)
    with _pinned(["-c", _PLAIN, str(plain_port), str(file)], plain_port, "/op"):
        plain = asyncio.run(_rate(plain_port, f"GET /op HTTP/1.1\r\n{head}".encode()))
    return [
        Figure("plain FastAPI handler, the same body", plain, "/s", f"{len(body)} bytes, {_CONNECTIONS} connections"),
        Figure("get vmop/x from the copy (resourceVersion=0)", copied, "/s", f"{copied / plain:.2f} of it"),
        Figure("get vmop/x, as new as Redis (the default)", newest, "/s", f"{newest / plain:.2f} of it"),
    ]


async def _rate(port: int, request: bytes) -> float:
    """Give the requests a second that are answered over some connections, each one after the other."""
    until = time.perf_counter() + _SECONDS
    counts = await asyncio.gather(*(_ask(port, request, until) for _ in range(_CONNECTIONS)))
    return sum(counts) / _SECONDS


async def _ask(port: int, request: bytes, until: float) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    count = 0
    while time.perf_counter() < until:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head, head
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.split(b":")[1]))
        count += 1
    writer.close()
    return count

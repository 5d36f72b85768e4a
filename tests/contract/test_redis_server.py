"""What other tests lean on: the Redis of the tests is durable where it says so, and is left empty."""

import os
import subprocess
import sys
from pathlib import Path

import redis

from tests.processes import has_ended
from tests.redis_server import RedisServer
from tests.waiting import wait_until


def test_each_test_gets_an_empty_one(redis_url: str, redis_server: RedisServer) -> None:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        assert client.dbsize() == 0
        client.set("key", "value")
        client.acl_setuser("node-1", enabled=True, nopass=True, commands=["+ping"])
        client.acl_save()
        redis_server.clear()
        assert client.dbsize() == 0
        assert client.acl_users() == ["default"]


def test_a_durable_one_keeps_all_through_a_kill(durable_redis: RedisServer) -> None:
    with durable_redis.client() as client:
        client.set("key", "value")
        before = client.info("server")["run_id"]
    durable_redis.kill()
    durable_redis.start()
    with durable_redis.client() as client:
        assert client.get("key") == "value"
        assert client.info("server")["run_id"] != before


def test_it_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from tests.redis_server import RedisServer
server = RedisServer(Path({str(tmp_path)!r}))
server.start()
print(server.client().info("server")["process_id"], flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    wait_until(lambda: has_ended(pid), 10, f"redis-server {pid} has ended")
